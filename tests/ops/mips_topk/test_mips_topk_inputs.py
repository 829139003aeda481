"""Inputs of mips_topk: memory layouts, `out`, modes of torch."""

import math

import pytest
import torch
from oracle import (
    KINDS,
    assert_same,
    expected,
    items_of,
    search,
)

import grank_kernels as gk

FLOATS = KINDS[:3]


# ---- layouts ----


def guarded(rows: torch.Tensor, before: int, after: int) -> torch.Tensor:
    """Equal rows with NaN on both sides."""
    wide = torch.full((len(rows), before + rows.shape[1] + after), math.nan, dtype=rows.dtype)
    inner = wide[:, before : before + rows.shape[1]]
    inner.copy_(rows)
    return inner


@pytest.mark.parametrize("kind", FLOATS)
@pytest.mark.parametrize("d", [1, 7, 8, 13, 64])
def test_layouts(d: int, kind: str, backend: str) -> None:
    dtype = getattr(torch, kind)
    queries, rows = torch.randn(5, d).to(dtype), torch.randn(150, d).to(dtype)
    want = expected(queries, rows, 20, kind=kind, backend=backend)
    queries_too = {
        "guarded": guarded(queries, 1, 2),
        "transposed": queries.T.contiguous().T,
        "strided": queries.repeat_interleave(3, 1)[:, ::3],
    }
    rows_too = {
        "guarded": guarded(rows, 1, 2),
        "column": guarded(rows, 0, 1),
        "transposed": rows.T.contiguous().T,
        "strided": rows.repeat_interleave(3, 1)[:, ::3],
        "every other row": rows.repeat_interleave(2, 0)[::2],
        "offset": torch.cat([torch.full((3, d), math.nan, dtype=dtype), rows])[3:],
    }
    for name, same in rows_too.items():
        assert_same(gk.mips_topk(queries, same, 20, backend=backend), want, name)
    for name, same in queries_too.items():
        assert_same(gk.mips_topk(same, rows, 20, backend=backend), want, name)
    for name, same in (
        ("one row for all", rows[:1].expand(150, -1)),
        ("overlapping rows", rows.reshape(-1)[: 100 + d].unfold(0, d, 1) if d < 50 else rows),
        ("one number for all", rows[:1, :1].expand(150, d)),
    ):
        got = gk.mips_topk(queries, same, 20, backend=backend)
        assert_same(got, expected(queries, same, 20, kind=kind, backend=backend), name)
    one = gk.mips_topk(queries[:1].expand(5, -1), rows, 20, backend=backend)
    assert torch.equal(one.indices, want.indices[:1].expand(5, -1))


def test_inputs_are_not_modified(kind: str, backend: str) -> None:
    queries, rows = torch.randn(4, 9), torch.randn(80, 9)
    exclude, allow = torch.randint(-1, 80, (4, 6)), torch.rand(4, 80) < 0.5
    given = (queries, rows, exclude, allow)
    before = [x.clone() for x in given]
    search(queries, rows, 5, kind=kind, backend=backend, exclude=exclude, allow=allow)
    assert all(torch.equal(x, y) for x, y in zip(given, before, strict=True))


def test_out(kind: str, backend: str) -> None:
    queries, items = torch.randn(4, 9), items_of(torch.randn(80, 9), kind)
    want = gk.mips_topk(queries, items, 5, backend=backend)
    values, indices = torch.full((4, 5), math.nan), torch.full((4, 5), -7)
    got = gk.mips_topk(queries, items, 5, backend=backend, out=(values, indices))
    assert got.values is values
    assert got.indices is indices
    assert_same(got, want)
    wide, wide_ids = torch.full((4, 12), math.nan), torch.full((4, 12), -7)
    gk.mips_topk(queries, items, 5, backend=backend, out=(wide[:, 2:7], wide_ids[:, 2:7]))
    assert_same(gk.TopK(wide[:, 2:7].contiguous(), wide_ids[:, 2:7].contiguous()), want)
    assert wide[:, :2].isnan().all()
    assert wide[:, 7:].isnan().all()
    one = (torch.empty(5), torch.empty(5, dtype=torch.int64))
    gk.mips_topk(queries[2], items, 5, backend=backend, out=one)
    assert_same(gk.TopK(*one), gk.TopK(want.values[2], want.indices[2]))


# ---- global modes of torch ----


def test_default_dtype(kind: str, backend: str) -> None:
    queries, rows = torch.randn(3, 9), torch.randn(80, 9)
    want = search(queries, rows, 5, kind=kind, backend=backend)
    torch.set_default_dtype(torch.float64)
    try:
        got = search(queries, rows, 5, kind=kind, backend=backend)
    finally:
        torch.set_default_dtype(torch.float32)
    assert_same(got, want)


def test_default_device(kind: str, backend: str) -> None:
    queries, rows, exclude = torch.randn(3, 9), torch.randn(80, 9), torch.randint(-1, 80, (3, 4))
    want = search(queries, rows, 5, kind=kind, backend=backend, exclude=exclude)
    with torch.device("meta"):
        got = search(queries, rows, 5, kind=kind, backend=backend, exclude=exclude)
    assert_same(got, want)


def test_tensors_with_a_lazy_negation(backend: str) -> None:
    """The imaginary part of a conjugate: a float32 tensor with negated memory."""
    queries, rows = torch.randn(3, 9), torch.randn(80, 9)
    want = gk.mips_topk(queries, rows, 5, backend=backend)
    negated, negated_rows = (torch.complex(x, -x).conj().imag for x in (queries, rows))
    assert negated.is_neg()
    assert torch.equal(negated, queries)
    assert_same(gk.mips_topk(negated, rows, 5, backend=backend), want, "queries")
    assert_same(gk.mips_topk(queries, negated_rows, 5, backend=backend), want, "items")
    assert_same(gk.mips_topk(negated.contiguous(), torch._neg_view(-rows), 5, backend=backend), want, "contiguous")


def test_modes_of_torch(kind: str, backend: str) -> None:
    queries, rows = torch.randn(2, 9), torch.randn(80, 9)
    want = search(queries, rows, 5, kind=kind, backend=backend)
    with torch.inference_mode():
        assert_same(search(queries, rows, 5, kind=kind, backend=backend), want, "inference mode")
    with torch.no_grad():
        learnt = queries.clone().requires_grad_()
        got = search(learnt, rows, 5, kind=kind, backend=backend)
        assert not got.values.requires_grad
        assert_same(got, want, "no grad")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_same(search(queries, rows, 5, kind=kind, backend=backend), want, "autocast")


def test_meta_tensors() -> None:
    """Meta tensors give shapes and dtypes without a search."""
    queries, rows = torch.empty(3, 8, device="meta"), torch.empty(50, 8, device="meta", dtype=torch.float16)
    exclude = torch.empty(3, 2, dtype=torch.int64, device="meta")
    got = gk.mips_topk(queries, rows, 70, exclude=exclude)
    assert (got.values.shape, got.values.dtype, got.values.device.type) == ((3, 70), torch.float32, "meta")
    assert (got.indices.shape, got.indices.dtype, got.indices.device.type) == ((3, 70), torch.int64, "meta")
