"""GRank's two stages beside other retrieval systems, at equal recall.

    python -m benchmarks.retrieval_systems RUN           # the folder of a run of GRank
    python -m benchmarks.retrieval_systems --items 1000000    # random weights, this number of items

Every system returns k2 ranked items for the same users:

- GRank: `mips_topk` over the whole table (float32, bfloat16, int8) finds k1 items, and the Ranker orders them.
- HNSW, IVF-PQ, tree: an index finds the k1 items, and the same Ranker orders them. The index searches for k1 plus the
  length of the longest history, and seen items are removed; efSearch and beam are at least that number.
- Cross-attention: the Ranker scores every item of the corpus.

Recall is the share of the exact first stage's k1 items that a system retrieves. On half of the users every index is
tuned to reach `--recall`: efSearch, nprobe or the beam is doubled until it does, then bisected; an index that cannot
is marked. Recall and times are measured on the other half. The time includes search and second stage, not the
Generator, which is equal for all.
"""

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.indexes import FaissHNSW, FaissIVFPQ, Index, Tree
from grank_kernels import TopK
from grank_kernels import doctor as config
from grank_kernels.recommender.data import Batch, Histories
from grank_kernels.recommender.serving.latency import Latency, synthetic
from grank_kernels.recommender.serving.retriever import Retriever, Serving
from grank_kernels.recommender.training.experiment import Experiment
from grank_kernels.table.item_table import ItemTable


@dataclass(frozen=True)
class System:
    """One way from a user to k1 items.

    Attributes:
        name: name in the table.
        search: (histories, users (B, d), k1) -> the best k1 items that are not in the histories.
        setting: the number that trades recall for time, as (object, attribute), or None.
        most: largest value of that number.
        seconds: build time.
    """

    name: str
    search: Callable[[Histories, Tensor, int], TopK]
    setting: tuple[Any, str] | None = None
    most: int = 0
    seconds: float = 0.0


def exact(serving: Serving, vectors: Tensor, dtype: torch.dtype) -> System:
    start = time.perf_counter()
    own = Serving(serving.model, ItemTable.from_rows(vectors, dtype=dtype))
    name = str(dtype).removeprefix("torch.")
    return System(f"GRank, mips_topk {name}", own.search, seconds=time.perf_counter() - start)


def indexed(name: str, build: Callable[[], Index], attribute: str, most: int, spare: int) -> System:
    start = time.perf_counter()
    index = build()
    seconds = time.perf_counter() - start

    def search(histories: Histories, users: Tensor, k1: int) -> TopK:
        """Searches for k1 plus the longest history, and removes seen items."""
        wanted = min(k1 + spare, len(index.vectors))
        values, found = index.search(users, wanted)
        width = len(index.vectors)
        rows = torch.arange(len(users)).unsqueeze(1) * width
        seen = torch.isin(found + rows, histories.items + histories.users * width)
        values = values.masked_fill(seen, -torch.inf)
        order = values.argsort(dim=1, descending=True, stable=True)[:, :k1]
        values, found = values.gather(1, order), found.gather(1, order)
        return TopK(values, found.masked_fill(values == -torch.inf, -1))

    return System(name, search, (index, attribute), most, seconds)


def indexes(vectors: Tensor, k1: int, spare: int) -> list[Callable[[], System]]:
    """The index systems, built one at a time, so that one is in memory."""
    N, d = vectors.shape
    nlist = max(1, min(int(4 * N**0.5), N // 40))
    parts = max(m for m in (16, 8, 4, 2, 1) if d % m == 0)
    hnsw, pq, tree = max(N // 8, 2 * (k1 + spare)), nlist, max(1, N // 8)
    return [
        lambda: indexed("HNSW (faiss), Ranker", lambda: FaissHNSW(vectors), "ef_search", hnsw, spare),
        lambda: indexed(
            "IVF-PQ (faiss), Ranker", lambda: FaissIVFPQ(vectors, nlist=nlist, parts=parts), "nprobe", pq, spare
        ),
        lambda: indexed("tree with beam, Ranker", lambda: Tree(vectors, leaf=8), "beam", tree, spare),
    ]


def recall(found: Tensor, truth: Tensor) -> float:
    """Share of the true items that was found, over users."""
    shares = [
        len(np.intersect1d(one[one >= 0], other[other >= 0])) / max(1, int((other >= 0).sum()))
        for one, other in zip(found.numpy(), truth.numpy(), strict=True)
    ]
    return float(np.mean(shares))


def tune(system: System, reached: Callable[[], float], target: float) -> float:
    """Sets the least setting that reaches the target recall, to within 1/8, or the largest; returns its recall."""
    if system.setting is None:
        return reached()
    subject, attribute = system.setting

    def at(value: int) -> float:
        setattr(subject, attribute, value)
        return reached()

    low, high = 0, 1
    while (got := at(high)) < target and high < system.most:
        low, high = high, min(2 * high, system.most)
    if got < target:
        return got
    while high - low > max(1, high // 8):
        middle = (low + high) // 2
        low, high = (middle, high) if at(middle) < target else (low, middle)
    return at(high)


def cross_attention(
    serving: Serving, vectors: Tensor, batch: Batch, users: Tensor, histories: Histories, k2: int
) -> TopK:
    """The k2 best unseen items by the Ranker's scores over the whole corpus."""
    everything = torch.arange(len(vectors)).expand(len(users), -1)
    logits = users @ vectors.T
    scores = serving.model.rank_rows(serving.table, batch, users, everything, logits)
    scores[histories.users, histories.items] = -torch.inf
    return TopK(*scores.topk(k2))


@torch.inference_mode()
def compare(
    retriever: Retriever, histories: Histories, *, k1: int, k2: int, batches: list[int], requests: int, target: float
) -> list[dict[str, Any]]:
    """One row per system and batch size."""
    serving = retriever.current
    vectors = serving.table.rows(torch.arange(len(serving.table)))
    k1 = min(k1, len(vectors))
    half = len(histories) // 2
    tuning, asked = histories.select(torch.arange(half)), histories.select(torch.arange(half, len(histories)))

    def found_by(search: Callable[[Histories, Tensor, int], TopK], some: Histories) -> Tensor:
        return search(some, serving.encode(some)[1], k1).indices

    truths = [found_by(serving.search, some) for some in (tuning, asked)]
    rows = []

    def timed(name: str, answer: Callable[[Histories, Batch, Tensor], TopK], count: int, **facts: Any) -> None:
        for B in batches:
            times = []
            for request in range(count + 2):  # the first two are a warm-up
                some = asked.select((torch.arange(B) + request * B) % len(asked))
                batch, users = serving.encode(some)
                start = time.perf_counter()
                answer(some, batch, users)
                times.append(time.perf_counter() - start)
            latency = Latency.of("search and rank", B, times[2:])
            numbers = {"p50": latency.p50, "p99": latency.p99, "qps": latency.qps, "requests": count}
            rows.append({"system": name, "batch": B, **facts, **numbers})
            print(line(rows[-1]), flush=True)

    def measure(system: System) -> None:
        reached = tune(system, lambda: recall(found_by(system.search, tuning), truths[0]), target)
        setting = "" if system.setting is None else f"{system.setting[1]} {getattr(*system.setting)}"
        facts = {"setting": setting, "build_s": system.seconds, "reached": reached >= target}
        facts["recall"] = recall(found_by(system.search, asked), truths[1])

        def answer(some: Histories, batch: Batch, users: Tensor) -> TopK:
            return serving.rank(batch, users, system.search(some, users, k1), k2)

        timed(system.name, answer, requests, **facts)

    print(f"{'':<26}{'batch':>6}{'setting':>18}{'recall':>8}{'p50 ms':>10}{'p99 ms':>10}{'users/s':>10}{'build s':>9}")
    for dtype in (torch.float32, torch.bfloat16, torch.int8):
        measure(exact(serving, vectors, dtype))
    for build in indexes(vectors, k1, int(histories.lengths.max())):
        measure(build())
    timed(
        "cross-attention over all",
        lambda some, batch, users: cross_attention(serving, vectors, batch, users, some, k2),
        max(3, requests // 20),  # slower than all other systems together
        setting="",
        build_s=0.0,
        reached=True,
        recall=1.0,
    )
    return rows


def of_run(run: Path, users: int) -> tuple[Retriever, Histories]:
    """A trained GRank, and the test histories of at most `users` users."""
    experiment = Experiment.load(run / "experiment.yaml")
    interactions = experiment.data.read()
    histories = experiment.data.split(interactions).test.histories
    return Retriever.from_run(run), histories.select(torch.arange(min(users, len(histories))))


def line(row: dict[str, Any]) -> str:
    """One line of the printed table."""
    missed = "" if row["reached"] else "  the recall asked for was not reached"
    return (
        f"{row['system']:<26}{row['batch']:>6}{row['setting']:>18}{row['recall']:>8.3f}{row['p50']:>10.2f}"
        f"{row['p99']:>10.2f}{row['qps']:>10,.0f}{row['build_s']:>9.1f}{missed}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, nargs="?", help="folder of a run of GRank")
    parser.add_argument("--items", type=int, help="instead of a run: random weights, this number of items")
    parser.add_argument("--k1", type=int, default=500)
    parser.add_argument("--k2", type=int, default=100)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--requests", type=int, default=100)
    parser.add_argument("--recall", type=float, default=0.95, help="target of the indexes' tuning")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if (options.run is None) == (options.items is None):
        parser.error("the folder of a run, or --items, is missing")
    if not 1 <= options.k2 <= options.k1:
        parser.error(f"--k2 must be from 1 to --k1, got {options.k2} of {options.k1}")
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.run is not None:
        retriever, histories = of_run(options.run, 256)
    else:
        retriever, histories = synthetic(options.items)
    if not hasattr(retriever.current.model, "ranker"):
        parser.error(f"{options.run} holds a {type(retriever.current.model).__name__}; the comparison is of GRank")
    numbers = {name: getattr(options, name) for name in ("k1", "k2", "requests")}
    rows = compare(retriever, histories, batches=options.batch, target=options.recall, **numbers)
    if options.json is not None:
        facts = {"label": "measured", "items": len(retriever.catalogue), "recall": options.recall, **numbers}
        facts |= {"threads": torch.get_num_threads(), "machine": config.show_config()}
        options.json.write_text(json.dumps(facts | {"systems": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
