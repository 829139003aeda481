"""The contract of mips_topk, on every backend and kind of table.

test_mips_topk_cpu.py runs this file once more under every instruction set of the processor.
"""

import io
import math
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from oracle import (
    BACKENDS,
    KINDS,
    assert_same,
    check,
    expected,
    fused,
    integers,
    items_of,
    scores,
    search,
)

import grank_kernels as gk

FLOATS = KINDS[:3]
INF = math.inf


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    threads = torch.get_num_threads()
    if request.param == "reference":  # thousands of small torch operations: threads would only wait for each other
        torch.set_num_threads(1)
    yield str(request.param)
    torch.set_num_threads(threads)


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


# ---- bits ----

WIDTHS = [1, 3, 8, 16, 31, 50, 64, 96, 128, 129, 200, 256, 257, 300, 1000]
COUNTS = [1, 2, 15, 16, 17, 63, 64, 65, 127, 128, 129, 777, 2047, 2048, 2049, 2112, 4097]  # a tile is 64, a step 2048
BATCHES = [*range(1, 14), 18, 33]
KS = [1, 2, 7, 31, 64, 100, 255, 256, 257, 700, 5000]


def shapes() -> list[tuple[int, int, int, int]]:
    """(B, N, d, k): every count, width and k twice, in company drawn by lot."""
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
    if kind == "int8":  # 127 in every row: the scale is 1
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
    """Against float64 products: ids distinct and in range, order, every score its row's, the j-th the j-th best."""
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
def test_loses_no_more_than_torch(d: int, kind: str, backend: str) -> None:
    dtype = getattr(torch, kind)
    queries, rows = torch.randn(9, d).to(dtype), torch.randn(1500, d).to(dtype)
    products = queries.double() @ rows.double().T
    lost = float((queries.float() @ rows.float().T - products).abs().max())
    # Twice what torch loses, and one rounding of the largest sum: a narrow product may happen to lose nothing.
    rounding = 2**-24 * float((queries.double().abs() @ rows.double().abs().T).max())
    assert_meaning(search(queries, rows, 120, kind=kind, backend=backend), products, 2 * lost + rounding)


@pytest.mark.parametrize("d", WIDTHS)
def test_int8_loses_half_a_step_a_number(d: int, backend: str) -> None:
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


# ---- filters ----


def padded(lists: list[list[int]], extra: int = 2) -> torch.Tensor:
    width = max(map(len, lists)) + extra
    return torch.tensor([ids + [-1] * (width - len(ids)) for ids in lists])


def ragged(lists: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """As a pair, with ids of nobody before and behind."""
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


def test_exclude_of_nothing(kind: str, backend: str) -> None:
    queries, rows = torch.randn(3, 6), torch.randn(70, 6)
    plain = search(queries, rows, 5, kind=kind, backend=backend)
    for exclude in (
        torch.full((3, 4), -1),
        torch.empty(3, 0, dtype=torch.int64),
        (torch.zeros(4, dtype=torch.int64), torch.empty(0, dtype=torch.int64)),
    ):
        assert_same(search(queries, rows, 5, kind=kind, backend=backend, exclude=exclude), plain)


def test_exclude_ids_that_a_table_does_not_hold(kind: str, backend: str) -> None:
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


# ---- numbers that are none, and their neighbours ----


@pytest.mark.parametrize("kind", FLOATS)
def test_nan_is_never_returned(kind: str, backend: str) -> None:
    queries, rows = torch.randn(3, 5), torch.randn(200, 5)
    rows[::3] = math.nan
    rows[1, 4] = math.nan
    rows[2] = torch.tensor([INF, -INF, 0, 0, 0])  # NaN or not, as the signs of the query have it
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
    assert got.indices[0].tolist() == [1, 3, 4, 5, 2, -1]  # 0 times infinity is no score
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


# ---- layouts ----


def guarded(rows: torch.Tensor, before: int, after: int) -> torch.Tensor:
    """Equal rows with NaN on both sides of each."""
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


def test_inputs_are_left_alone(kind: str, backend: str) -> None:
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


# ---- a score depends on its query and its row alone ----


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
    low = queries.sum(0, keepdim=True) * 0  # scores 0, less than the best 30 of 1000
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


def test_the_oracle_tells_one_rounding_from_two() -> None:
    """Or the tests of bits could not tell what they claim to tell."""
    queries, rows = torch.randn(4, 64), torch.randn(400, 64)
    if fused("cpu"):
        once, twice = (scores(queries, rows, "float32", backend) for backend in ("cpu", "reference"))
        assert (once != twice).mean() > 0.3
        assert np.abs(once - twice).max() < 1e-4


# ---- whatever the process has set ----


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


def test_signs_yet_to_be_applied(backend: str) -> None:
    """The imaginary part of a conjugate is a float32 tensor whose memory holds the opposite."""
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
    """Shapes and dtypes without a search, as for any torch op."""
    queries, rows = torch.empty(3, 8, device="meta"), torch.empty(50, 8, device="meta", dtype=torch.float16)
    exclude = torch.empty(3, 2, dtype=torch.int64, device="meta")
    got = gk.mips_topk(queries, rows, 70, exclude=exclude)
    assert (got.values.shape, got.values.dtype, got.values.device.type) == ((3, 70), torch.float32, "meta")
    assert (got.indices.shape, got.indices.dtype, got.indices.device.type) == ((3, 70), torch.int64, "meta")


# ---- errors ----

Q, X = torch.ones(2, 8), torch.ones(20, 8)
TABLE = gk.ItemTable.from_rows(X, ids=torch.arange(20) * 2)
ERRORS: list[tuple[str, type[Exception], str, tuple[Any, ...], dict[str, Any]]] = [
    ("width", ValueError, r"queries must have the items' width, 9, as last dimension, got \(2, 8\)",
     (Q, torch.ones(20, 9), 3), {}),
    ("k zero", ValueError, "k must be 1 or more, got 0", (Q, X, 0), {}),
    ("k negative", ValueError, "k must be 1 or more, got -1", (Q, X, -1), {}),
    ("k float", TypeError, "k must be an int, got float 2.5", (Q, X, 2.5), {}),
    ("k bool", TypeError, "k must be an int, got bool True", (Q, X, True), {}),
    ("k tensor", TypeError, "k must be an int, got Tensor", (Q, X, torch.tensor(3)), {}),
    ("k of 2^63", ValueError, r"k must be below 2\^63, got 9223372036854775808", (Q, X, 2**63), {}),
    ("k of NumPy's uint64", ValueError, r"k must be below 2\^63", (Q, X, np.uint64(2**63)), {}),
    ("k beyond the memory", MemoryError, r"k must leave room for 2 results of k places, got 1099511627776",
     (Q, X, 2**40), {}),
    ("queries list", TypeError, "queries must be a torch.Tensor or an array, got list", ([[1.0] * 8], X, 3), {}),
    ("queries int64", ValueError, "queries must be torch.float32, torch.float16 or torch.bfloat16, got torch.int64$",
     (Q.long(), X, 3), {}),
    ("queries float64", ValueError, r"queries must be .*, got torch.float64: queries.to\(torch.float32\) converts",
     (Q.double(), X, 3), {}),
    ("queries of NumPy's float64", ValueError, r'got torch.float64: queries.astype\("float32"\) converts',
     (Q.double().numpy(), X, 3), {}),
    ("queries of strings", TypeError, "queries: can't convert", (np.array([["a"]]), X, 3), {}),
    ("queries 3-d", ValueError, r"queries must have 1 or 2 dimensions, got \(1, 2, 8\)", (Q[None], X, 3), {}),
    ("queries 0-d", ValueError, r"queries must have 1 or 2 dimensions, got \(\)", (torch.tensor(1.0), X, 3), {}),
    ("items list", TypeError, "items must be a torch.Tensor, an array or an ItemTable, got list",
     (Q, X.tolist(), 3), {}),
    ("items 3-d", ValueError, r"items must have 2 dimensions, got \(1, 20, 8\)", (Q, X[None], 3), {}),
    ("items 1-d", ValueError, r"items must have 2 dimensions, got \(8,\)", (Q, X[0], 3), {}),
    ("items complex", ValueError, "items must be .*, got torch.complex64", (Q, X.to(torch.complex64), 3), {}),
    ("items float64", ValueError, "items must be .*, got torch.float64", (Q, X.double(), 3), {}),
    ("items int8", ValueError, r"items must be .*, got torch.int8: items.float\(\) converts", (Q, X.char(), 3), {}),
    ("items on another device", ValueError, r"queries must be on meta, .*queries.to\('meta'\)",
     (Q, X.to("meta"), 3), {}),
    ("exclude of another type", TypeError, "exclude must be a torch.Tensor or an array, got int",
     (Q, X, 3), {"exclude": 1}),
    ("exclude list", ValueError, "exclude must have 2 entries for 2 queries if it is a list, got 1",
     (Q, X, 3), {"exclude": [[1]]}),
    ("exclude list of ints", TypeError, r"exclude\[0\] must be a torch.Tensor or an array, got int",
     (Q, X, 3), {"exclude": [1, 2]}),
    ("exclude list of floats", TypeError, r"exclude\[1\] must hold ints, got \[2.0\]",
     (Q, X, 3), {"exclude": [[1], [2.0]]}),
    ("exclude pair of lists", TypeError, "exclude's offsets must be a torch.Tensor or an array, got list",
     (Q, X, 3), {"exclude": ([0, 1], [2])}),
    ("exclude triple", ValueError, r"exclude must be a pair \(offsets, ids\) if it is a tuple, got 3 entries",
     (Q, X, 3), {"exclude": (torch.arange(3),) * 3}),
    ("exclude int32", ValueError, r"exclude must be torch.int64, got torch.int32: exclude.to\(torch.int64\) converts",
     (Q, X, 3), {"exclude": torch.zeros(2, 1, dtype=torch.int32)}),
    ("exclude batch", ValueError, r"exclude must be \(2, E\) for 2 queries, got \(3, 1\)",
     (Q, X, 3), {"exclude": torch.zeros(3, 1, dtype=torch.int64)}),
    ("exclude rank", ValueError, r"exclude must have 2 dimensions, got \(4,\)",
     (Q, X, 3), {"exclude": torch.arange(4)}),
    ("exclude too large", ValueError, r"exclude must hold ids in \[-1, 20\), -1 for none, got 20",
     (Q, X, 3), {"exclude": torch.tensor([[1], [20]])}),
    ("exclude too small", ValueError, r"exclude must hold ids in \[-1, 20\), -1 for none, got -2",
     (Q, X, 3), {"exclude": torch.tensor([[1], [-2]])}),
    ("exclude too small for a table", ValueError, r"exclude must hold ids in \[-1, 2\^63\), -1 for none, got -2",
     (Q, TABLE, 3), {"exclude": torch.tensor([[1], [-2]])}),
    ("offsets length", ValueError, r"exclude's offsets must be \(3,\) for 2 queries, got \(2,\)",
     (Q, X, 3), {"exclude": (torch.tensor([0, 1]), torch.tensor([1]))}),
    ("offsets beyond the ids", ValueError, r"exclude's offsets must lie in \[0, 3\], got 0 to 5",
     (Q, X, 3), {"exclude": (torch.tensor([0, 1, 5]), torch.tensor([1, 2, 3]))}),
    ("offsets negative", ValueError, r"exclude's offsets must lie in \[0, 3\], got -1 to 3",
     (Q, X, 3), {"exclude": (torch.tensor([-1, 1, 3]), torch.tensor([1, 2, 3]))}),
    ("offsets fall", ValueError, r"exclude's offsets must not decrease, got \(4, 3\)",
     (Q, X, 3), {"exclude": (torch.tensor([0, 4, 3]), torch.tensor([1, 2, 3]))}),
    ("allow list", TypeError, "allow must be a torch.Tensor or an array, got list", (Q, X, 3), {"allow": [True] * 20}),
    ("allow float", ValueError, "allow must be torch.bool, got torch.float32", (Q, X, 3), {"allow": torch.ones(20)}),
    ("allow length", ValueError, r"allow must be \(20,\) or \(2, 20\) for 2 queries and 20 items, got \(19,\)",
     (Q, X, 3), {"allow": torch.ones(19, dtype=torch.bool)}),
    ("allow transposed", ValueError, r"allow must be .*, got \(20, 2\)",
     (Q, X, 3), {"allow": torch.ones(20, 2, dtype=torch.bool)}),
    ("backend", ValueError, "backend must be None, 'cpu', 'cuda', .*or 'reference', got 'nope'",
     (Q, X, 3), {"backend": "nope"}),
    ("out single", TypeError, r"out must be a pair of tensors \(values, indices\), got Tensor",
     (Q, X, 3), {"out": torch.ones(2, 3)}),
    ("out shape", ValueError, r"out's values must be torch.float32 \(2, 3\) on cpu, got torch.float32 \(2, 4\) on cpu",
     (Q, X, 3), {"out": (torch.ones(2, 4), torch.ones(2, 3, dtype=torch.int64))}),
    ("out dtype", ValueError, r"out's indices must be torch.int64 \(2, 3\) on cpu, got torch.int32",
     (Q, X, 3), {"out": (torch.ones(2, 3), torch.ones(2, 3, dtype=torch.int32))}),
    ("out with gradients", ValueError, "out must be None where a gradient is recorded",
     (Q.clone().requires_grad_(), X, 3), {"out": (torch.ones(2, 3), torch.ones(2, 3, dtype=torch.int64))}),
    ("out that requires a gradient", ValueError, "out's values must not require a gradient",
     (Q, X, 3), {"out": (torch.ones(2, 3, requires_grad=True), torch.ones(2, 3, dtype=torch.int64))}),
]  # fmt: skip


@pytest.mark.parametrize(("error", "message", "args", "more"), [e[1:] for e in ERRORS], ids=[e[0] for e in ERRORS])
def test_errors(
    error: type[Exception], message: str, args: tuple[Any, ...], more: dict[str, Any], backend: str
) -> None:
    with pytest.raises(error, match=message):
        gk.mips_topk(*args, **{"backend": backend, **more})


def test_a_refused_call_leaves_out_alone(backend: str) -> None:
    values, indices = torch.full((2, 3), 7.0), torch.full((2, 3), 7)
    with pytest.raises(ValueError, match=r"exclude must hold ids in .*, got 99"):
        gk.mips_topk(Q, X, 3, backend=backend, exclude=torch.tensor([[1], [99]]), out=(values, indices))
    assert torch.all(values == 7)
    assert torch.all(indices == 7)


# ---- gradients ----


def gradients(queries: torch.Tensor, rows: torch.Tensor, values: torch.Tensor, weights: torch.Tensor) -> Any:
    return torch.autograd.grad((values * weights.to(values.dtype)).square().sum(), [queries, rows])


@pytest.mark.parametrize(("B", "N", "d", "k"), [(1, 1, 1, 1), (3, 200, 8, 20), (7, 50, 130, 50), (4, 30, 5, 12)])
def test_gradients(B: int, N: int, d: int, k: int, backend: str) -> None:
    queries, rows = (torch.randn(n, d, requires_grad=True) for n in (B, N))
    weights = torch.randn(B, k)
    got = gradients(queries, rows, gk.mips_topk(queries, rows, k, backend=backend).values, weights)
    q64, x64 = (x.detach().double().requires_grad_() for x in (queries, rows))
    exact = gradients(q64, x64, torch.topk(q64 @ x64.T, k).values, weights)
    plain = gradients(queries, rows, torch.topk(queries @ rows.T, k).values, weights)
    for mine, theirs, true in zip(got, plain, exact, strict=True):
        assert mine.dtype == torch.float32
        lost = float((theirs - true).abs().max())
        assert float((mine - true).abs().max()) <= 2 * lost + 2**-22 * float(true.abs().max())


def test_gradients_where_only_one_is_wanted(backend: str) -> None:
    queries, rows = torch.randn(3, 6), torch.randn(40, 6)
    both = [x.clone().requires_grad_() for x in (queries, rows)]
    gk.mips_topk(both[0], both[1], 4, backend=backend).values.sum().backward()
    q = queries.clone().requires_grad_()
    gk.mips_topk(q, rows, 4, backend=backend).values.sum().backward()
    assert torch.equal(q.grad, both[0].grad)
    x = rows.clone().requires_grad_()
    top = gk.mips_topk(queries, x, 4, backend=backend)
    top.values.sum().backward()
    assert torch.equal(x.grad, both[1].grad)
    assert not top.indices.requires_grad
    assert not gk.mips_topk(queries, rows, 4, backend=backend).values.requires_grad
    one = queries[0].clone().requires_grad_()
    gk.mips_topk(one, rows, 4, backend=backend).values.sum().backward()
    assert torch.equal(one.grad, q.grad[0])


@pytest.mark.parametrize("kind", FLOATS[1:])
def test_gradients_of_half_inputs(kind: str, backend: str) -> None:
    dtype = getattr(torch, kind)
    queries, rows = torch.randn(5, 24).to(dtype).requires_grad_(), torch.randn(60, 24).to(dtype).requires_grad_()
    gk.mips_topk(queries, rows, 9, backend=backend).values.sum().backward()
    q, x = (t.detach().float().requires_grad_() for t in (queries, rows))
    torch.topk(q @ x.T, 9).values.sum().backward()
    eps = torch.finfo(dtype).eps  # sums in float32, then one rounding to the dtype
    for mine, want in ((queries.grad, q.grad), (rows.grad, x.grad)):
        assert mine.dtype == dtype
        torch.testing.assert_close(mine.float(), want, rtol=eps, atol=2e-6)


def test_gradients_through_int8_as_if_not_quantised(backend: str) -> None:
    queries, table = torch.randn(5, 24, requires_grad=True), items_of(torch.randn(60, 24), "int8")
    weights = torch.randn(5, 9)
    top = gk.mips_topk(queries, table, 9, backend=backend)
    (top.values * weights).sum().backward()
    want = (weights[..., None] * table.rows(top.indices)).sum(1)
    torch.testing.assert_close(queries.grad, want)


def test_fillers_and_nan_do_not_leak_into_gradients(backend: str) -> None:
    queries, rows = torch.randn(3, 6), torch.randn(20, 6)
    rows[0] = math.nan
    rows[4:8] = math.nan
    allow = torch.ones(3, 20, dtype=torch.bool)
    allow[1, 3:] = False
    allow[2] = False
    q, x = queries.clone().requires_grad_(), rows.clone().requires_grad_()
    top = gk.mips_topk(q, x, 30, backend=backend, allow=allow)
    weights = torch.randn(3, 30)
    torch.where(top.indices >= 0, top.values * weights, torch.inf).sum().backward(retain_graph=True)
    q64, x64 = (t.double().requires_grad_() for t in (queries, rows))
    found = top.indices >= 0
    picked = x64[top.indices.clamp(min=0)].nan_to_num(0)
    torch.where(found, (q64[:, None] * picked).sum(2) * weights, 0).sum().backward()
    torch.testing.assert_close(q.grad.double(), q64.grad, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(x.grad.double(), x64.grad, rtol=1e-5, atol=1e-6)
    assert torch.all(q.grad[2] == 0)
    q.grad = x.grad = None
    top.values.sum().backward(retain_graph=True)  # the fillers' gradient is 1 here: it counts for nothing
    assert q.grad.isfinite().all()
    assert torch.all(q.grad[2] == 0)
    assert torch.all(x.grad[[0, 4, 5, 6, 7]] == 0)
    q.grad = x.grad = None
    top.values.square().sum().backward()  # and -infinity here
    assert q.grad.isfinite().all()
    assert x.grad.isfinite().all()


def test_gradients_of_nothing(backend: str) -> None:
    for B, N in ((0, 5), (3, 0), (0, 0)):
        queries, rows = torch.randn(B, 4, requires_grad=True), torch.randn(N, 4, requires_grad=True)
        gk.mips_topk(queries, rows, 2, backend=backend).values.sum().backward()
        assert torch.equal(queries.grad, torch.zeros(B, 4))
        assert torch.equal(rows.grad, torch.zeros(N, 4))


def test_gradients_are_deterministic(backend: str) -> None:
    queries, rows = torch.randn(200, 16, requires_grad=True), torch.randn(50, 16, requires_grad=True)
    weights = torch.randn(200, 40)
    torch.use_deterministic_algorithms(True)
    try:
        found = [
            gradients(queries, rows, gk.mips_topk(queries, rows, 40, backend=backend).values, weights) for _ in range(5)
        ]
    finally:
        torch.use_deterministic_algorithms(False)
    for again in found[1:]:
        assert torch.equal(again[0], found[0][0])
        assert torch.equal(again[1], found[0][1])


# ---- torch.library, torch.compile, torch.export ----


def op_arguments() -> dict[str, tuple[Any, ...]]:
    queries, rows = torch.randn(3, 10), torch.randn(50, 10)
    learnt, learnt_rows = queries.clone().requires_grad_(), rows.clone().requires_grad_()
    filters = torch.tensor([0, 2, 2, 5]), torch.tensor([1, 4, 9, -1, 49])
    table = gk.ItemTable.from_rows(rows, dtype=torch.int8, ids=torch.randperm(50) + 3).operands()[:3]
    allow = torch.rand(3, 50) < 0.5
    return {
        "plain": (queries, rows, None, None, 5, None, None, None),
        "gradients": (learnt, learnt_rows, None, None, 5, None, None, None),
        "filters": (learnt, rows, None, None, 60, *filters, allow),
        "half": (queries.half(), rows.bfloat16().requires_grad_(), None, None, 5, None, None, allow[0]),
        "table": (learnt, *table, 5, *filters, None),
        "strided": (queries.T.contiguous().T, rows[::2], None, None, 5, None, None, None),
        "empty": (queries[:0], rows[:0], None, None, 5, None, None, None),
    }


@pytest.mark.parametrize("which", ["plain", "gradients", "filters", "half", "table", "strided", "empty"])
def test_opcheck(which: str, backend: str) -> None:
    torch.library.opcheck(torch.ops.grank.mips_topk.default, (*op_arguments()[which], backend))


def test_compile_fake_shapes(backend: str) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        got = gk.mips_topk(torch.empty(6, 10, dtype=torch.float16), torch.empty(50, 10), 70, backend=backend)
        assert (got.values.shape, got.values.dtype) == ((6, 70), torch.float32)
        assert (got.indices.shape, got.indices.dtype) == ((6, 70), torch.int64)


def compiled_agrees(compiler: str, backend: str) -> None:
    def loss(queries: torch.Tensor, rows: torch.Tensor, exclude: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        top = gk.mips_topk(queries * 2, rows, 4, exclude=exclude, backend=backend)
        return top.values.tanh().sum(), top.indices

    compiled = torch.compile(loss, fullgraph=True, backend=compiler)
    for B, N in ((3, 40), (5, 60), (6, 70)):  # the later ones with dynamic shapes
        inputs = torch.randn(B, 8, requires_grad=True), torch.randn(N, 8, requires_grad=True)
        exclude = torch.randint(-1, N, (B, 3))
        (want, want_ids), (got, got_ids) = loss(*inputs, exclude), compiled(*inputs, exclude)
        assert torch.equal(got_ids, want_ids)
        torch.testing.assert_close(got, want)
        for mine, theirs in zip(torch.autograd.grad(got, inputs), torch.autograd.grad(want, inputs), strict=True):
            torch.testing.assert_close(mine, theirs)


def test_compile(backend: str) -> None:
    torch.compiler.reset()
    compiled_agrees("aot_eager", backend)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # inductor's own
def test_compile_inductor(backend: str) -> None:
    torch.compiler.reset()
    compiled_agrees("inductor", backend)


def test_compile_of_a_table(kind: str, backend: str) -> None:
    torch.compiler.reset()
    table = gk.ItemTable.from_rows(torch.randn(60, 8), dtype=getattr(torch, kind), ids=torch.randperm(60) + 9)
    queries, allow = torch.randn(3, 8), torch.rand(60) < 0.5

    def top(queries: torch.Tensor, allow: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        values, indices = gk.mips_topk(queries, table, 7, allow=allow, backend=backend)
        return values, indices

    got = torch.compile(top, fullgraph=True, backend="aot_eager")(queries, allow)
    assert_same(gk.TopK(*got), gk.TopK(*top(queries, allow)))


def test_compile_for_export(backend: str) -> None:
    class Retriever(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.items = torch.nn.Parameter(torch.randn(60, 8))

        def forward(self, queries: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            values, indices = gk.mips_topk(queries, self.items, 7, backend=backend)
            return values, indices

    module = Retriever()
    program = torch.export.export(module, (torch.randn(3, 8),), dynamic_shapes=({0: torch.export.Dim("B", min=2)},))
    queries = torch.randn(5, 8)
    assert_same(gk.TopK(*program.module()(queries)), gk.TopK(*module(queries)))


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("options", [{}, {"ids": torch.arange(60) * 3}, {"coarse": torch.int8}], ids=str)
def test_an_exported_search_of_a_table_is_saved_and_loaded(options: dict[str, Any], strict: bool) -> None:
    class Retriever(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.items = gk.ItemTable.from_rows(torch.randn(60, 8), **options)
            self.user = torch.nn.Linear(5, 8)

        def forward(self, features: torch.Tensor) -> gk.TopK:
            return gk.mips_topk(self.user(features), self.items, 7)

    module, file, features = Retriever(), io.BytesIO(), torch.randn(4, 5)
    shapes = ({0: torch.export.Dim("B", min=2)},)
    torch.export.save(torch.export.export(module, (features[:3],), dynamic_shapes=shapes, strict=strict), file)
    file.seek(0)
    got = torch.export.load(file).module()(features)
    assert isinstance(got, gk.TopK)
    assert_same(got, module(features))
