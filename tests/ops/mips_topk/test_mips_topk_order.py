"""Order of mips_topk's results: ties, orders of the table, NaN, infinities, denormals, degenerate shapes."""

import math

import pytest
import torch
from oracle import (
    KINDS,
    check,
)

FLOATS = KINDS[:3]
INF = math.inf


# ---- order ----


@pytest.mark.parametrize("distinct", [1, 2, 40])
def test_ties_by_index(distinct: int, kind: str, backend: str) -> None:
    rows = torch.randn(distinct, 9)[torch.randint(0, distinct, (3000,))]
    check(torch.randn(8, 9), rows, 500, kind=kind, backend=backend)


@pytest.mark.parametrize("distinct", [1, 2, 40])
def test_ties_by_external_id(distinct: int, kind: str, backend: str) -> None:
    rows = torch.randn(distinct, 9)[torch.randint(0, distinct, (3000,))]
    for ids in (torch.arange(3000).flip(0), torch.randperm(3000) + 2**40):
        check(torch.randn(8, 9), rows, 500, kind=kind, backend=backend, ids=ids)


@pytest.mark.parametrize("order", ["ascending", "descending", "best last", "best first", "alternating"])
def test_orders_of_the_table(order: str, kind: str, backend: str) -> None:
    rows, query = torch.randn(17000, 4), torch.randn(2, 4)
    by_score = (rows @ query[0]).argsort()
    places = {
        "ascending": by_score,
        "descending": by_score.flip(0),
        "best last": torch.cat([by_score[torch.randperm(16900)], by_score[16900:]]),
        "best first": torch.cat([by_score[16900:], by_score[torch.randperm(16900)]]),
        "alternating": torch.stack([by_score[:8500], by_score[8500:].flip(0)], 1).reshape(-1),
    }
    check(query, rows[places[order]], 90, kind=kind, backend=backend)


def test_zero_has_no_sign(kind: str, backend: str) -> None:
    queries = torch.tensor([[1.0, 0.0], [-1.0, -0.0], [0.0, -0.0]])
    rows = torch.tensor([[0.0, 1.0], [-0.0, 1.0], [0.0, -1.0], [-0.0, -0.0], [1e-38, 0.0]])
    got = check(queries, rows, 5, kind=kind, backend=backend)
    assert got.indices[2].tolist() == [0, 1, 2, 3, 4]
    assert torch.equal(got.values[2].view(torch.int32), torch.zeros(5, dtype=torch.int32))


# ---- NaN, infinities, denormals ----


@pytest.mark.parametrize("kind", FLOATS)
def test_nan_is_never_returned(kind: str, backend: str) -> None:
    queries, rows = torch.randn(3, 5), torch.randn(200, 5)
    rows[::3] = math.nan
    rows[1, 4] = math.nan
    rows[2] = torch.tensor([INF, -INF, 0, 0, 0])  # NaN or infinity, depending on the signs of the query
    queries[0, :2] = 1.0
    got = check(queries, rows, 200, kind=kind, backend=backend)
    assert not got.values.isnan().any()
    assert not torch.isin(got.indices, torch.arange(0, 200, 3)).any()
    assert 2 not in got.indices[0]
    queries[1, 0] = math.nan
    got = check(queries, rows, 200, kind=kind, backend=backend)
    assert got.indices[1].tolist() == [-1] * 200
    assert got.values[1].tolist() == [-INF] * 200


@pytest.mark.parametrize("bad", [math.nan, INF, -INF])
def test_int8_query_that_cannot_be_quantised(bad: float, backend: str) -> None:
    queries = torch.randn(8, 5)
    queries[3, 2] = bad
    got = check(queries, torch.randn(100, 5), 7, kind="int8", backend=backend)
    assert got.indices[3].tolist() == [-1] * 7


def test_int8_scales_whose_product_overflows(backend: str) -> None:
    queries = torch.tensor([[3e38, 3e38], [3e38, -3e38], [1.0, 1.0]])
    rows = torch.tensor([[1e38, -1e38], [1e38, 1e38], [-1e38, -1e38], [1.0, 1.0], [-1.0, 1.0], [0.0, 0.0]])
    got = check(queries, rows, 6, kind="int8", backend=backend)
    assert not got.values.isnan().any()
    assert got.indices[0].tolist() == [1, 3, 4, 5, 2, -1]  # 0 * inf is NaN
    assert got.values[0, 0] == INF
    assert got.values[0, 4] == -INF


@pytest.mark.parametrize("kind", FLOATS)
def test_infinities_are_ordinary(kind: str, backend: str) -> None:
    queries = torch.tensor([[1.0, 0.5], [-1.0, 0.5]])
    rows = torch.randn(150, 2)
    rows[::10, 0] = INF
    rows[5::10, 0] = -INF
    got = check(queries, rows, 160, kind=kind, backend=backend)
    assert got.indices[0, :15].tolist() == list(range(0, 150, 10))
    assert got.values[0, :15].tolist() == [INF] * 15
    assert got.indices[0, 135:150].tolist() == list(range(5, 150, 10))
    assert got.values[0, 135:150].tolist() == [-INF] * 15  # results, not fillers
    assert got.indices[0, 150:].tolist() == [-1] * 10
    for ids in (None, torch.arange(150).flip(0)):
        only = torch.full((150, 2), -INF)
        allow = torch.rand(150) < 0.5
        lowest = check(queries.abs(), only, 120, kind=kind, backend=backend, ids=ids, allow=allow)
        assert int((lowest.indices[0] >= 0).sum()) == int(allow.sum())


@pytest.mark.parametrize("kind", FLOATS)
def test_sums_that_overflow(kind: str, backend: str) -> None:
    most = torch.finfo(getattr(torch, kind)).max
    queries = torch.tensor([[3e38, 3e38, -3e38], [1.0, 1.0, 1.0], [1e-30, 2e30, 1.0]])
    rows = torch.tensor([[1.0, 1.0, 1.0], [most, most, most], [most, -most, most], [1.0, 0.0, 1.0], [0.0, 0.0, 0.0]])
    check(queries, rows, 5, kind=kind, backend=backend)


def test_denormals_count(kind: str, backend: str) -> None:
    tiny = {"float32": 1e-45, "float16": 6e-8, "bfloat16": 1e-40, "int8": 1e-40}[kind]
    rows = torch.arange(1, 101)[:, None] * torch.tensor([tiny, 0.0, -tiny])
    queries = torch.tensor([[1.0, 0.0, 0.0], [1.0, 0.0, 1.0], [0.0, 1.0, 0.5], [1e-10, 1.0, 1e-40]])
    got = check(queries, rows, 10, kind=kind, backend=backend)
    assert got.values[0, 0] > 0
    if kind != "int8":
        assert got.indices[0].tolist() == list(range(99, 89, -1))


# ---- degenerate shapes ----


@pytest.mark.parametrize(
    ("B", "N", "d", "k"),
    [(0, 20, 8, 3), (2, 0, 8, 3), (0, 0, 8, 3), (2, 1, 8, 5), (2, 20, 0, 5), (0, 0, 0, 1), (3, 70, 4, 100000)],
)
def test_degenerate(B: int, N: int, d: int, k: int, kind: str, backend: str) -> None:
    queries, rows = torch.randn(B, d), torch.randn(N, d)
    check(queries, rows, k, kind=kind, backend=backend)
    check(queries, rows, k, kind=kind, backend=backend, allow=torch.ones(N, dtype=torch.bool))
    check(queries, rows, k, kind=kind, backend=backend, allow=torch.zeros(B, N, dtype=torch.bool))
    check(queries, rows, k, kind=kind, backend=backend, exclude=torch.full((B, 2), -1))
    check(queries, rows, k, kind=kind, backend=backend, ids=torch.arange(N) + 5, exclude=torch.full((B, 2), 5))
