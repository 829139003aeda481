"""The commands of `grank`. Each imports what it runs, so that help and usage errors need not wait for the trainer."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer  # commands from typed functions: help, usage errors and exit codes in one place

if TYPE_CHECKING:
    import torch

    from grank_kernels.recommender.data import Interactions
    from grank_kernels.recommender.serving.retriever import Retriever
    from grank_kernels.recommender.training.experiment import Experiment

    Served = tuple[Experiment, Retriever, Interactions | None]

app = typer.Typer(
    help="Train, evaluate, retrieve, and see what can run here.",
    epilog="Exit status: 0 done, 1 error, 2 wrong usage, 130 interrupted. GRANK_TRACEBACK=1 shows an error's origin.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Run = Annotated[Path, typer.Argument(help="Folder of a run.")]
Folder = Annotated[Path, typer.Argument(help="Folder of a run, or one that `grank export` has written.")]
Threads = Annotated[int | None, typer.Option(min=1, help="Of torch; without it as many as it likes.")]
Dtype = Annotated[str | None, typer.Option(help="Of the table: float32 (without it), bfloat16 or int8.")]


@app.command()
def train(
    config: Annotated[Path, typer.Argument(help="YAML file of the experiment, see configs/.")],
    folder: Annotated[Path, typer.Argument(help="Folder of the run; one that was stopped goes on where it was.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="section.key=value, e.g. training.epochs=3")] = None,
    data: Annotated[Path | None, typer.Option(help="File or folder of the data set.")] = None,
    threads: Threads = None,
) -> None:
    """Train a model and report on its test split."""
    from grank_kernels.distributed.ranks import leave
    from grank_kernels.recommender.training.experiment import Experiment
    from grank_kernels.recommender.training.run import run

    _set_threads(threads)
    given = [*(overrides or []), *([f"data.path={data}"] if data else [])]
    report = run(Experiment.load(config, given), folder)
    leave()
    if report:
        _print_json({name: value for name, value in report.items() if name != "machine"})


@app.command()
def evaluate(folder: Run, threads: Threads = None) -> None:
    """Report on the test split of a run, by the weights of its best epoch."""
    from grank_kernels.recommender.training.experiment import Experiment
    from grank_kernels.recommender.training.run import evaluate as report
    from grank_kernels.recommender.training.run_folder import load_model

    _set_threads(threads)
    experiment = Experiment.load(folder / "experiment.yaml")
    split = experiment.data.split(experiment.data.read())
    _print_json(report(experiment, load_model(folder, split.num_items), split))


@app.command()
def export(
    folder: Run,
    to: Annotated[Path, typer.Argument(help="New folder; it is there whole or not at all.")],
    dtype: Dtype = None,
) -> None:
    """Write what serving needs of a run: settings, weights, item table, ids and titles."""
    from grank_kernels.recommender.serving.retriever import Retriever

    Retriever.from_run(folder, dtype=_dtype(dtype)).save(to)


@app.command()
def retrieve(
    folder: Folder,
    history: Annotated[str | None, typer.Option(help="Item ids, oldest first: 1,2,3. All of them liked.")] = None,
    user: Annotated[str | None, typer.Option(help="Id of a user of the data set, whose whole history counts.")] = None,
    all_users: Annotated[bool, typer.Option("--all-users", help="Every user of the data set.")] = False,
    out: Annotated[Path | None, typer.Option(help="Folder for their Parquet files; a stopped run goes on.")] = None,
    k1: Annotated[int, typer.Option(min=1, help="Items to retrieve.")] = 2000,
    k2: Annotated[int, typer.Option(min=1, help="Items to rank and print or write, at most k1.")] = 10,
    batch: Annotated[int, typer.Option(min=1, help="With --all-users, users at a time.")] = 256,
    users_per_part: Annotated[int, typer.Option(min=1, help="With --all-users, users a file.")] = 1024,
    dtype: Dtype = None,
) -> None:
    """Recommend items to a user: rank, score, id and title. Or to all users, also under torchrun."""
    if [history is not None, user is not None, all_users].count(True) != 1:
        raise typer.BadParameter("give one of --history, --user and --all-users")
    if all_users != (out is not None):
        raise typer.BadParameter("--all-users and --out go together")
    if k2 > k1:
        raise typer.BadParameter(f"--k2 must be at most --k1, got {k2} of {k1}")
    if out is not None:
        _retrieve_all(folder, out, dtype, k1=k1, k2=k2, batch=batch, users_per_part=users_per_part)
        return
    experiment, retriever, interactions = _served(folder, dtype)
    if user is not None:
        items, liked = _history_of(user, experiment, interactions or experiment.data.read())
        histories = retriever.histories([items], [liked])
    else:
        names = [name.strip() for name in (history or "").split(",") if name.strip()]
        histories = retriever.histories([_parsed(names, retriever.catalogue.ids, "--history")])
    seen = retriever.catalogue.of(histories.items[-3:].numpy())
    print(f"{len(histories.items)} items seen, last: {'; '.join(map(retriever.catalogue.title, seen)) or 'none'}")
    best = retriever.retrieve(histories, k1, k2)
    found = best.scores[0].isfinite().tolist()
    for place, (score, name) in enumerate(zip(best.scores[0].tolist(), best.ids[0].tolist(), strict=True)):
        if found[place]:
            print(f"{place + 1:>4}  {score:>9.4f}  {name:>10}  {retriever.catalogue.title(name)}")


@app.command()
def bench_retriever(
    folder: Annotated[Path | None, typer.Argument(help="Folder of a run, or one of `grank export`.")] = None,
    items: Annotated[
        int | None, typer.Option(min=1, help="Instead: a GRank of random weights over so many items.")
    ] = None,
    dim: Annotated[int, typer.Option(min=1, help="Width of those items.")] = 64,
    k1: Annotated[int, typer.Option(min=1, help="Items to retrieve.")] = 2000,
    k2: Annotated[int, typer.Option(min=1, help="Items to return, at most k1.")] = 500,
    batch: Annotated[list[int] | None, typer.Option(min=1, help="Users a request; again for more. [1, 16, 64]")] = None,
    requests: Annotated[int, typer.Option(min=1, help="Requests that are timed, at each batch size.")] = 200,
    warm_up: Annotated[int, typer.Option(min=0, help="Requests before them that are not.")] = 20,
    dtype: Dtype = None,
    threads: Threads = None,
    to_json: Annotated[Path | None, typer.Option("--json", help="File for the report.")] = None,
) -> None:
    """Time a retriever, stage by stage: p50, p99 and users a second, requests one after the other."""
    if (folder is None) == (items is None):
        raise typer.BadParameter("give a folder or --items")
    if k2 > k1:
        raise typer.BadParameter(f"--k2 must be at most --k1, got {k2} of {k1}")
    from grank_kernels.recommender.serving import latency

    _set_threads(threads)
    if folder is not None:
        experiment, retriever, interactions = _served(folder, dtype)
        histories = experiment.data.split(interactions or experiment.data.read()).test.histories
    else:
        retriever, histories = latency.synthetic(items or 0, dim=dim, dtype=_dtype(dtype))
    report = latency.measure(
        retriever,
        histories,
        k1=k1,
        k2=k2,
        batches=batch or [1, 16, 64],
        requests=requests,
        warm_up=warm_up,
        progress=lambda size: print(f"batch {size} ...", file=sys.stderr),
    )
    print(latency.table(report))
    if to_json is not None:
        name = type(retriever.current.model).__name__
        facts = {
            "model": name,
            "items": len(retriever.catalogue),
            "dtype": str(retriever.current.table.dtype),
            "k1": k1,
            "k2": k2,
        }
        record = latency.record(report, **facts, requests=requests, warm_up=warm_up)
        to_json.write_text(json.dumps(record, indent=2) + "\n")


@app.command()
def doctor() -> None:
    """Versions, processor, every backend: can run, or why not."""
    from grank_kernels.doctor import show_config

    print(show_config())


def _print_json(report: dict[str, Any]) -> None:
    print(json.dumps(report, indent=2))


def _set_threads(threads: int | None) -> None:
    if threads:
        import torch

        torch.set_num_threads(threads)


def _dtype(name: str | None) -> "torch.dtype":
    from grank_kernels.recommender.serving.retriever import DTYPES

    if name is None:
        return DTYPES[0]
    dtypes = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES}
    if name not in dtypes:
        raise typer.BadParameter(f"--dtype must be one of {', '.join(dtypes)}, got {name!r}")
    return dtypes[name]


def _retrieve_all(folder: Path, out: Path, dtype: str | None, **sizes: int) -> None:
    from tqdm import tqdm

    from grank_kernels.recommender.serving import offline

    request = offline.Request(**sizes)
    with offline.launched() as ranks:
        first = ranks is None or ranks.rank == 0
        experiment, retriever, interactions = _served(folder, dtype, mmap=ranks is not None)
        interactions = interactions or experiment.data.read()
        users = offline.Users.of(interactions, retriever.catalogue, experiment.data.positive)
        with tqdm(unit=" users", disable=None if first else True) as bar:  # None: where standard error is no terminal

            def progress(done: int, total: int) -> None:
                bar.total = total
                bar.update(done - bar.n)

            paths = offline.retrieve_all(retriever, users, out, request, ranks=ranks, progress=progress)
        if first:
            print(f"{len(users.ids)} users in {len(paths)} files: {out}")


def _served(folder: Path, dtype: str | None, *, mmap: bool = False) -> "Served":
    """The retriever of a folder, whichever of the two kinds it is."""
    from grank_kernels.recommender.serving.retriever import Retriever
    from grank_kernels.recommender.training.experiment import Experiment

    experiment = Experiment.load(folder / "experiment.yaml")
    if not (folder / "best.ckpt").exists():
        if dtype is not None:
            raise typer.BadParameter("--dtype is for the folder of a run; an exported table has its own")
        return experiment, Retriever.load(folder, mmap=mmap), None
    interactions = experiment.data.read()
    return experiment, Retriever.from_run(folder, interactions, dtype=_dtype(dtype)), interactions


def _parsed(names: Sequence[str], ids: Any, option: str) -> list[Any]:
    """Names given in a shell as ids of the type that `ids` (n,) have."""
    if ids.dtype.kind == "U":
        return list(names)
    wrong = [name for name in names if not name.isdecimal()]
    if wrong:
        raise ValueError(f"{option} takes integers here, got {wrong[0]!r}")
    return [int(name) for name in names]


def _history_of(user: str, experiment: "Experiment", interactions: "Interactions") -> tuple[list[Any], list[bool]]:
    """Item ids and feedback of a user of the data set."""
    import torch

    from grank_kernels.recommender.data import all_histories

    place = (interactions.user_ids == _parsed([user], interactions.user_ids, "--user")[0]).nonzero()[0]
    if len(place) == 0:
        raise ValueError(f"--user: there is no user {user} in {experiment.data.name}")
    own = all_histories(interactions, experiment.data.positive).select(torch.from_numpy(place))
    return interactions.item_ids[own.items].tolist(), own.feedback.tolist()
