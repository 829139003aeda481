"""Errors of sample_negatives, opcheck, torch.compile and derivatives."""

from typing import Any

import pytest
import torch

import grank_kernels as gk

pytestmark = pytest.mark.usefixtures("one_thread")
GOOD: dict[str, Any] = {"users": torch.randn(3, 8), "items": torch.randn(5, 8), "m": 2, "seed": 0}


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"users": torch.ones(3, 7)}, ValueError, r"users must be \(R, 8\), the width of items, got \(3, 7\)"),
        ({"m": 0}, ValueError, "m must be 1 or more, got 0"),
        ({"m": 1.0}, TypeError, "m must be an int, got float"),
        ({"seed": -1}, ValueError, "seed must be 0 or more, got -1"),
        ({"seed": 1 << 63}, ValueError, r"seed must be below 2\^63"),
        ({"scale": None}, TypeError, "scale must be a float, got NoneType"),
        ({"exclude": torch.full((3, 1), 5)}, ValueError, r"exclude must hold ids in \[-1, 5\), -1 for none, got 5"),
        ({"backend": "cuda"}, ValueError, "backend 'cuda' cannot run: it has no sample_negatives"),
    ],
)
def test_errors(changed: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        gk.sample_negatives(**(GOOD | changed))


def test_opcheck(backend: str) -> None:
    exclude = (torch.tensor([0, 1]), torch.tensor([2]), torch.tensor([0, 0, 0]))
    arguments = (GOOD["users"], GOOD["items"], 3, *exclude, 0.5, 4, backend)
    torch.library.opcheck(torch.ops.grank.sample_negatives.default, arguments)


def test_compile(backend: str) -> None:
    def sample(users: torch.Tensor, items: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return gk.sample_negatives(users * 2, items, 3, seed=4, backend=backend)

    compiled = torch.compile(sample, fullgraph=True, backend="aot_eager")
    for x, y in zip(compiled(GOOD["users"], GOOD["items"]), sample(GOOD["users"], GOOD["items"]), strict=True):
        assert torch.equal(x, y)


def test_no_gradient(backend: str) -> None:
    _, log_q = gk.sample_negatives(GOOD["users"].requires_grad_(), GOOD["items"], 3, seed=4, backend=backend)
    assert not log_q.requires_grad
