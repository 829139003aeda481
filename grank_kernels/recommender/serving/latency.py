"""Latency of a retriever, stage by stage: a fixed number of requests, one after the other, after a warm-up."""

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from grank_kernels.common.checks import check_int
from grank_kernels.doctor import show_config
from grank_kernels.recommender.data.histories import Histories
from grank_kernels.recommender.models.grank import GRank, GRankConfig
from grank_kernels.recommender.serving.catalogue import Catalogue
from grank_kernels.recommender.serving.retriever import Retriever
from grank_kernels.recommender.serving.users import renumbered
from grank_kernels.recommender.training.experiment import DataConfig

STAGES = ("encode", "search", "rank", "retrieve")
"""User vectors, `mips_topk`, second stage, and the whole request from histories to ids."""


@dataclass(frozen=True)
class Latency:
    """Latency of one stage at one batch size.

    Attributes:
        stage: one of `STAGES`.
        batch: number of users per request.
        p50: median time of a request in milliseconds.
        p99: 99th percentile in milliseconds.
        qps: users per second, one request after the other.
    """

    stage: str
    batch: int
    p50: float
    p99: float
    qps: float

    @classmethod
    def of(cls, stage: str, batch: int, seconds: Sequence[float]) -> "Latency":
        """Statistics of the requests' times in seconds."""
        p50, p99 = (1e3 * float(np.percentile(seconds, q, method="inverted_cdf")) for q in (50, 99))
        return cls(stage, batch, p50, p99, batch * len(seconds) / sum(seconds))


@torch.inference_mode()
def measure(
    retriever: Retriever,
    histories: Histories,
    *,
    k1: int,
    k2: int,
    batches: Sequence[int],
    requests: int,
    warm_up: int,
    progress: Callable[[int], object] = lambda batch: None,
) -> list[Latency]:
    """Time the stages of a retriever and whole requests.

    Successive requests are of different users, in rotation, so that no cache holds an answer.

    Args:
        retriever: the retriever to time.
        histories: of the users, at least one.
        k1: number of items to retrieve.
        k2: number of items to return.
        batches: batch sizes, each timed on its own.
        requests: number of timed requests per batch size.
        warm_up: number of requests before them that are not timed.
        progress: called with each batch size before it is timed.

    Raises:
        ValueError: a number below its least, or no histories.
    """
    for name, value, least in (
        ("requests", requests, 1),
        ("warm_up", warm_up, 0),
        ("batches", min(batches, default=0), 1),
    ):
        check_int(name, value, least)
    if len(histories) == 0:
        raise ValueError("histories must be of at least one user, got none")
    report = []
    for B in batches:
        progress(B)
        times: dict[str, list[float]] = {stage: [] for stage in STAGES}
        for request in range(warm_up + requests):
            some = histories.select((torch.arange(B) + request * B) % len(histories))
            serving = retriever.current
            start = time.perf_counter()
            batch, users = serving.encode(some)
            encoded = time.perf_counter()
            found = serving.search(some, users, k1)
            searched = time.perf_counter()
            serving.rank(batch, users, found, k2)
            ranked = time.perf_counter()
            retriever.retrieve(some, k1, k2)
            end = time.perf_counter()
            if request >= warm_up:
                for stage, seconds in zip(
                    STAGES, (encoded - start, searched - encoded, ranked - searched, end - ranked), strict=True
                ):
                    times[stage].append(seconds)
        report += [Latency.of(stage, B, times[stage]) for stage in STAGES]
    return report


def test_histories(retriever: Retriever, data: DataConfig) -> Histories:
    """Histories of the test users of a data set, in item numbers of the retriever."""
    interactions = data.read()
    return renumbered(data.split(interactions).test.histories, interactions.item_ids, retriever.catalogue)[0]


def synthetic(
    num_items: int, *, dim: int = 64, history: int = 200, users: int = 256, dtype: torch.dtype = torch.float32
) -> tuple[Retriever, Histories]:
    """A GRank with random weights and random histories of one length; it takes as long as a trained one."""
    torch.manual_seed(0)
    config = GRankConfig(dim=dim, long_history=history)
    model = GRank(num_items, config)
    retriever = Retriever(model, Catalogue(np.arange(num_items)), dtype=dtype)
    items = torch.randint(num_items, (users * history,))
    return retriever, Histories(torch.arange(users + 1) * history, items, items % 2 == 0)


def table(report: Sequence[Latency]) -> str:
    """The report as text."""
    lines = [f"{'batch':>6}  {'stage':<9}{'p50 ms':>10}{'p99 ms':>10}{'users/s':>12}"]
    lines += [f"{row.batch:>6}  {row.stage:<9}{row.p50:>10.3f}{row.p99:>10.3f}{row.qps:>12,.0f}" for row in report]
    return "\n".join(lines)


def record(report: Sequence[Latency], retriever: Retriever, **sizes: int) -> dict[str, Any]:
    """The report as JSON values, with model, table, sizes and machine."""
    return {
        "label": "measured",
        "model": type(retriever.current.model).__name__,
        "items": len(retriever.catalogue),
        "dtype": str(retriever.current.table.dtype),
        **sizes,
        "threads": torch.get_num_threads(),
        "machine": show_config(),
        "report": [asdict(row) for row in report],
    }
