"""How long a retriever takes, stage by stage: a fixed number of requests, one after the other, after a warm-up."""

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from grank_kernels.doctor import show_config
from grank_kernels.recommender.data import Histories
from grank_kernels.recommender.models import GRank, GRankConfig
from grank_kernels.recommender.serving.catalogue import Catalogue
from grank_kernels.recommender.serving.retriever import Retriever

STAGES = ("encode", "search", "rank", "retrieve")
"""The Generator, `mips_topk`, the second stage, and the whole request from histories to ids."""


@dataclass(frozen=True)
class Latency:
    """Of one stage at one batch size.

    Attributes:
        stage: one of `STAGES`.
        batch: users a request.
        p50: milliseconds, the least time that half of the requests did not exceed.
        p99: the same of 99 % of them.
        qps: users a second, in requests one after the other.
    """

    stage: str
    batch: int
    p50: float
    p99: float
    qps: float

    @classmethod
    def of(cls, stage: str, batch: int, seconds: Sequence[float]) -> "Latency":
        """From the times of the requests."""
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
    """Time the stages of a retriever and the whole.

    Every request is of other users, in turns through the histories, so that no cache holds its answer.

    Args:
        retriever: what to time.
        histories: whom to ask for, at least one.
        k1: items to retrieve.
        k2: items to return.
        batches: users a request, each timed on its own.
        requests: that are timed.
        warm_up: requests before them that are not.
        progress: called with each batch size before it is timed.

    Raises:
        ValueError: a number below its least, or no histories.
    """
    for name, value, least in (
        ("requests", requests, 1),
        ("warm_up", warm_up, 0),
        ("batches", min(batches, default=0), 1),
    ):
        if value < least:
            raise ValueError(f"{name} must be {least} or more, got {value}")
    if len(histories) == 0:
        raise ValueError("histories must be of one user at least, got none")
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


def synthetic(
    num_items: int, *, dim: int = 64, history: int = 200, users: int = 256, dtype: torch.dtype = torch.float32
) -> tuple[Retriever, Histories]:
    """A GRank with random weights over a random table, and random histories of one length: as fast as a trained one."""
    torch.manual_seed(0)
    config = GRankConfig(dim=dim, long_history=history)
    model = GRank(num_items, config)
    retriever = Retriever(model, Catalogue(np.arange(num_items)), dtype=dtype)
    items = torch.randint(num_items, (users * history,))
    return retriever, Histories(torch.arange(users + 1) * history, items, items % 2 == 0)


def table(report: Sequence[Latency]) -> str:
    """For people."""
    lines = [f"{'batch':>6}  {'stage':<9}{'p50 ms':>10}{'p99 ms':>10}{'users/s':>12}"]
    lines += [f"{row.batch:>6}  {row.stage:<9}{row.p50:>10.3f}{row.p99:>10.3f}{row.qps:>12,.0f}" for row in report]
    return "\n".join(lines)


def record(report: Sequence[Latency], **settings: Any) -> dict[str, Any]:
    """For machines: the report, what it was measured with and on."""
    return {
        "label": "measured",
        **settings,
        "threads": torch.get_num_threads(),
        "machine": show_config(),
        "report": [asdict(row) for row in report],
    }
