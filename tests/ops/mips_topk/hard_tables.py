"""Tables that defeat a sampled threshold or overflow a candidate list; parameters of slow tests."""

from collections.abc import Iterable
from typing import Any

import pytest
import torch


def slow_except(quick: Iterable[Any], cases: Iterable[Any]) -> list[Any]:
    """The cases as pytest parameters, marked slow unless in `quick`."""
    quick = list(quick)
    marks = [[] if case in quick else [pytest.mark.slow] for case in cases]
    return [
        pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=mark)
        for case, mark in zip(cases, marks, strict=True)
    ]


def table(which: str, N: int) -> torch.Tensor:
    """float32 rows (N, 2) of the case `which`."""
    ascending = torch.arange(N)[:, None] * torch.tensor([1e-3, 0.0])
    return {
        "constant": torch.ones(N, 2),
        "two values": (torch.rand(N, 1) < 0.01) * torch.ones(2),
        "ascending": ascending,
        "descending": ascending.flip(0),
        "nan": torch.where(torch.rand(N, 1) < 0.95, torch.nan, torch.randn(N, 2)),
        "-inf": torch.where(torch.rand(N, 1) < 0.95, -torch.inf, torch.randn(N, 2)),
        "best last": torch.cat([torch.rand(N - 100, 2), 10 + torch.rand(100, 2)]),
    }[which]
