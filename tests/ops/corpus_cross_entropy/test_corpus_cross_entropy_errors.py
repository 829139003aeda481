"""Errors of corpus_cross_entropy: the argument, what it must be, what it was."""

from typing import Any

import pytest
import torch

import grank_kernels as gk

GOOD: dict[str, Any] = {"users": torch.ones(3, 8), "items": torch.ones(5, 8), "targets": torch.tensor([0, -1, 4])}
OFFSETS, IDS = torch.tensor([0, 1, 2]), torch.tensor([0, 4])


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"users": torch.ones(3, 7)}, r"users must be \(R, 8\), the width of items, got \(3, 7\)"),
        ({"users": torch.ones(8)}, r"users must have 2 dimensions, got \(8,\)"),
        ({"users": torch.ones(3, 8).double()}, r"users must be .*, got torch.float64: users.to\(torch.float32\)"),
        ({"items": torch.ones(5, 8).half()}, r"items must be torch.float32, the dtype of users, got torch.float16"),
        ({"items": torch.ones(5, 8, device="meta")}, "items must be on cpu, the device of users, got meta"),
        ({"targets": torch.tensor([0, 1])}, r"targets must be \(R,\) = \(3,\), got \(2,\)"),
        ({"targets": torch.tensor([0, 1, 5])}, r"targets must lie in \[-1, 5\), -1 for none, got 5"),
        ({"targets": torch.tensor([0, 1, -2])}, r"targets must lie in \[-1, 5\), -1 for none, got -2"),
        ({"targets": torch.ones(3)}, "targets must be torch.int64, got torch.float32"),
        ({"bias": torch.ones(4)}, r"bias must be \(N,\) = \(5,\), got \(4,\)"),
        ({"exclude": torch.zeros(2, 1, dtype=torch.int64)}, r"exclude must be \(3, E\) for 3 users, got \(2, 1\)"),
        ({"exclude": torch.full((3, 1), 5)}, r"exclude must hold ids in \[-1, 5\), -1 for none, got 5"),
        ({"exclude": (OFFSETS, IDS)}, r"exclude's offsets must be \(4,\) for 3 users, got \(3,\)"),
        ({"exclude": (OFFSETS, IDS, torch.tensor([0, 1]))}, r"exclude's windows must be \(R,\) = \(3,\), got \(2,\)"),
        ({"exclude": (OFFSETS, IDS, torch.tensor([0, 1, 2]))}, r"exclude's windows must lie in \[0, 2\), got 2"),
        (
            {"exclude": (OFFSETS + 1, IDS, torch.tensor([0, 1, 1]))},
            "exclude's offsets must lie in .*, got 1 to 3",
        ),
        ({"backend": "cuda"}, "backend 'cuda' cannot run: it has no corpus_cross_entropy"),
        ({"backend": "none"}, "backend must be None, 'cpu', .*, got 'none'"),
    ],
)
def test_wrong_values(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        gk.corpus_cross_entropy(**(GOOD | changed))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"users": [[1.0]]}, "users must be a torch.Tensor or an array, got list"),
        ({"scale": "1"}, "scale must be a float, got str"),
    ],
)
def test_wrong_types(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        gk.corpus_cross_entropy(**(GOOD | changed))


def test_the_reference_runs_only_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    from grank_kernels.backends import cpu, reference

    def called(*_: Any) -> None:
        raise AssertionError("reference ran")

    monkeypatch.setattr(reference, "corpus_cross_entropy", called)
    monkeypatch.setattr(cpu, "corpus_cross_entropy_unsupported", lambda *_: "for a test", raising=False)
    assert gk.corpus_cross_entropy(**GOOD).shape == (3,)
