"""mips_topk on hypothesis problems: bit for bit against the oracle, and against itself."""

import math

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from mips_topk_cases import Problem, numbers, problems
from oracle import BACKENDS, KINDS, assert_same, expected, search

import grank_kernels as gk


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
    """The property that shards and chunks depend on."""
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
