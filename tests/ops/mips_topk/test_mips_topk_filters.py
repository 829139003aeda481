"""Filters of mips_topk: excluded ids and allowed rows."""

from typing import Any

import numpy as np
import pytest
import torch
from oracle import (
    assert_same,
    check,
    expected,
    search,
)

import grank_kernels as gk


def padded(lists: list[list[int]], extra: int = 2) -> torch.Tensor:
    width = max(map(len, lists)) + extra
    return torch.tensor([ids + [-1] * (width - len(ids)) for ids in lists])


def ragged(lists: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """(offsets, ids), with ids of no query before and after."""
    offsets = np.cumsum([3, *map(len, lists)])
    return torch.from_numpy(offsets), torch.tensor([0, 0, 0, *(i for ids in lists for i in ids), 0, 0])


@pytest.mark.parametrize("form", [padded, ragged])
@pytest.mark.parametrize("external", [False, True])
def test_exclude(form: Any, external: bool, kind: str, backend: str) -> None:
    B, N, d, k = 8, 700, 20, 40
    queries, rows = torch.randn(B, d), torch.randn(N, d)
    ids = torch.randperm(10**6)[:N] * 10**12 if external else None
    top = search(queries, rows, N, kind=kind, backend=backend, ids=ids).indices.tolist()
    lists = [top[0][:50], [], top[2][:1] * 3, top[3][39:41], top[4][::2], top[5], top[6][5:], [-1, top[7][0], -1]]
    got = check(queries, rows, k, kind=kind, backend=backend, ids=ids, exclude=form(lists))
    assert got.indices[0].tolist() == top[0][50:90]
    assert got.indices[5].tolist() == [-1] * k
    assert got.indices[6].tolist() == top[6][:5] + [-1] * 35


def as_lists(lists: list[list[int]]) -> list[Any]:
    """A list with one entry per query: list, tuple, tensor and NumPy array in turn."""
    forms = (list, tuple, torch.tensor, np.array)
    return [forms[b % 4](ids) if ids else [] for b, ids in enumerate(lists)]


@pytest.mark.parametrize("B", [1, 2, 7])
def test_exclude_as_a_list_has_one_entry_per_query(B: int, backend: str) -> None:
    """Two queries included, although a tuple of two tensors means (offsets, ids)."""
    queries, rows = torch.randn(B, 6), torch.randn(70, 6)
    lists = [torch.randint(-1, 70, (b % 4,)).tolist() for b in range(1, B + 1)]
    want = gk.mips_topk(queries, rows, 20, exclude=padded(lists), backend=backend)
    assert_same(gk.mips_topk(queries, rows, 20, exclude=as_lists(lists), backend=backend), want)
    assert_same(
        gk.mips_topk(queries, rows, 20, exclude=[torch.tensor(x, dtype=torch.int64) for x in lists], backend=backend),
        want,
    )


def test_exclude_as_a_list_for_one_query(backend: str) -> None:
    query, rows = torch.randn(6), torch.randn(70, 6)
    want = gk.mips_topk(query, rows, 20, exclude=torch.tensor([3, 4]), backend=backend)
    assert_same(gk.mips_topk(query, rows, 20, exclude=[[3, 4]], backend=backend), want)


def test_exclude_of_nothing(kind: str, backend: str) -> None:
    queries, rows = torch.randn(3, 6), torch.randn(70, 6)
    plain = search(queries, rows, 5, kind=kind, backend=backend)
    for exclude in (
        torch.full((3, 4), -1),
        torch.empty(3, 0, dtype=torch.int64),
        (torch.zeros(4, dtype=torch.int64), torch.empty(0, dtype=torch.int64)),
    ):
        assert_same(search(queries, rows, 5, kind=kind, backend=backend, exclude=exclude), plain)


def test_exclude_ids_missing_from_the_table(kind: str, backend: str) -> None:
    queries, rows, ids = torch.randn(2, 6), torch.randn(70, 6), torch.arange(70) * 3 + 5
    plain = search(queries, rows, 5, kind=kind, backend=backend, ids=ids)
    foreign = torch.tensor([[0, 4, 6, 213, 2**62], [7, -1, 70, 1, 2]])
    assert_same(search(queries, rows, 5, kind=kind, backend=backend, ids=ids, exclude=foreign), plain)


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.99, 1.0])
@pytest.mark.parametrize("per_query", [False, True])
def test_allow(share: float, per_query: bool, kind: str, backend: str) -> None:
    B, N, d = 7, 3000, 12
    allow = torch.rand((B, N) if per_query else (N,)) < share
    check(torch.randn(B, d), torch.randn(N, d), 60, kind=kind, backend=backend, allow=allow)


@pytest.mark.parametrize("per_query", [False, True])
def test_all_filters(per_query: bool, kind: str, backend: str) -> None:
    B, N, d = 7, 2500, 12
    ids = torch.randperm(N) + 7
    exclude = (torch.arange(B + 1) * 300, torch.randint(0, N + 20, (B * 300,)))
    allow = torch.rand((B, N) if per_query else (N,)) < 0.3
    more = {"ids": ids, "exclude": exclude, "allow": allow}
    check(torch.randn(B, d), torch.randn(N, d), 700, kind=kind, backend=backend, **more)


def test_filters_of_any_stride(kind: str, backend: str) -> None:
    B, N = 6, 200
    queries, rows = torch.randn(B, 10), torch.randn(N, 10)
    masks = {
        "transposed": (torch.rand(N, B) < 0.4).T,
        "columns": (torch.rand(B, 2 * N) < 0.4)[:, ::2],
        "rows": (torch.rand(2 * B, N + 9) < 0.4)[1::2, 4 : N + 4],
        "one for all": (torch.rand(1, N) < 0.4).expand(B, N),
        "one value a query": (torch.rand(B, 1) < 0.5).expand(B, N),
        "strided": (torch.rand(3 * N) < 0.4)[2::3],
        "one value": torch.ones(1, dtype=torch.bool).expand(N),
    }
    for name, allow in masks.items():
        got = search(queries, rows, 30, kind=kind, backend=backend, allow=allow)
        assert_same(got, expected(queries, rows, 30, kind=kind, backend=backend, allow=allow), name)
    lists = {
        "transposed": torch.randint(-1, N, (9, B)).T,
        "columns": torch.randint(-1, N, (B, 18))[:, 1::2],
        "one for all": torch.randint(-1, N, (1, 9)).expand(B, 9),
    }
    for name, exclude in lists.items():
        got = search(queries, rows, 30, kind=kind, backend=backend, exclude=exclude)
        assert_same(got, expected(queries, rows, 30, kind=kind, backend=backend, exclude=exclude), name)
    offsets, ids = torch.arange(0, 2 * B + 2).repeat_interleave(2)[::4], torch.randint(0, N, (60,))[::3]
    got = search(queries, rows, 30, kind=kind, backend=backend, exclude=(offsets, ids))
    assert_same(got, expected(queries, rows, 30, kind=kind, backend=backend, exclude=(offsets, ids)), "pair")
