"""The triton backend on CPU tensors, in Triton's interpreter made strict.

The strict interpreter adds products in the order of the `reference` backend (up to 128 columns), so every result is
compared bit by bit with the oracle of that backend.
"""

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hard_tables import slow_except, table
from hypothesis import given, settings
from mips_topk_cases import Problem, problems, reserved
from oracle import KINDS, assert_same, expected, integers, run_python, search

import grank_kernels as gk
from grank_kernels.backends import triton as backend

pytest.importorskip("triton")
if backend.unavailable() is not None or not backend.INTERPRETED:
    pytest.skip("kernels run on the GPU; TRITON_INTERPRET=1 runs these tests", allow_module_level=True)

from emulation.triton_interpreter import strict

from grank_kernels.backends.triton import mips_topk_launches as launches

FLOATS = KINDS[:3]


@pytest.fixture(scope="module", autouse=True)
def _strict() -> Iterator[None]:
    """The strict interpreter, with correct bfloat16 products."""
    with pytest.MonkeyPatch.context() as patch, strict():
        patch.setattr(backend, "_MULTIPLIES_BFLOAT16", True)
        yield


class Record:
    """Records the launches of searches, and the pending queries after `scan` and `select`."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.pending: list[list[bool]] = []


@pytest.fixture
def record(monkeypatch: pytest.MonkeyPatch) -> Record:
    seen = Record()
    run = launches.Launch.run

    def recorded(self: Any) -> None:
        run(self)
        seen.names.append(self.kernel.__name__)
        if seen.names[-1] == "select" and not self.arguments["COLLECTED"]:
            seen.pending.append((self.arguments["progress"].pending > 0).tolist())

    monkeypatch.setattr(launches.Launch, "run", recorded)
    return seen


@pytest.fixture
def change_plan(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Replaces fields of the plans that make_plan returns."""
    make_plan = launches.make_plan

    def change(**fields: Any) -> None:
        monkeypatch.setattr(launches, "make_plan", lambda *shape: dataclasses.replace(make_plan(*shape), **fields))

    return change


def check(queries: torch.Tensor, rows: torch.Tensor, k: int, kind: str, **more: Any) -> gk.TopK:
    got = search(queries, rows, k, kind=kind, backend="triton", **more)
    assert_same(got, expected(queries, rows, k, kind=kind, backend="reference", **more))
    return got


# ---- every way of searching, with every feature ----

SEARCHES = {  # B, N, d, k; expected launches
    "whole table emitted": ((3, 230, 20, 90), ["threshold", "scan", "select", "rank"]),
    "small k": ((5, 900, 24, 7), ["threshold", "collect", "select", "rank"]),
    "small k, two tiles of queries": ((17, 600, 5, 2), ["threshold", "collect", "select", "rank"]),
    "sampled": (
        (4, 3000, 30, 70),
        ["sample", "threshold", "scan", "select", "collect", "select", "rank"],
    ),
    "wide rows": ((2, 300, 300, 70), ["sample", "threshold", "scan", "select", "collect", "select", "rank"]),
}


CASES = [(which, filters, kind) for which in SEARCHES for filters in (False, True) for kind in ("float32", "int8")]
CASES += [(which, True, kind) for which in ("small k", "sampled", "wide rows") for kind in ("float16", "bfloat16")]


QUICK = [("whole table emitted", True, "int8"), ("small k", True, "float16"), ("sampled", True, "int8")]
QUICK += [("small k, two tiles of queries", False, "float32"), ("wide rows", True, "float32")]


@pytest.mark.parametrize(("which", "filters", "kind"), slow_except(QUICK, CASES))
def test_exact_numbers(which: str, filters: bool, kind: str, record: Record) -> None:
    (B, N, d, k), names = SEARCHES[which]
    queries, rows = integers(B, d, most=127 if kind == "int8" else 4), integers(N, d, most=127 if kind == "int8" else 4)
    more: dict[str, Any] = {}
    if filters:
        ids = torch.randperm(N) + 2**40
        best = search(queries, rows, 20, kind=kind, backend="reference", ids=ids).indices
        exclude = torch.cat([best[:, ::2], torch.full((B, 1), -1)], 1)
        more = {"ids": ids, "exclude": exclude, "allow": torch.rand((B, N) if B % 2 else (N,)) < 0.7}
        if B == 4:
            more["exclude"] = (torch.tensor([0, 3, 3, 10, 24]), exclude.reshape(-1)[:24])
    check(queries, rows, k, kind, **more)
    assert record.names == ["quantise"] * (kind == "int8") + names
    assert len(record.names) <= 8


@pytest.mark.parametrize(
    ("query_dtype", "kind"), [("float16", "float32"), ("float32", "float16"), ("bfloat16", "int8")]
)
def test_query_dtypes(query_dtype: str, kind: str) -> None:
    check(torch.randn(3, 40).to(getattr(torch, query_dtype)), torch.randn(300, 40), 70, kind)


@pytest.mark.parametrize(
    ("which", "kind"),
    slow_except(
        [("small k", "float32"), ("sampled", "float16")], [(which, kind) for which in SEARCHES for kind in FLOATS]
    ),
)
def test_ties_of_more_than_k_infinite_scores(which: str, kind: str) -> None:
    """The rows with the smallest ids come last, when the threshold is already infinite."""
    (B, N, d, k), _ = SEARCHES[which]
    queries, rows = torch.randn(B, d), torch.randn(N, d)
    queries[:, 0] = math.inf
    got = check(queries, rows, k, kind, ids=torch.arange(N).flip(0))
    infinite = got.values == math.inf
    assert bool(infinite.all()) or which == "whole table emitted"


@pytest.mark.slow
@settings(max_examples=12)
@given(problem=problems())
def test_every_bit(problem: Problem) -> None:
    p = problem
    if p.queries.shape[1] > 128:  # not summed in the reference's order
        p.queries, p.rows = p.queries[:, :128], p.rows[:, :128]
    got = search(p.queries, p.rows, p.k, kind=p.kind, backend="triton", **p.filters)
    assert_same(got, expected(p.queries, p.rows, p.k, kind=p.kind, backend="reference", **p.filters))


@pytest.mark.parametrize(
    ("B", "N", "d", "k"), [(0, 20, 8, 3), (2, 0, 8, 3), (2, 1, 8, 65), (2, 20, 0, 5), (1, 9, 1, 1)]
)
def test_degenerate(B: int, N: int, d: int, k: int) -> None:
    for kind in ("float32", "int8"):
        check(torch.randn(B, d), torch.randn(N, d), k, kind)
    check(torch.randn(B, d), torch.randn(N, d), k, "float16", allow=torch.zeros(N, dtype=torch.bool))


@pytest.mark.parametrize("kind", FLOATS)
def test_meaning_of_wide_rows(kind: str) -> None:
    """Against float64, since sums of more than 128 columns have another order than the reference's."""
    dtype = getattr(torch, kind)
    queries, rows = torch.randn(3, 700).to(dtype), torch.randn(400, 700).to(dtype)
    products = queries.double() @ rows.double().T
    lost = float((queries.float() @ rows.float().T - products).abs().max())
    rounding = 2**-24 * float((queries.double().abs() @ rows.double().abs().T).max())
    got = gk.mips_topk(queries, rows, 50, backend="triton")
    want = products.sort(dim=1, descending=True).values[:, :50]
    # The interpreter rounds after every product: the error of torch, and one rounding each.
    bound = 2 * lost + 700 * rounding / 8
    assert (got.values.double() - products.gather(1, got.indices)).abs().max() <= bound
    assert (got.values.double() - want).abs().max() <= bound


# ---- a score depends on its query and its row only ----


@pytest.mark.parametrize(
    ("d", "kind"), slow_except([(50, "float16")], [(50, "float16"), (300, "float32"), (50, "int8")])
)
def test_batch_and_place_do_not_matter(d: int, kind: str) -> None:
    queries, rows = torch.randn(20, d), torch.randn(900, d)
    whole = search(queries, rows, 40, kind=kind, backend="triton")
    for b in (0, 19):
        alone = search(queries[b], rows, 40, kind=kind, backend="triton")
        assert_same(alone, gk.TopK(whole.values[b], whole.indices[b]))
        few = search(queries[b], rows, 5, kind=kind, backend="triton")  # another kernel
        assert_same(few, gk.TopK(whole.values[b, :5], whole.indices[b, :5]))
    shifted = search(queries, torch.cat([torch.zeros(77, d), rows]), 40, kind=kind, backend="triton")
    assert torch.equal(shifted.values.view(torch.int32), whole.values.view(torch.int32))
    assert torch.equal(shifted.indices, whole.indices + 77)


# ---- hard tables, failed thresholds ----


TABLES = ["constant", "two values", "ascending", "descending", "nan", "-inf", "best last"]


@pytest.mark.parametrize(
    ("which", "k"),
    slow_except([("constant", 9), ("nan", 9), ("best last", 120)], [(which, k) for which in TABLES for k in (9, 120)]),
)
def test_hard_tables(which: str, k: int) -> None:
    N = 2100
    queries, rows = torch.rand(3, 2) + 0.1, table(which, N)
    check(queries, rows, k, "float32")
    if which in ("constant", "two values", "-inf"):
        check(queries, rows, k, "float32", ids=torch.randperm(N))  # order of ties differs from the order of positions


@pytest.mark.parametrize(
    ("which", "external"),
    slow_except(
        [("ascending", True)],
        [(which, ids) for which in ("constant", "ascending", "descending", "best last") for ids in (False, True)],
    ),
)
def test_overflow(which: str, external: bool, change_plan: Any, record: Record) -> None:
    """Lists with room for 2 k candidates overflow, and `collect` runs."""
    N, k, B = 2100, 70, 4
    change_plan(room=2 * k, collected=2)
    queries, rows = torch.rand(B, 2) + 0.1, table(which, N)
    ids = torch.randperm(N) if external else None
    exclude = search(queries, rows, 30, kind="float32", backend="reference", ids=ids).indices
    check(queries, rows, k, "float32", ids=ids, exclude=exclude)
    assert any(record.pending[0])


def sampled_rows(N: int, size: int) -> np.ndarray:
    """The sample of mips_topk_kernels.py."""
    i = np.arange(size, dtype=np.uint64)
    mixed = (i + np.uint64(1)) * np.uint64(0x9E3779B1) & np.uint64(0xFFFFFFFF)
    width, longer = np.uint64(N // size), np.uint64(N % size)
    return (i * width + np.minimum(i, longer) + (mixed * (width + (i < longer)) >> np.uint64(32))).astype(np.int64)


@pytest.mark.parametrize(
    ("external", "kind"),
    slow_except([(True, "float32")], [(external, kind) for external in (False, True) for kind in KINDS]),
)
def test_a_sample_that_misleads(external: bool, kind: str, record: Record) -> None:
    """The sample has the k - 1 best rows, so the threshold is too high, except for the query that ranks them last."""
    B, N, k = 3, 2500, 100
    plan = launches.make_plan(backend.INTERPRETER, B, N, 2, k, getattr(torch, kind), 0)
    best = torch.from_numpy(sampled_rows(N, plan.sampled)[: k - 1])
    rows = torch.rand(N, 2)
    rows[best] += 10
    queries = torch.rand(B, 2) + 0.1
    queries[1] *= -1
    check(queries, rows, k, kind, ids=torch.randperm(N) if external else None)
    assert record.pending == [[True, False, True]]


def test_queries_that_differ() -> None:
    """Masks per query: most rows, a few, none, and all but the 300 best."""
    B, N, k = 5, 2600, 80
    queries, rows = torch.randn(B, 3), torch.randn(N, 3)
    allow = torch.ones(B, N, dtype=torch.bool)
    allow[0] = torch.rand(N) < 0.02
    allow[1] = False
    exclude = torch.full((B, 300), -1)
    exclude[2] = search(queries, rows, 300, kind="float32", backend="reference").indices[2]
    exclude[3] = torch.randint(0, N, (300,))
    check(queries, rows, k, "float32", allow=allow, exclude=exclude)
    check(queries, rows, 12, "float32", allow=allow, exclude=exclude)


def test_more_queries_than_the_workspace_holds(monkeypatch: pytest.MonkeyPatch, record: Record) -> None:
    from grank_kernels.backends.triton import mips_topk_plan

    monkeypatch.setattr(mips_topk_plan, "_WORKSPACE", 1)
    queries, rows = torch.randn(35, 6), torch.randn(230, 6)
    exclude = (torch.arange(36) * 2, torch.randint(0, 230, (70,)))
    check(queries, rows, 70, "float32", exclude=exclude, allow=torch.rand(35, 230) < 0.8)
    assert record.names.count("scan") == 3  # 16 + 16 + 3 queries


@pytest.mark.parametrize("k", [20, 70])
def test_int8_scales_at_the_limits(k: int) -> None:
    """`scan` compares int8 scores without the query's scale; results must not depend on that."""
    queries = torch.tensor([[3e38, 3e38], [3e38, -3e38], [1.0, 1.0], [1e-38, 2e-38], [1e-45, 0.0], [0.0, 0.0]])
    rows = torch.tensor(
        [[1e38, -1e38], [1e38, 1e38], [-1e38, -1e38], [1.0, 1.0], [-1.0, 1.0], [0.0, 0.0], [1e-40, 3e-40], [1e-45, 0.0]]
    )
    got = check(queries, rows.repeat(70, 1), k, "int8")
    assert got.values[0, 0] == math.inf
    check(queries, -rows[3:].repeat(110, 1), k, "int8")


def in_chunks(size: int) -> Any:
    """Searches chunk by chunk like rows in host memory, without the copies."""

    def chunks(items: torch.Tensor, row_scale: torch.Tensor | None, device: torch.device) -> Iterator[launches.Chunk]:
        for base in range(0, len(items), size):
            part = slice(base, base + size)
            yield launches.Chunk(base, items[part], None if row_scale is None else row_scale[part])

    return chunks


@pytest.mark.parametrize(
    ("which", "k"),
    slow_except(
        [("constant", 9), ("ascending", 110)],
        [(which, k) for which in ("constant", "ascending", "nan", "best last") for k in (9, 110)],
    ),
)
def test_chunks(which: str, k: int, monkeypatch: pytest.MonkeyPatch, record: Record) -> None:
    """The k best and the threshold pass from chunk to chunk; a chunk with every row above it overflows the list."""
    monkeypatch.setattr(launches, "chunks", in_chunks(800))
    make_plan = launches.make_plan

    def plan_of_a_chunk(device: Any, B: int, N: int, *shape: Any) -> Any:
        plan = make_plan(device, B, 800, *shape)
        return dataclasses.replace(plan, room=300) if plan.sampled else plan

    monkeypatch.setattr(launches, "make_plan", plan_of_a_chunk)
    N = 2100
    queries, rows = torch.rand(3, 2) + 0.1, table(which, N)
    more = {"exclude": torch.randint(-1, N, (3, 40)), "allow": torch.rand(3, N) < 0.9}
    check(queries, rows, k, "float32", **more)
    check(queries, rows, k, "int8" if which not in ("nan", "-inf") else "float16", ids=torch.randperm(N), **more)
    assert record.names.count("select") >= 6
    if which == "ascending" and k == 110:
        assert all(record.pending[1])


# ---- addresses ----


@pytest.mark.parametrize("k", [20, 60])
def test_rows_beyond_2_to_the_31_elements(k: int) -> None:
    stride, rows = 2**25 + 3, torch.randn(130, 20)
    far = reserved(130 * stride, rows.dtype).as_strided((130, 20), (stride, 1))
    far.copy_(rows)
    got = gk.mips_topk(rows[:3], far, k, backend="triton")
    assert_same(got, expected(rows[:3], rows, k, kind="float32", backend="reference"))


@pytest.mark.parametrize("k", [20, 90])
def test_positions_beyond_2_to_the_31(k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    queries, rows, far = integers(3, 12), integers(700, 12), 3_000_000_000

    def chunks(items: torch.Tensor, *_: Any) -> Iterator[launches.Chunk]:
        yield launches.Chunk(0, items[:400], None)
        yield launches.Chunk(far, items[400:], None)

    monkeypatch.setattr(launches, "chunks", chunks)
    got = gk.mips_topk(queries, rows, k, backend="triton")
    places = torch.cat([torch.arange(400), far + torch.arange(300)])
    assert_same(got, expected(queries, rows, k, kind="float32", backend="reference", ids=places))
    assert (got.indices > 2**31).any()


def test_allow_beyond_2_to_the_31_elements() -> None:
    queries, rows, mask = torch.randn(4, 20), torch.randn(70, 20), torch.rand(4, 70) < 0.5
    far = reserved(3 * (2**30 + 5) + 70, torch.bool).as_strided((4, 70), (2**30 + 5, 1))
    far.copy_(mask)
    got = gk.mips_topk(queries, rows, 30, allow=far, backend="triton")
    assert_same(got, expected(queries, rows, 30, kind="float32", backend="reference", allow=mask))


def test_too_many_rows() -> None:
    rows = torch.zeros(1, 4).expand(2**32, 4)
    with pytest.raises(ValueError, match="items have 4294967296 rows; one search takes at most 4294967295"):
        gk.mips_topk(torch.zeros(1, 4), rows, 1, backend="triton")


# ---- the op ----


@pytest.mark.slow
def test_opcheck() -> None:
    queries, rows = torch.randn(3, 10).requires_grad_(), torch.randn(50, 10).requires_grad_()
    filters = torch.tensor([0, 2, 2, 5]), torch.tensor([1, 4, 9, -1, 49])
    torch.library.opcheck(
        torch.ops.grank.mips_topk.default, (queries, rows, None, None, 5, *filters, torch.rand(3, 50) < 0.5, "triton")
    )


def test_compile() -> None:
    torch.compiler.reset()
    compiled = torch.compile(
        lambda q, x: gk.mips_topk(q * 2, x, 4, backend="triton").values.tanh(), fullgraph=True, backend="aot_eager"
    )
    queries, rows = torch.randn(3, 8), torch.randn(90, 8)
    torch.testing.assert_close(compiled(queries, rows), torch.topk(queries * 2 @ rows.T, 4).values.tanh())


def test_bad_excluded_ids() -> None:
    with pytest.raises(ValueError, match=r"exclude must hold ids in \[-1, 50\), -1 for none, got 50"):
        gk.mips_topk(torch.zeros(1, 4), torch.zeros(50, 4), 1, exclude=torch.tensor([[50]]), backend="triton")


# ---- a package without a GPU, or without Triton ----

REFUSED = """
import importlib.util, sys
find_spec = importlib.util.find_spec
if {blocked}:
    importlib.util.find_spec = lambda name, package=None: None if name == "triton" else find_spec(name, package)
import torch, grank_kernels as gk
assert "triton" not in sys.modules
print(gk.show_config())
try:
    gk.mips_topk(torch.zeros(1, 2), torch.zeros(3, 2), 1, backend="triton")
except ValueError as error:
    print(error)
print(gk.mips_topk(torch.ones(1, 2), torch.ones(3, 2), 1).indices.tolist())
assert "triton" not in sys.modules
"""


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize(
    ("blocked", "reason"),
    [(False, "there is no GPU; with TRITON_INTERPRET=1 in the environment"), (True, "triton is not installed")],
)
def test_says_why_it_cannot_run(blocked: bool, reason: str) -> None:
    done = run_python(REFUSED.format(blocked=blocked))
    assert done.returncode == 0, done.stderr
    assert f"backend triton: {reason}" in done.stdout
    assert f"backend 'triton' cannot run: {reason}" in done.stdout
    assert done.stdout.endswith("[[0]]\n")


def test_zero_and_infinity() -> None:
    queries = torch.tensor([[1.0, 0.0], [-1.0, -0.0], [0.0, -0.0]])
    rows = torch.tensor([[0.0, 1.0], [-0.0, 1.0], [math.inf, 1.0], [-math.inf, 1.0], [math.nan, 0.0], [1e-38, 0.0]])
    for k in (4, 40):
        check(queries, rows.repeat(20, 1), k, "float32")
