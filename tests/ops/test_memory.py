"""Poisoned memory: an element that a kernel leaves unwritten is noticed."""

import pytest
import torch

import grank_kernels as gk
from grank_kernels.backends import cpu


def test_fresh_memory_is_poisoned() -> None:
    """Fresh memory from every allocation function of the backends."""
    q = torch.ones(2, 3)
    for fresh in (torch.empty(2, 3), torch.empty(2, 3, device="cpu"), torch.empty_like(q), q.new_empty(2, 3)):
        assert fresh.isnan().all()
    assert (torch.empty(4, dtype=torch.int64) == torch.iinfo(torch.int64).max).all()


@pytest.mark.skipif(cpu.unavailable() is not None, reason=str(cpu.unavailable()))
def test_a_kernel_that_writes_nothing_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    class Idle:
        @staticmethod
        def mips_topk(*_: object) -> None: ...

    queries, rows = torch.randn(2, 8), torch.randn(20, 8)
    monkeypatch.setattr(cpu, "_cpu", Idle)
    top = gk.mips_topk(queries, rows, 3, backend="cpu")
    assert top.values.isnan().all()
    assert (top.indices == torch.iinfo(torch.int64).max).all()
