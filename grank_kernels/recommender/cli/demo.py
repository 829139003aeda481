"""Train GRank on MovieLens-100K, recommend with it and time the search (`make demo`)."""

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor

from grank_kernels.mips_topk import mips_topk
from grank_kernels.recommender.data import Interactions, Split
from grank_kernels.recommender.models import GRankConfig
from grank_kernels.recommender.serving.retriever import Retriever
from grank_kernels.recommender.training.experiment import DataConfig, Experiment
from grank_kernels.recommender.training.settings import TrainingConfig
from grank_kernels.table.item_table import ItemTable

_KS = (10, 50)  # of HR@k and NDCG@k
_TIMED_K = 100


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demo; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m grank_kernels.recommender.cli.demo", description=__doc__)
    parser.add_argument(
        "--seed", type=int, default=0, help="seed of weights, batches and dropout (default: %(default)s)"
    )
    parser.add_argument("--epochs", type=int, default=15, help="number of epochs (default: %(default)s)")
    parser.add_argument(
        "--k1", type=int, default=200, help="number of items to retrieve and re-rank (default: %(default)s)"
    )
    parser.add_argument(
        "--table", type=int, default=1_000_000, help="number of rows of the timed table (default: %(default)s)"
    )
    parser.add_argument("--data", help="u.data of MovieLens-100K, or its folder (default: from a package of PyPI)")
    options = parser.parse_args(arguments)
    for name, least in (("epochs", 1), ("k1", max(_KS)), ("table", _TIMED_K)):
        if getattr(options, name) < least:
            parser.error(f"--{name} must be {least} or more, got {getattr(options, name)}")
    # One thread: the figures then do not depend on the number of cores.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        _recommend(_experiment(options.data, options.epochs, options.k1, options.seed))
    except (FileNotFoundError, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
    finally:
        torch.set_num_threads(threads)
    _time_search(options.table, options.seed)
    return 0


def _experiment(path: str | None, epochs: int, k1: int, seed: int) -> Experiment:
    model = GRankConfig(dim=32, short_history=64, long_history=200, hidden=64)
    training = TrainingConfig(epochs=epochs, targets=64, context=136, learning_rate=4e-3, seed=seed)
    return Experiment("grank", model, DataConfig("ml-100k", path), training, k1=(k1,))


def _recommend(experiment: Experiment) -> None:
    # Here, so that --help and wrong options need not wait for the trainer.
    from grank_kernels.recommender.models.neighbours import Popularity
    from grank_kernels.recommender.training.evaluation import metrics
    from grank_kernels.recommender.training.run import run

    interactions = experiment.data.read()
    split = experiment.data.split(interactions)
    epochs, (k1,) = experiment.training.epochs, experiment.k1
    print(
        f"MovieLens-100K: {interactions.num_users:,} users, {interactions.num_items:,} films, {len(interactions):,} "
        "ratings.\nLeave-one-out: each user's last film is the test, the one before it validation, the rest trains.\n"
        f"\nTraining GRank, Generator, auxiliary branch and Ranker together, {epochs} epochs, seed "
        f"{experiment.training.seed} ...",
        flush=True,
    )
    with tempfile.TemporaryDirectory() as folder:
        report = run(experiment, folder)
        retriever = Retriever.from_run(folder)
    print(f"\ntrained in {report['seconds']:.0f} s on one thread\n")
    print(f"Test: the whole corpus is ranked for {len(split.test):,} users, without the films that each has seen.")
    popular = Popularity.fit(split.train, split.num_items).recommend(split.test.histories, max(_KS))
    rows: list[tuple[str, dict[str, Any]]] = [
        ("popularity", metrics(popular.indices, split.test.targets, _KS)),
        ("stage 1: Generator -> mips_topk", report["retrieved"]),
        (f"stage 2: Ranker over the best {k1}", report[f"ranked_{k1}"]),
    ]
    names = [f"{name}@{k}" for k in _KS for name in ("hr", "ndcg")]
    _table(("", *map(str.upper, names)), [(row, *(f"{found[name]:.4f}" for name in names)) for row, found in rows])
    _show_users(interactions, split, retriever, k1)


def _show_users(interactions: Interactions, split: Split, retriever: Retriever, k1: int) -> None:
    """Print history, recommendations and held-out film of the first, the middle and the last user."""
    title = retriever.catalogue.title
    for number in sorted({0, len(split.test) // 2, len(split.test) - 1}):
        case = split.test.select(torch.tensor([number]))
        seen, target = (retriever.catalogue.of(x.items.numpy()) for x in (case.histories, case.targets))
        ranked = retriever.retrieve(case.histories, k1, k1).ids[0].tolist()
        place = f"place {ranked.index(target[0]) + 1}" if target[0] in ranked else "not retrieved"
        print(f"\nuser {interactions.user_ids[case.users[0]]}, {len(seen)} films seen")
        print("  last seen     " + "; ".join(map(title, seen[-3:])))
        print("  recommended   " + "; ".join(title(film) for film in ranked[:5] if film >= 0))
        print(f"  watched next  {title(target[0])} ({place})")


def _time_search(rows: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    items = torch.randn(rows, 64, generator=generator)
    table = ItemTable.from_rows(items, dtype=torch.int8)
    print(
        f"\nSearch: the best {_TIMED_K} of {rows:,} random items, d = 64, on {torch.get_num_threads()} threads.\n"
        "Median times; the three methods run in turns after their results have been compared.",
        flush=True,
    )
    lines = []
    for B, repeats in ((1, 9), (16, 7), (256, 3)):
        queries = torch.randn(B, 64, generator=generator)
        found = _compare(queries, items, table)
        plain, exact, rounded = _medians(
            [
                partial(_torch_topk, queries, items),
                partial(mips_topk, queries, items, _TIMED_K),
                partial(mips_topk, queries, table, _TIMED_K),
            ],
            repeats,
        )
        ours = [f"{ms:,.1f} ms ({plain / ms:.1f}x)" for ms in (exact, rounded)]
        lines.append((f"batch {B}", f"{plain:,.1f} ms", *ours, f"{found:.1%}"))
    _table(("", "torch.topk(q @ x.T, k)", "mips_topk, float32", "mips_topk, int8", "int8 finds"), lines)
    print(f"(int8 finds: share of the {_TIMED_K} items of the float32 result that the int8 table finds)")


def _torch_topk(queries: Tensor, items: Tensor) -> tuple[Tensor, Tensor]:
    values, indices = torch.topk(queries @ items.T, _TIMED_K)
    return values, indices


def _compare(queries: Tensor, items: Tensor, table: ItemTable) -> float:
    """Check the scores of both searches against torch; returns the share of the float32 result that int8 finds."""
    best, best_items = _torch_topk(queries, items)
    exact = mips_topk(queries, items, _TIMED_K).indices
    rounded = mips_topk(queries, table, _TIMED_K).indices
    scores = torch.einsum("bd,bkd->bk", queries, items[exact])
    torch.testing.assert_close(scores, best, rtol=1e-4, atol=1e-4)
    # int8 scores by their definition: integer sums below 2^24 are exact in float32. 16 queries bound the memory.
    q_scale, x_scale = (x.abs().amax(1, keepdim=True) / 127 for x in (queries[:16], items))
    defined = (queries[:16] / q_scale).round() @ (items / x_scale).round().T * (q_scale * x_scale.T)
    torch.testing.assert_close(defined.gather(1, rounded[:16]), defined.topk(_TIMED_K).values)
    for ids in (exact, rounded):
        if bool((ids.sort(1).values.diff(dim=1) == 0).any()):
            raise AssertionError("a search returned an item twice")
    return (rounded.unsqueeze(2) == best_items.unsqueeze(1)).any(2).float().mean().item()


def _medians(calls: Sequence[Callable[[], object]], repeats: int) -> list[float]:
    """Median milliseconds of each call over rounds of all calls, after one round of warm-up."""
    times: list[list[float]] = [[] for _ in calls]
    for _ in range(repeats + 1):
        for call, spent in zip(calls, times, strict=True):
            start = time.perf_counter()
            call()
            spent.append(1e3 * (time.perf_counter() - start))
    return [median(spent[1:]) for spent in times]


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print columns, the first aligned left and the others right."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    for row in (head, *rows):
        cells = [cell.rjust(width) for cell, width in zip(row, widths, strict=True)]
        print("  ".join(["", row[0].ljust(widths[0]), *cells[1:]]))


if __name__ == "__main__":
    sys.exit(main())
