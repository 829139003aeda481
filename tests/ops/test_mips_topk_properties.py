"""mips_topk on whatever hypothesis comes up with: against the oracle bit for bit, and against itself."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from oracle import BACKENDS, KINDS, assert_same, expected, search

import grank_kernels as gk

HOSTILE = [
    0.0, -0.0, 1.0, -1.0, math.inf, -math.inf, math.nan, 1e-45, -1e-45, 1.1754944e-38, 1.1754942e-38, 3.4028235e38,
    -3.4028235e38, 1.8446744e19, 1e-23, 65504.0, 65520.0, 6e-8, 5.9e-8, 1 / 3, 127.0, 0.5, 1.5, 16777216.0, 16777217.0,
]  # fmt: skip
numbers = st.one_of(st.sampled_from(HOSTILE), st.floats(width=32), st.floats(-4, 4, width=32))


@dataclass
class Problem:
    queries: torch.Tensor
    rows: torch.Tensor
    k: int
    kind: str
    filters: dict[str, Any]


def fill(draw: st.DrawFn, shape: tuple[int, int], finite: bool = False) -> torch.Tensor:
    """Numbers of a small pool, in an order drawn by seed: mostly hostile, or a few of them among ordinary ones."""
    pool = np.array(draw(st.lists(numbers, min_size=1, max_size=8)), np.float32)
    if finite:
        pool = np.nan_to_num(pool, nan=1.0)  # infinities become the largest numbers
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    chosen = pool[random.integers(0, len(pool), shape)]
    ordinary = random.standard_normal(shape).astype(np.float32)
    share = draw(st.sampled_from([0.0, 0.01, 0.3, 1.0]))
    return torch.from_numpy(np.where(random.random(shape) < share, chosen, ordinary))


@st.composite
def problems(draw: st.DrawFn, kinds: tuple[str, ...] = KINDS) -> Problem:
    kind = draw(st.sampled_from(kinds))
    B, d = draw(st.integers(0, 9)), draw(st.one_of(st.integers(0, 20), st.sampled_from([127, 128, 129, 140])))
    N = draw(st.one_of(st.integers(0, 140), st.sampled_from([2047, 2049])))
    k = draw(st.one_of(st.integers(1, 20), st.integers(1, N + 3)))
    queries = fill(draw, (B, d))
    if draw(st.booleans()):
        queries = queries.to(draw(st.sampled_from([torch.float16, torch.bfloat16])))
    rows = fill(draw, (N, d), finite=kind == "int8")
    if draw(st.booleans()) and N > 0:  # rows that are equal
        rows = rows[torch.randint(0, min(N, 5), (N,), generator=torch.Generator().manual_seed(B))]
    filters: dict[str, Any] = {}
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    ids = np.arange(N)
    if draw(st.booleans()):
        ids = random.permutation(3 * N + 1)[:N] + draw(st.sampled_from([0, 2**33, 2**62]))
        filters["ids"] = torch.from_numpy(ids)
    if draw(st.booleans()):
        shape = draw(st.sampled_from([(N,), (B, N)]))
        filters["allow"] = torch.from_numpy(random.random(shape) < draw(st.sampled_from([0.0, 0.05, 0.5, 1.0])))
    if draw(st.booleans()):
        count = draw(st.integers(0, 12))
        excluded = ids[random.integers(0, N, B * count)] if N > 0 else np.full(B * count, -1)
        excluded = torch.from_numpy(np.where(random.random(B * count) < 0.1, -1, excluded).astype(np.int64))
        padded = excluded.reshape(B, count)
        filters["exclude"] = padded if draw(st.booleans()) else (torch.arange(B + 1) * count, excluded)
    return Problem(queries, rows, k, kind, filters)


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=200)
@given(problem=problems())
def test_every_bit(backend: str, problem: Problem) -> None:
    p = problem
    got = search(p.queries, p.rows, p.k, kind=p.kind, backend=backend, **p.filters)
    assert_same(got, expected(p.queries, p.rows, p.k, kind=p.kind, backend=backend, **p.filters))


def of_one(kind: str, query: float, row: float) -> Problem:
    q, x = (torch.from_numpy(np.array([[number]], np.float32)) for number in (query, row))
    return Problem(q, x, 2, kind, {})


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=300)
@given(kind=st.sampled_from(KINDS), query=numbers, row=numbers)
@example(kind="float32", query=1e-45, row=0.5)
@example(kind="float16", query=1.0, row=65520.0)
@example(kind="bfloat16", query=1.0, row=3.4028235e38)
@example(kind="int8", query=math.nan, row=1.0)
@example(kind="int8", query=3e38, row=3e38)
@example(kind="int8", query=1e-45, row=1e-45)
def test_every_product(backend: str, kind: str, query: float, row: float) -> None:
    if kind == "int8" and not math.isfinite(row):
        row = 1.0
    p = of_one(kind, query, row)
    got = search(p.queries, p.rows, p.k, kind=kind, backend=backend)
    assert_same(got, expected(p.queries, p.rows, p.k, kind=kind, backend=backend))


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=60)
@given(problem=problems(), seed=st.integers(0, 2**32 - 1))
def test_the_order_of_the_rows_does_not_matter(backend: str, problem: Problem, seed: int) -> None:
    p = problem
    ids = p.filters.pop("ids", torch.arange(len(p.rows)))
    order = torch.randperm(len(p.rows), generator=torch.Generator().manual_seed(seed))
    one = search(p.queries, p.rows, p.k, kind=p.kind, backend=backend, ids=ids, **p.filters)
    if "allow" in p.filters:
        p.filters["allow"] = p.filters["allow"][..., order]
    two = search(p.queries, p.rows[order], p.k, kind=p.kind, backend=backend, ids=ids[order], **p.filters)
    assert_same(two, one)


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=60)
@given(problem=problems(), data=st.data())
def test_tables_in_parts_merge_to_the_whole(backend: str, problem: Problem, data: st.DataObject) -> None:
    """What shards and chunks rest on."""
    p = problem
    ids = p.filters.pop("ids", torch.arange(len(p.rows)))
    allow = p.filters.pop("allow", torch.ones(len(p.rows), dtype=torch.bool))
    cut = data.draw(st.integers(0, len(p.rows)))
    parts = [
        search(
            p.queries,
            p.rows[part],
            p.k,
            kind=p.kind,
            backend=backend,
            ids=ids[part],
            allow=allow[..., part],
            **p.filters,
        )
        for part in (slice(cut), slice(cut, None))
    ]
    values, found = (torch.cat(pair, 1) for pair in zip(*parts, strict=True))
    filler = found < 0
    by_id = found.masked_fill(filler, torch.iinfo(torch.int64).max).argsort(dim=1, stable=True)
    order = by_id.gather(1, values.gather(1, by_id).argsort(dim=1, descending=True, stable=True))[:, : p.k]
    whole = search(p.queries, p.rows, p.k, kind=p.kind, backend=backend, ids=ids, allow=allow, **p.filters)
    assert_same(gk.TopK(values.gather(1, order), found.gather(1, order)), whole)
