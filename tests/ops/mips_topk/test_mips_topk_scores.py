"""Scores of mips_topk: every bit against the oracle; a score depends on its query and row only."""

import math
import random

import numpy as np
import pytest
import torch
from oracle import (
    BACKENDS,
    KINDS,
    assert_same,
    check,
    fused,
    integers,
    items_of,
    scores,
    search,
)

import grank_kernels as gk

FLOATS = KINDS[:3]
INF = math.inf


# ---- bits ----


WIDTHS = [1, 3, 8, 16, 31, 50, 64, 96, 128, 129, 200, 256, 257, 300, 1000]
COUNTS = [1, 2, 15, 16, 17, 63, 64, 65, 127, 128, 129, 777, 2047, 2048, 2049, 2112, 4097]  # a tile is 64, a step 2048
BATCHES = [*range(1, 14), 18, 33]
KS = [1, 2, 7, 31, 64, 100, 255, 256, 257, 700, 5000]


def shapes() -> list[tuple[int, int, int, int]]:
    """(B, N, d, k): every count, width and k twice, in random combinations."""
    draw = random.Random(1)
    found = []
    for _ in range(2):
        sizes = [draw.sample(x, len(x)) for x in (BATCHES, COUNTS, WIDTHS, KS)]
        for i in range(max(map(len, sizes))):
            B, N, d, k = (x[i % len(x)] for x in sizes)
            found.append((max(1, min(B, 2_000_000 // (N * d))), N, d, k))
    queries_of_a_step = 528
    found += [(queries_of_a_step + 1, 130, 8, 3), (2 * queries_of_a_step + 3, 65, 5, 70)]
    found += [(2, 20000, 8, 10), (7, 16384, 3, 300), (1, 40000, 16, 1000)]  # thresholds from a sample
    return found


def name_of(shape: tuple[int, ...]) -> str:
    return "B{}-N{}-d{}-k{}".format(*shape)


@pytest.mark.parametrize("shape", shapes(), ids=name_of)
def test_bits(shape: tuple[int, int, int, int], kind: str, backend: str) -> None:
    B, N, d, k = shape
    check(torch.randn(B, d), torch.randn(N, d), k, kind=kind, backend=backend)


@pytest.mark.parametrize("shape", shapes()[::3], ids=name_of)
def test_integers_are_exact(shape: tuple[int, int, int, int], kind: str, backend: str) -> None:
    B, N, d, k = shape
    if kind == "int8":  # 127 in every row makes the scale 1
        queries, rows = integers(B, d, most=127), integers(N, d, most=127)
    else:
        queries, rows = integers(B, d), integers(N, d)
    products = queries.double() @ rows.double().T
    want = torch.sort(products, dim=1, descending=True, stable=True)
    got = search(queries, rows, k, kind=kind, backend=backend)
    n = min(k, N)
    assert torch.equal(got.indices[:, :n], want.indices[:, :n])
    assert torch.equal(got.values[:, :n].double(), want.values[:, :n])
    assert torch.all(got.indices[:, n:] == -1)
    assert torch.all(got.values[:, n:] == -INF)


# ---- meaning ----


def assert_meaning(got: gk.TopK, products: torch.Tensor, error: float) -> None:
    """Checks against float64: distinct ids in range, order, each row's own score, the j-th best at place j."""
    N = products.shape[1]
    n = min(got.values.shape[1], N)
    values, ids = got.values[:, :n].double(), got.indices[:, :n]
    assert torch.all((ids >= 0) & (ids < N))
    assert all(len(set(row)) == n for row in ids.tolist())
    falls = values[:, :-1] > values[:, 1:]
    ties = (values[:, :-1] == values[:, 1:]) & (ids[:, :-1] < ids[:, 1:])
    assert torch.all(falls | ties)
    assert (values - products.gather(1, ids)).abs().max() <= error
    assert (values - products.sort(dim=1, descending=True).values[:, :n]).abs().max() <= error


@pytest.mark.parametrize("d", WIDTHS)
@pytest.mark.parametrize("kind", FLOATS)
def test_error_is_at_most_twice_that_of_torch(d: int, kind: str, backend: str) -> None:
    dtype = getattr(torch, kind)
    queries, rows = torch.randn(9, d).to(dtype), torch.randn(1500, d).to(dtype)
    products = queries.double() @ rows.double().T
    lost = float((queries.float() @ rows.float().T - products).abs().max())
    # Twice the error of torch, and one rounding of the largest sum, since narrow products may be exact by chance.
    rounding = 2**-24 * float((queries.double().abs() @ rows.double().abs().T).max())
    assert_meaning(search(queries, rows, 120, kind=kind, backend=backend), products, 2 * lost + rounding)


@pytest.mark.parametrize("d", WIDTHS)
def test_int8_error_is_half_a_step_per_number(d: int, backend: str) -> None:
    queries, rows = torch.randn(9, d), torch.randn(1500, d)
    q_step, x_step = (x.double().abs().amax(1) / 127 for x in (queries, rows))
    error = queries.double().abs().sum(1)[:, None] * x_step / 2 + rows.double().abs().sum(1) * q_step[:, None] / 2
    error = error + d * q_step[:, None] * x_step / 4
    got = search(queries, rows, 120, kind="int8", backend=backend)
    off = (got.values.double() - (queries.double() @ rows.double().T).gather(1, got.indices)).abs()
    assert torch.all(off <= error.gather(1, got.indices) * (1 + 1e-6))


@pytest.mark.parametrize("query_dtype", FLOATS)
def test_query_dtypes(query_dtype: str, kind: str, backend: str) -> None:
    queries = torch.randn(5, 40).to(getattr(torch, query_dtype))
    check(queries, torch.randn(300, 40), 20, kind=kind, backend=backend)


def test_one_query(kind: str, backend: str) -> None:
    queries, rows = torch.randn(3, 24), torch.randn(500, 24)
    excluded = torch.tensor([3, 499, -1])
    whole = search(queries, rows, 9, kind=kind, backend=backend, exclude=excluded.expand(3, -1))
    for exclude in (excluded, excluded[None], (torch.tensor([0, 3]), excluded)):
        one = search(queries[1], rows, 9, kind=kind, backend=backend, exclude=exclude)
        assert one.values.shape == (9,)
        assert_same(one, gk.TopK(whole.values[1], whole.indices[1]))
    allow = torch.rand(500) < 0.5
    one = search(queries[1], rows, 9, kind=kind, backend=backend, allow=allow)
    want = search(queries, rows, 9, kind=kind, backend=backend, allow=allow)
    assert_same(one, gk.TopK(want.values[1], want.indices[1]))


def test_default_backend_is_the_fastest() -> None:
    queries, rows = torch.randn(3, 24), torch.randn(500, 24)
    assert_same(gk.mips_topk(queries, rows, 9), check(queries, rows, 9, kind="float32", backend="cpu"))


def test_drop_in(backend: str) -> None:
    queries, rows = torch.randn(4, 33), torch.randn(2000, 33)
    want, got = torch.topk(queries @ rows.T, 12), gk.mips_topk(queries, rows, 12, backend=backend)
    values, indices = got
    assert values is got.values
    assert indices is got.indices
    assert got._fields == ("values", "indices")
    assert torch.equal(got.indices, want.indices)
    torch.testing.assert_close(got.values, want.values)


# ---- a score depends on its query and its row only ----


@pytest.mark.parametrize("d", [3, 96, 300])
def test_batch_invariant(d: int, kind: str, backend: str) -> None:
    queries, items = torch.randn(20, d), items_of(torch.randn(1000, d), kind)
    whole = gk.mips_topk(queries, items, 40, backend=backend)
    for b in range(20):
        alone = gk.mips_topk(queries[b], items, 40, backend=backend)
        assert_same(alone, gk.TopK(whole.values[b], whole.indices[b]), f"query {b}")
    for B in range(2, 20):
        some = gk.mips_topk(queries[20 - B :], items, 40, backend=backend)
        assert_same(some, gk.TopK(whole.values[20 - B :], whole.indices[20 - B :]), f"B = {B}")
    for k in (1, 5, 39):
        some = gk.mips_topk(queries, items, k, backend=backend)
        assert_same(some, gk.TopK(whole.values[:, :k], whole.indices[:, :k]), f"k = {k}")


@pytest.mark.parametrize("shift", [1, 63, 64, 777, 2048])
def test_position_invariant(shift: int, kind: str, backend: str) -> None:
    queries, rows = torch.randn(6, 50), torch.randn(1000, 50)
    want = search(queries, rows, 30, kind=kind, backend=backend)
    low = queries.sum(0, keepdim=True) * 0  # scores 0, below the best 30 of 1000
    moved = search(queries, torch.cat([low.expand(shift, -1), rows, low]), 30, kind=kind, backend=backend)
    assert_same(gk.TopK(moved.values, moved.indices - shift), want)


def test_listed_rows_score_as_a_scan_does(kind: str, backend: str) -> None:
    N = 2500
    queries, rows = torch.randn(7, 77), torch.randn(N, 77)
    want = search(queries, rows, N, kind=kind, backend=backend)
    score = torch.empty(7, N).scatter_(1, want.indices, want.values)
    masks = (torch.rand(N) < 0.1, torch.rand(7, N) < 0.1, torch.rand(7, N) < 0.02, torch.arange(N) % 65 == 0)
    for allow in masks:
        got = search(queries, rows, N, kind=kind, backend=backend, allow=allow)
        count = allow.sum(-1).expand(7)
        for b in range(7):
            n = int(count[b])
            assert torch.equal(got.values[b, :n], score[b, got.indices[b, :n]])
            assert torch.equal(
                got.indices[b, :n].sort().values, (allow if allow.dim() == 1 else allow[b]).nonzero()[:, 0]
            )


def test_two_halves_score_as_one_table(kind: str, backend: str) -> None:
    queries, rows = torch.randn(9, 31), torch.randn(4000, 31)
    want = search(queries, rows, 25, kind=kind, backend=backend)
    parts = [search(queries, part, 25, kind=kind, backend=backend) for part in rows.split(1234)]
    values = torch.cat([part.values for part in parts], 1)
    indices = torch.cat([part.indices + 1234 * i for i, part in enumerate(parts)], 1)
    best = values.sort(dim=1, descending=True, stable=True)
    assert_same(gk.TopK(best.values[:, :25], indices.gather(1, best.indices)[:, :25]), want)


def test_backends_agree_where_arithmetic_is_exact() -> None:
    queries, rows = torch.randn(9, 200), torch.randn(3000, 200)
    int8 = [search(queries, rows, 100, kind="int8", backend=backend) for backend in BACKENDS]
    assert_same(int8[0], int8[1], "int8")
    queries, rows = integers(9, 200), integers(3000, 200)
    whole = [search(queries, rows, 100, kind=kind, backend=backend) for kind in FLOATS for backend in BACKENDS]
    for other in whole[1:]:
        assert_same(other, whole[0])


def test_the_oracle_distinguishes_one_rounding_from_two() -> None:
    """The tests of bits can tell fused from unfused arithmetic."""
    queries, rows = torch.randn(4, 64), torch.randn(400, 64)
    if fused("cpu"):
        once, twice = (scores(queries, rows, "float32", backend) for backend in ("cpu", "reference"))
        assert (once != twice).mean() > 0.3
        assert np.abs(once - twice).max() < 1e-4
