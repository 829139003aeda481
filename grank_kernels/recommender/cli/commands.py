"""The commands of `grank`.

Every command checks its arguments and files first and imports the trainer last: a wrong argument is reported at once.
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer  # commands from typed functions: help, usage errors and exit codes in one place

from grank_kernels._version import __version__
from grank_kernels.recommender.cli.text import note, printable

if TYPE_CHECKING:
    from grank_kernels.recommender.serving.retriever import Retriever
    from grank_kernels.recommender.training.experiment import Experiment

app = typer.Typer(
    help="Train recommenders, evaluate them and retrieve with them.",
    epilog="Exit status: 0 done, 1 error, 2 wrong usage, 130 interrupted. GRANK_TRACEBACK=1 shows an error's origin.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # rich takes longer to import than all else that help needs
    context_settings={"help_option_names": ["-h", "--help"]},
)

Run = Annotated[Path, typer.Argument(help="Folder of a run.")]
Folder = Annotated[Path, typer.Argument(help="Folder of a run, or one that `grank export` wrote.")]
Threads = Annotated[int | None, typer.Option(min=1, max=1024, help="Number of torch threads (default: torch's own).")]
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
        print("\n".join(map(printable, understood.lines())))


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
    as_json: AsJson = False,
) -> None:
    """Train a model on your own file or by a YAML file, and print its report on the test split."""
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
            note(printable(line))
    _set_threads(threads)
    from grank_kernels.distributed.ranks import leave
    from grank_kernels.recommender.training.run import run

    report = run(experiment, folder, data_changed=data_changed, progress=not quiet, compare=True)
    leave()
    if report:
        _print_report({name: value for name, value in report.items() if name != "machine"}, as_json)


@app.command()
def evaluate(folder: Run, as_json: AsJson = False, data_changed: DataChanged = False, threads: Threads = None) -> None:
    """Evaluate the best epoch of a run on its test split, beside popularity and item-kNN."""
    from grank_kernels.recommender.training.run_folder import check_run

    check_run(folder)
    _set_threads(threads)
    from grank_kernels.recommender.training.run import evaluate_run

    _print_report(evaluate_run(folder, data_changed=data_changed, compare=True), as_json)


@app.command()
def refresh(
    folder: Folder,
    items: Annotated[Path, typer.Option(help="File of all items to offer from now on, perhaps with their titles.")],
) -> None:
    """Set the items that a run or an export recommends, without training: others stay in histories only."""
    from grank_kernels.recommender.cli.recommending import offer

    offer(folder, items)


@app.command()
def export(
    folder: Run,
    to: Annotated[Path, typer.Argument(help="New folder, which appears complete or not at all.")],
    dtype: Dtype = None,
) -> None:
    """Write what serving needs of a run into a folder: settings, weights, item table, ids and titles."""
    from grank_kernels.recommender.serving.retriever import Retriever

    Retriever.from_run(folder, dtype=_dtype(dtype)).save(to)


@app.command("retrieve", help="The same as recommend.", short_help="The same as recommend.")
@app.command()
def recommend(
    folder: Folder,
    history: Annotated[
        str | None,
        typer.Option(help='Item ids, oldest first, all liked: 1,2,3, or as JSON: ["a,b", "c"] or [-1, 2].'),
    ] = None,
    user: Annotated[str | None, typer.Option(help="User id of the data set; its whole history is used.")] = None,
    all_users: Annotated[bool, typer.Option("--all-users", help="Every user of the data set.")] = False,
    out: Annotated[
        Path | None,
        typer.Option(
            help="With --all-users: a .csv or .parquet file, or a folder for Parquet files, which can be resumed."
        ),
    ] = None,
    only_file: Annotated[
        Path | None, typer.Option(help="File of item ids: recommend these only, e.g. the stock.")
    ] = None,
    exclude_file: Annotated[Path | None, typer.Option(help="File of item ids never to recommend.")] = None,
    k1: K1 = 2000,
    k2: Annotated[int, typer.Option(min=1, help="Number of items to print or write per user, at most k1.")] = 10,
    batch: Annotated[int, typer.Option(min=1, help="With --all-users: number of users per batch.")] = 256,
    users_per_part: Annotated[
        int, typer.Option(min=1, help="With a folder for --out: number of users per file.")
    ] = 1024,
    dtype: Dtype = None,
    quiet: Quiet = False,
) -> None:
    """Recommend items to one user, as rank, score, id and title, or to all users, also under torchrun."""
    if [history is not None, user is not None, all_users].count(True) != 1:
        raise typer.BadParameter("give one of --history, --user and --all-users")
    if all_users != (out is not None):
        raise typer.BadParameter("--all-users and --out go together")
    _check_k2(k1, k2)
    in_one_file = out is not None and out.suffix in (".csv", ".parquet")
    if out is not None and not in_one_file and (only_file is not None or exclude_file is not None):
        raise typer.BadParameter("--only-file and --exclude-file take --out with one file, .csv or .parquet")
    from grank_kernels.recommender.cli import recommending

    if out is not None and not in_one_file:
        sizes = {"k1": k1, "k2": k2, "batch": batch, "users_per_part": users_per_part}
        recommending.to_folder(lambda mmap: _served(folder, dtype, mmap=mmap), out, sizes, quiet=quiet)
        return
    retriever, experiment = _served(folder, dtype)
    allow = recommending.allowed(retriever.catalogue, only_file, exclude_file)
    if out is not None:
        sizes = {"k1": k1, "k2": k2, "batch": batch}
        recommending.to_file(retriever, experiment, out, sizes, allow, quiet=quiet)
        return
    if user is not None:
        histories = recommending.history_of(user, retriever, experiment)
    else:
        histories = retriever.histories([_item_ids(history or "", retriever)])
    recommending.show(retriever, histories, k1, k2, allow)


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
    """Item ids of --history, all of the catalogue."""
    from grank_kernels.recommender.cli.recommending import known_items

    if not text.startswith("["):
        given = [name.strip() for name in text.split(",") if name.strip()]
    else:
        try:
            given = [str(name) for name in json.loads(text)]
        except ValueError as error:
            raise typer.BadParameter(f"--history must be ids separated by commas or a JSON list, got {error}") from None
    return known_items(given, retriever.catalogue)


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


def _print_report(report: dict[str, Any], as_json: bool) -> None:
    """Print a report with a comparison."""
    if as_json:
        _print_json(report)
        return
    from grank_kernels.recommender.training.comparison import aligned, table

    print(aligned(table(report)))
    print(f"means over {report['users']:,} test users ± standard errors; coverage: share of the items in any first 10")


def _note_batch(size: int) -> None:
    note(f"batch size {size}")
