"""Certified int8 tables: the bound holds for every row and query, and a search returns the bits of the exact one."""

import math
from collections.abc import Iterator
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mips_topk_cases import Problem, both, fill, operands, problems, rows_like, tables
from oracle import assert_same, expected, inactive, searching_isas

import grank_kernels as gk
from grank_kernels.backends import BACKENDS, cpu, reference
from grank_kernels.table import quantise

CERTIFYING = [name for name in ("cpu", "reference") if hasattr(BACKENDS[name], "mips_topk_certified")]
pytestmark = pytest.mark.usefixtures("one_thread")
EVERY_ISA = [*CERTIFYING, *inactive(searching_isas())]
FLOATS = ("float32", "float16", "bfloat16")
SHAPES_OF_ROWS = (
    "normal", "heavy rows", "heavy columns", "spiky", "clusters", "duplicates", "unit", "decades", "low rank", "equal",
    "sorted",
)  # fmt: skip


@pytest.fixture(params=EVERY_ISA)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """A backend with a certified search; the name of an instruction set means the cpu backend with that set."""
    with cpu.using_isa(request.param) if request.param in cpu.isas() else nullcontext():
        yield "cpu" if request.param in cpu.isas() else request.param


# ---- the inequality ----


def furthest(queries: torch.Tensor, rows: torch.Tensor, basis: torch.Tensor | None) -> float:
    """The largest |score - coarse score| / bound, for scores summed in the kernels' order and in float64."""
    numbers, scale, error = quantise.certify(rows, basis)
    q_numbers, q_scale, radius = quantise.certify_queries(queries, basis)
    applies = ~radius.isnan()
    bound = radius[applies, None].double() * error.double()
    coarse = (q_numbers[applies].double() @ numbers.double().T) * q_scale[applies, None].double() * scale.double()
    most = 0.0
    for scores in (
        reference._scores(queries[applies], rows, None).double(),
        queries[applies].double() @ rows.double().T,
    ):
        limited = bound.isfinite().expand_as(scores)
        off = ((scores - coarse).abs() / bound)[limited]
        most = max([most, *off.max(0, keepdim=True).values.tolist()] if off.numel() else [most])
    return most


@pytest.mark.parametrize("shape", SHAPES_OF_ROWS)
@pytest.mark.parametrize("d", [1, 7, 64, 200])
def test_no_score_is_further_off_than_its_bound(shape: str, d: int) -> None:
    rows = rows_like(shape, 200, d)
    queries = torch.cat([torch.randn(5, d), rows[:10], torch.eye(d)[:3] * 1e-3])
    bases = [None, quantise.basis_for(rows_like("low rank", 4 * d + 10, d))]
    for kind in FLOATS:
        for basis in bases:
            assert furthest(queries, rows.to(getattr(torch, kind)), basis) < 1


@pytest.mark.parametrize("d", [16, 64])
def test_the_bound_is_reached_within_a_factor(d: int) -> None:
    """The bound is tight: a far larger one would make the test above meaningless.

    A query parallel to a row's error attains |q| |y - y~|; the other part of the bound is W |q| |x|.
    """
    rows = torch.randn(100, d)
    numbers, scale, _ = quantise.certify(rows)
    along = rows - numbers * scale[:, None]
    assert furthest(along, rows, None) > 0.4


@settings(max_examples=100)
@given(data=st.data())
def test_no_score_is_further_off_for_hypothesis_problems(data: st.DataObject) -> None:
    d = data.draw(st.one_of(st.integers(1, 20), st.sampled_from([127, 129, 400])))
    dtype = data.draw(st.sampled_from([torch.float32, torch.float16, torch.bfloat16]))
    stretch = 10.0 ** data.draw(st.integers(-40, 38))
    rows, queries = fill(data.draw, (30, d)).to(dtype), fill(data.draw, (10, d)) * stretch
    assert furthest(queries, rows, None) < 1


def test_rows_beyond_the_bound_have_infinite_error() -> None:
    rows = torch.randn(6, 8)
    rows[0, 3], rows[1, 3], rows[2], rows[3], rows[4] = math.inf, math.nan, 1e30, 0, 1e-30
    numbers, scale, error = quantise.certify(rows)
    assert error.isinf().tolist() == [True] * 3 + [False] * 3
    assert not numbers[:5].any()
    assert not scale[:5].any()
    assert float(error[4]) > 1e-30
    assert quantise.certify_queries(rows)[2].isnan().tolist() == [True] * 5 + [False]


def test_a_row_s_copy_depends_on_the_row_alone() -> None:
    rows = rows_like("low rank", 3000, 24)
    basis = quantise.basis_for(rows)
    assert basis is not None
    whole = quantise.certify(rows, basis)
    some = torch.randperm(3000)[:7]
    for part, all_of_it in zip(quantise.certify(rows[some], basis), whole, strict=True):
        assert torch.equal(part, all_of_it[some])


def test_a_basis_is_an_inverse_pair_and_only_for_rows_that_need_it() -> None:
    assert quantise.basis_for(rows_like("normal", 5000, 32)) is None
    assert quantise.basis_for(torch.zeros(500, 8)) is None
    assert quantise.basis_for(rows_like("heavy columns", 50, 32)) is None  # too few rows to decide
    basis = quantise.basis_for(rows_like("heavy columns", 5000, 32))
    assert basis is not None
    torch.testing.assert_close(basis[1].T @ basis[0], torch.eye(32, dtype=torch.float64), rtol=0, atol=2.0**-30)


# ---- searches ----


@pytest.mark.parametrize("kind", FLOATS)
@pytest.mark.parametrize("shape", SHAPES_OF_ROWS)
def test_the_result_is_that_of_the_exact_scan(shape: str, kind: str, backend: str) -> None:
    n = 1600 if backend == "reference" else 6000
    rows = rows_like(shape, n, 33)
    queries = torch.cat([torch.randn(6, 33), rows[:3], torch.zeros(1, 33), -rows[5:6]])
    exact, certified = tables(rows, kind)
    for k in (1, 10, n // 32):
        want = gk.mips_topk(queries, exact, k, backend=backend)
        assert_same(gk.mips_topk(queries, certified, k, backend=backend), want)


def assert_every_bit(p: Problem, backend: str) -> None:
    table = gk.ItemTable.from_rows(p.rows, ids=p.filters.get("ids"), dtype=getattr(torch, p.kind), coarse=torch.int8)
    filters = {name: value for name, value in p.filters.items() if name != "ids"}
    for k in {p.k, 1 + p.k % 4}:  # many of the larger k are above N / 32
        got = gk.mips_topk(p.queries, table, k, backend=backend, **filters)
        assert_same(got, expected(p.queries, p.rows, k, kind=p.kind, backend=backend, **p.filters))


@pytest.mark.parametrize("backend", CERTIFYING)
@settings(max_examples=30)
@given(problem=problems(kinds=FLOATS))
def test_every_bit_of_hypothesis_problems(backend: str, problem: Problem) -> None:
    assert_every_bit(problem, backend)


@pytest.mark.slow
@pytest.mark.parametrize("isa", searching_isas())
@settings(max_examples=200)
@given(problem=problems(kinds=FLOATS))
def test_every_bit_under_every_instruction_set(isa: str, problem: Problem) -> None:
    with cpu.using_isa(isa):
        assert_every_bit(problem, "cpu")


@pytest.mark.parametrize("isa", [cpu.isa(), *inactive(searching_isas())], indirect=True)
@pytest.mark.parametrize("B", [1, 2, 7, 16, 48, 49, 256, 600])
def test_every_batch_on_the_cpu(B: int, isa: str) -> None:
    rows = rows_like("heavy rows", 20000, 20)
    both(torch.randn(B, 20), rows, 30, "float16", "cpu")


def test_sampled_thresholds_and_threads_on_the_cpu() -> None:
    rows, queries = torch.randn(300_000, 16), torch.randn(9, 16)
    for threads in (1, 3):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        both(queries, rows, 100, "float16", "cpu", exclude=torch.randint(0, 300_000, (9, 1000)))
        both(queries[:1], rows, 100, "bfloat16", "cpu", allow=torch.rand(300_000) < 0.01)
        torch.set_num_threads(before)


def test_filters(backend: str) -> None:
    rows, queries = rows_like("clusters", 5000, 12), torch.randn(5, 12)
    top = gk.mips_topk(queries, rows, 60).indices
    ids = torch.randperm(9000)[:5000]
    masks = [torch.rand(5000) < 0.02, torch.rand(5, 5000) < 0.5, torch.rand(5, 5000) < 0.02]
    for allow in (*masks, torch.zeros(5000, dtype=torch.bool)):
        both(queries, rows, 20, "float32", backend, allow=allow, exclude=top)
        both(queries, rows, 20, "float16", backend, allow=allow, exclude=ids[top], ids=ids)


def test_infinities_and_nan_among_rows_and_queries(backend: str) -> None:
    rows, queries = torch.randn(4000, 9), torch.randn(8, 9)
    rows[::97, 2] = math.inf
    rows[5::97, 3] = -math.inf
    rows[7::97, 1] = math.nan
    rows[9::97] = 3e38
    queries[1, 2], queries[2, 4], queries[3], queries[4], queries[5] = math.inf, math.nan, 0, 1e-44, 3e38
    for kind in ("float32", "bfloat16"):
        table = both(queries, rows, 40, kind, backend)
        rescored = gk.count_rescored(queries, table, 40, backend=backend)
        assert rescored[1:6].tolist() == [4000] * 5
        assert rescored.min() >= 40 + (~table.rows(torch.arange(4000)).isfinite()).any(1).sum()


# ---- rows rescored ----


@pytest.mark.parametrize(
    ("shape", "most"), [("normal", 3), ("heavy rows", 2), ("unit", 3.5), ("heavy columns", 6), ("low rank", 3)]
)
def test_few_rows_are_rescored(shape: str, most: float) -> None:
    rows, queries = rows_like(shape, 100_000, 64), torch.randn(16, 64)
    table = both(queries, rows, 100, "float16", "cpu")
    rescored = gk.count_rescored(queries, table, 100)
    assert rescored.dtype == torch.int64
    assert rescored.shape == (16,)
    assert rescored.min() >= 100
    assert rescored.double().mean() < most * 100


def test_many_excluded_best_rows_do_not_spoil_the_bound() -> None:
    rows, queries = torch.randn(100_000, 32), torch.randn(9, 32)
    seen = gk.mips_topk(queries, rows, 1000).indices
    table = both(queries, rows, 50, "float16", "cpu", exclude=seen)
    assert gk.count_rescored(queries, table, 50, exclude=seen).max() < 10_000


def test_a_query_with_an_infinite_bound_reads_the_whole_table() -> None:
    rows = rows_like("equal", 50_000, 16)
    table = both(torch.randn(3, 16), rows, 10, "float16", "cpu")
    assert gk.count_rescored(torch.randn(3, 16), table, 10).tolist() == [50_000] * 3


# ---- the table and the op ----


def test_content_of_a_table() -> None:
    rows = rows_like("heavy columns", 400, 12)
    table = gk.ItemTable.from_rows(rows, dtype=torch.float16, coarse=torch.int8)
    assert table.current.coarse is not None
    for held, want in zip(
        table.current.coarse[:3], quantise.certify(rows.half(), table.current.coarse.basis), strict=True
    ):
        assert torch.equal(held, want)
    assert table.nbytes == 400 * (2 * 12 + 12 + 8) + 2 * 12 * 12 * 8
    assert "float16 + int8" in repr(table)
    assert gk.ItemTable.from_rows(rows).current.coarse is None
    moved = table.to("meta").current.coarse
    assert moved is not None
    assert {x.device.type for x in moved if x is not None} == {"meta"}
    assert torch.equal(table.rows(torch.arange(400)), rows.half().float())


def test_bad_arguments() -> None:
    rows = torch.randn(4, 3)
    for dtype, coarse in [(torch.int8, torch.int8), (None, torch.float16), (torch.float32, torch.int32)]:
        with pytest.raises(ValueError, match=r"coarse must be None, or torch\.int8 .*, got torch\.\w+"):
            gk.ItemTable.from_rows(rows, dtype=dtype, coarse=coarse)
    with pytest.raises(ValueError, match="items have no int8 copy"):
        gk.count_rescored(rows, gk.ItemTable.from_rows(rows), 1)


def test_empty_and_tiny_tables() -> None:
    for n, d in [(0, 4), (1, 4), (3, 0), (0, 0), (40, 1)]:
        for backend in CERTIFYING:
            both(torch.randn(2, d), torch.randn(n, d), 1, "float32", backend)
            both(torch.randn(0, d), torch.randn(n, d), 5, "float32", backend)


@pytest.mark.parametrize("backend", CERTIFYING)
def test_one_query_and_out(backend: str) -> None:
    rows, query = torch.randn(500, 6), torch.randn(6)
    table = both(query, rows, 3, "float32", backend)
    assert gk.count_rescored(query, table, 3, backend=backend).shape == ()
    out = torch.empty(3), torch.empty(3, dtype=torch.int64)
    assert gk.mips_topk(query, table, 3, backend=backend, out=out).values is out[0]


@pytest.mark.parametrize("backend", CERTIFYING)
def test_opcheck(backend: str) -> None:
    torch.library.opcheck(torch.ops.grank.mips_topk_certified, operands(backend))


@pytest.mark.parametrize("backend", CERTIFYING)
def test_gradient_is_that_of_the_exact_search(backend: str) -> None:
    rows = torch.randn(2000, 8)
    grads = []
    for coarse in (None, torch.int8):
        queries = torch.randn(3, 8, generator=torch.Generator().manual_seed(1)).requires_grad_()
        table = gk.ItemTable.from_rows(rows, coarse=coarse)
        (gk.mips_topk(queries, table, 5, backend=backend).values * torch.arange(5)).sum().backward()  # type: ignore[no-untyped-call]
        grads.append(queries.grad)
    assert torch.equal(grads[0], grads[1])  # type: ignore[arg-type]


def test_compiled_without_a_break() -> None:
    table = gk.ItemTable.from_rows(torch.randn(2000, 8), coarse=torch.int8)
    queries = torch.randn(3, 8)
    compiled = torch.compile(lambda q: gk.mips_topk(q, table, 5), fullgraph=True, backend="aot_eager")
    assert_same(compiled(queries), gk.mips_topk(queries, table, 5))


def test_radii_are_the_same_in_both_languages() -> None:
    """C++ rescores as many rows per query as the bound computed in Python requires."""
    rows, queries = rows_like("heavy columns", 30_000, 40), torch.randn(8, 40)
    table = gk.ItemTable.from_rows(rows, dtype=torch.float16, coarse=torch.int8)
    counts = [gk.count_rescored(queries, table, 20, backend=backend) for backend in ("cpu", "reference")]
    assert torch.equal(*counts)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(8))
def test_long_tables(seed: int) -> None:
    random = np.random.default_rng(seed)
    for shape in SHAPES_OF_ROWS:
        torch.manual_seed(seed)
        n, d, k = (
            int(random.integers(2000, 120_000)),
            int(random.choice([32, 64, 128])),
            int(random.choice([1, 10, 100])),
        )
        both(torch.randn(9, d), rows_like(shape, n, d), k, str(random.choice(FLOATS)), "cpu")
