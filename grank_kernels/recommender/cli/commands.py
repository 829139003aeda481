"""The commands of `grank`.

Every command checks its arguments and files first and imports the trainer last: a wrong argument is reported at once.
"""

import json
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer  # commands from typed functions: help, usage errors and exit codes in one place

from grank_kernels._version import __version__

if TYPE_CHECKING:
    from grank_kernels.recommender.data.histories import Histories
    from grank_kernels.recommender.data.interactions import Interactions
    from grank_kernels.recommender.serving.retriever import Retriever
    from grank_kernels.recommender.training.experiment import Experiment

app = typer.Typer(
    help="Train recommenders, evaluate them and retrieve with them.",
    epilog="Exit status: 0 done, 1 error, 2 wrong usage, 130 interrupted. GRANK_TRACEBACK=1 shows an error's origin.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # rich takes longer to import than all else that help needs
    context_settings={"help_option_names": ["-h", "--help"]},
)

Run = Annotated[Path, typer.Argument(help="Folder of a run.")]
Folder = Annotated[Path, typer.Argument(help="Folder of a run, or one that `grank export` wrote.")]
Threads = Annotated[int | None, typer.Option(min=1, help="Number of torch threads (default: torch's own).")]
Dtype = Annotated[str | None, typer.Option(help="Dtype of the table: float32 (default), bfloat16 or int8.")]
DataChanged = Annotated[
    bool,
    typer.Option("--data-changed", help="Accept data that changed after the training; new items are left out."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print the result and errors only.")]
Titles = Annotated[Path | None, typer.Option(help="File of item ids and titles.")]
UserColumn = Annotated[str | None, typer.Option(help="Column of user ids (default: user, userId, uid, ...).")]
ItemColumn = Annotated[str | None, typer.Option(help="Column of item ids (default: item, movieId, asin, ...).")]
TimeColumn = Annotated[str | None, typer.Option(help="Column of times (default: timestamp, ts, date, ...).")]
RatingColumn = Annotated[str | None, typer.Option(help="Column of ratings (default: rating, stars, event, ...).")]
K1 = Annotated[int, typer.Option(min=1, help="Number of items to retrieve.")]


def _version(asked: bool) -> None:
    if asked:
        print(f"grank {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")] = (
        False
    ),
) -> None:
    pass


@app.command()
def inspect(
    data: Annotated[
        Path, typer.Argument(help="Your own file: text with a separator, or Parquet; a folder or pattern.")
    ],
    as_json: AsJson = False,
    items: Titles = None,
    user_column: UserColumn = None,
    item_column: ItemColumn = None,
    time_column: TimeColumn = None,
    rating_column: RatingColumn = None,
) -> None:
    """Say how a file of your own is read: users, items, events, time, dropped lines. Trains nothing."""
    from grank_kernels.recommender.cli.own_data import data_config

    understood = data_config(data, (user_column, item_column, time_column, rating_column), items).understand()
    if as_json:
        _print_json(understood.to_dict())
    else:
        print("\n".join(map(_printable, understood.lines())))


@app.command()
def train(
    config: Annotated[
        Path,
        typer.Argument(
            metavar="DATA_OR_CONFIG", help="Your own file (see `grank inspect`), or a YAML file of settings."
        ),
    ],
    folder: Annotated[Path, typer.Argument(help="Folder of the run; the same command resumes an interrupted run.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Settings as section.key=value, e.g. training.epochs=3.")
    ] = None,
    data: Annotated[Path | None, typer.Option(help="With a YAML file: file or folder of the data set.")] = None,
    items: Titles = None,
    user_column: UserColumn = None,
    item_column: ItemColumn = None,
    time_column: TimeColumn = None,
    rating_column: RatingColumn = None,
    data_changed: DataChanged = False,
    threads: Threads = None,
    quiet: Quiet = False,
) -> None:
    """Train a model on your own file or by a YAML file, and print its report on the test split as JSON."""
    from grank_kernels.recommender.cli import own_data

    columns, given = (user_column, item_column, time_column, rating_column), list(overrides or [])
    if config.suffix in own_data.YAML:
        from grank_kernels.recommender.training.experiment import Experiment

        if items is not None or any(columns):
            raise typer.BadParameter("--items and --*-column are for a file of your own, not for a YAML file")
        experiment = Experiment.load(config, [*given, *([f"data.path={data}"] if data else [])])
        path = experiment.data.path
        if path is not None and experiment.data.name != "own" and not Path(path).exists():
            raise FileNotFoundError(
                f"{path} does not exist: data.path (--data) must be the data of {experiment.data.name}"
            )
    else:
        if data is not None:
            raise typer.BadParameter("--data is for a YAML file; a file of your own is the first argument")
        settings = own_data.data_config(config, columns, items)
        understood = settings.understand()
        experiment = own_data.sized(understood, settings, given)
        for line in [] if quiet else [*understood.lines(), own_data.settings_line(experiment)]:
            _note(_printable(line))
    _set_threads(threads)
    from grank_kernels.distributed.ranks import leave
    from grank_kernels.recommender.training.run import run

    report = run(experiment, folder, data_changed=data_changed, progress=not quiet)
    leave()
    if report:
        _print_json({name: value for name, value in report.items() if name != "machine"})


@app.command()
def evaluate(folder: Run, data_changed: DataChanged = False, threads: Threads = None) -> None:
    """Evaluate the best epoch of a run on its test split and print the report as JSON."""
    from grank_kernels.recommender.training.run_folder import check_run

    check_run(folder)
    _set_threads(threads)
    from grank_kernels.recommender.training.run import evaluate_run

    _print_json(evaluate_run(folder, data_changed=data_changed))


@app.command()
def export(
    folder: Run,
    to: Annotated[Path, typer.Argument(help="New folder, which appears complete or not at all.")],
    dtype: Dtype = None,
) -> None:
    """Write what serving needs of a run into a folder: settings, weights, item table, ids and titles."""
    from grank_kernels.recommender.serving.retriever import Retriever

    Retriever.from_run(folder, dtype=_dtype(dtype)).save(to)


@app.command()
def retrieve(
    folder: Folder,
    history: Annotated[
        str | None,
        typer.Option(help='Item ids, oldest first, all liked: 1,2,3, or as JSON: ["a,b", "c"] or [-1, 2].'),
    ] = None,
    user: Annotated[str | None, typer.Option(help="User id of the data set; its whole history is used.")] = None,
    all_users: Annotated[bool, typer.Option("--all-users", help="Every user of the data set.")] = False,
    out: Annotated[
        Path | None, typer.Option(help="With --all-users: folder for Parquet files; an interrupted run is resumed.")
    ] = None,
    k1: K1 = 2000,
    k2: Annotated[int, typer.Option(min=1, help="Number of items to print or write per user, at most k1.")] = 10,
    batch: Annotated[int, typer.Option(min=1, help="With --all-users: number of users per batch.")] = 256,
    users_per_part: Annotated[int, typer.Option(min=1, help="With --all-users: number of users per file.")] = 1024,
    dtype: Dtype = None,
) -> None:
    """Recommend items to one user, as rank, score, id and title, or to all users, also under torchrun."""
    if [history is not None, user is not None, all_users].count(True) != 1:
        raise typer.BadParameter("give one of --history, --user and --all-users")
    if all_users != (out is not None):
        raise typer.BadParameter("--all-users and --out go together")
    _check_k2(k1, k2)
    if out is not None:
        _retrieve_all(folder, out, dtype, k1=k1, k2=k2, batch=batch, users_per_part=users_per_part)
        return
    retriever, experiment = _served(folder, dtype)
    if user is not None:
        histories = _history_of(user, retriever, experiment)
    else:
        histories = retriever.histories([_item_ids(history or "", retriever)])
    _print_retrieved(retriever, histories, k1, k2)


@app.command()
def bench_retriever(
    folder: Annotated[Path | None, typer.Argument(help="Folder of a run, or one that `grank export` wrote.")] = None,
    items: Annotated[
        int | None, typer.Option(min=1, help="Instead of a folder: number of items of a GRank with random weights.")
    ] = None,
    dim: Annotated[int, typer.Option(min=1, help="With --items: width of the item vectors.")] = 64,
    k1: K1 = 2000,
    k2: Annotated[int, typer.Option(min=1, help="Number of items to return, at most k1.")] = 500,
    batch: Annotated[
        list[int] | None, typer.Option(min=1, help="Batch size; repeat the option for several (default: 1, 16, 64).")
    ] = None,
    requests: Annotated[int, typer.Option(min=1, help="Number of timed requests per batch size.")] = 200,
    warm_up: Annotated[int, typer.Option(min=0, help="Number of requests before them that are not timed.")] = 20,
    dtype: Dtype = None,
    threads: Threads = None,
    to_json: Annotated[Path | None, typer.Option("--json", help="File for the report.")] = None,
) -> None:
    """Time a retriever stage by stage, one request after the other: p50, p99 and users per second."""
    if (folder is None) == (items is None):
        raise typer.BadParameter("give a folder or --items")
    _check_k2(k1, k2)
    _set_threads(threads)
    from grank_kernels.recommender.serving import latency

    if folder is not None:
        retriever, experiment = _served(folder, dtype)
        histories = latency.test_histories(retriever, experiment.data)
    else:
        retriever, histories = latency.synthetic(items or 0, dim=dim, dtype=_dtype(dtype))
    sizes = {"k1": k1, "k2": k2, "requests": requests, "warm_up": warm_up}
    report = latency.measure(retriever, histories, batches=batch or [1, 16, 64], **sizes, progress=_note_batch)
    print(latency.table(report))
    if to_json is not None:
        to_json.write_text(json.dumps(latency.record(report, retriever, **sizes), indent=2) + "\n")


@app.command()
def doctor() -> None:
    """Show versions, processor and for every backend whether it can run, or why not."""
    from grank_kernels.doctor import show_config

    print(show_config())


# ---- arguments ----


def _set_threads(threads: int | None) -> None:
    if threads:
        import torch

        torch.set_num_threads(threads)


def _check_k2(k1: int, k2: int) -> None:
    if k2 > k1:
        raise typer.BadParameter(f"--k2 must be at most --k1, got {k2} of {k1}")


def _dtype(name: str | None) -> Any:
    """The torch.dtype of an option."""
    from grank_kernels.recommender.serving.retriever import DTYPES

    if name is None:
        return DTYPES[0]
    dtypes = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES}
    if name not in dtypes:
        raise typer.BadParameter(f"--dtype must be one of {', '.join(dtypes)}, got {name!r}")
    return dtypes[name]


def _item_ids(text: str, retriever: "Retriever") -> list[Any]:
    """Item ids of --history."""
    if not text.startswith("["):
        return [_id(name.strip(), retriever.catalogue.ids, "--history") for name in text.split(",") if name.strip()]
    try:
        given = json.loads(text)
    except ValueError as error:
        raise typer.BadParameter(f"--history must be ids separated by commas or a JSON list, got {error}") from None
    return [_id(str(name), retriever.catalogue.ids, "--history") for name in given]


def _id(name: str, ids: Any, option: str) -> str | int:
    """An id of the type that `ids` (n,) have."""
    if ids.dtype.kind not in "iu":
        return name
    if not re.fullmatch("-?[0-9]+", name):
        raise ValueError(f"{option} must be an integer, as the ids of the data set, got {name!r}")
    return int(name)


# ---- what the commands share ----


def _served(folder: Path, dtype: str | None, *, mmap: bool = False) -> "tuple[Retriever, Experiment]":
    """The retriever of a run or an export, and its experiment."""
    from grank_kernels.recommender.serving.retriever import Retriever, is_export

    if is_export(folder):
        if dtype is not None:
            raise typer.BadParameter("--dtype is for the folder of a run; an exported table has its own")
        retriever = Retriever.load(folder, mmap=mmap)
    else:
        retriever = Retriever.from_run(folder, dtype=_dtype(dtype))
    assert retriever.experiment is not None  # both folders have one
    return retriever, retriever.experiment


def _print_json(report: dict[str, Any]) -> None:
    print(json.dumps(report, indent=2))


def _note(text: str) -> None:
    print(f"grank: {text}", file=sys.stderr)


def _note_batch(size: int) -> None:
    _note(f"batch size {size}")


def _note_skipped(items: int, interactions: "Interactions") -> None:
    if items:
        _note(
            f"{items:,} of {interactions.num_items:,} items of the data set are not in the catalogue of the model and "
            "are left out of the histories"
        )


def _history_of(user: str, retriever: "Retriever", experiment: "Experiment") -> "Histories":
    """The history of a user of the data set."""
    from grank_kernels.recommender.serving.users import Users

    interactions = experiment.data.read()
    name = _id(user, interactions.user_ids, "--user")
    users = Users.of(interactions, retriever.catalogue, experiment.data.positive)
    _note_skipped(users.skipped, interactions)
    place = (users.ids == name).nonzero()[0]
    if len(place) == 0:
        raise ValueError(f"--user must be a user of {experiment.data.name}, got {user}")
    import torch

    return users.histories.select(torch.from_numpy(place))


def _print_retrieved(retriever: "Retriever", histories: "Histories", k1: int, k2: int) -> None:
    catalogue = retriever.catalogue
    seen = catalogue.of(histories.items[-3:].numpy())
    titles = "; ".join(_printable(catalogue.title(name)) for name in seen)
    print(f"{len(histories.items)} items seen, last: {titles or 'none'}")
    best = retriever.retrieve(histories, k1, k2)
    if bool(best.popular[0]):
        print("no history: the most popular items, with their number of interactions as score")
    for place, (score, name) in enumerate(zip(best.scores[0].tolist(), best.ids[0].tolist(), strict=True), 1):
        if name != catalogue.missing:
            print(f"{place:>4}  {score:>9.4f}  {_printable(str(name)):>10}  {_printable(catalogue.title(name))}")


def _printable(text: str) -> str:
    """A text of a data set without control characters, which a terminal would obey."""
    return "".join(each if each.isprintable() else ascii(each)[1:-1] for each in text)


def _retrieve_all(folder: Path, out: Path, dtype: str | None, **sizes: int) -> None:
    from tqdm import tqdm

    from grank_kernels.recommender.serving import offline
    from grank_kernels.recommender.serving.users import Users

    request = offline.Request(**sizes)
    with offline.launched() as ranks:
        first = ranks is None or ranks.rank == 0
        retriever, experiment = _served(folder, dtype, mmap=ranks is not None)
        interactions = experiment.data.read()
        users = Users.of(interactions, retriever.catalogue, experiment.data.positive)
        if first:
            _note_skipped(users.skipped, interactions)
        with tqdm(unit=" users", disable=None if first else True) as bar:  # None: where standard error is no terminal

            def progress(done: int, total: int) -> None:
                bar.total = total
                bar.update(done - bar.n)

            paths = offline.retrieve_all(retriever, users, out, request, ranks=ranks, progress=progress)
        if first:
            print(f"{len(users.ids)} users in {len(paths)} files: {out}")
