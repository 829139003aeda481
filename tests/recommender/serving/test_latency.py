"""Latency of the stages, from the times of requests."""

import pytest
import torch

from grank_kernels.recommender.serving.latency import Latency, measure, synthetic


def test_latency_by_hand() -> None:
    got = Latency.of("search", 4, [number / 1000 for number in range(100, 0, -1)])
    assert (got.p50, got.p99) == pytest.approx((50.0, 99.0))
    assert got.qps == pytest.approx(400 / 5.05)


def test_latency_refuses_what_has_no_answer() -> None:
    retriever, histories = synthetic(50, dim=16, history=4, users=3)
    numbers = {"k1": 5, "k2": 5, "batches": [1], "requests": 1, "warm_up": 0}
    for name, value in (("requests", 0), ("warm_up", -1), ("batches", [2, 0]), ("batches", [])):
        with pytest.raises(ValueError, match=f"{name} must be"):
            measure(retriever, histories, **(numbers | {name: value}))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="histories must be of at least one user, got none"):
        measure(retriever, histories.select(torch.arange(0)), **numbers)  # type: ignore[arg-type]
