"""Certified tables on the triton backend, in the strict interpreter: equal bits to its exact search."""

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hard_tables import slow_except
from hypothesis import given, settings
from mips_topk_cases import Problem, both, operands, problems, rows_like
from oracle import assert_same, expected

import grank_kernels as gk
from grank_kernels.backends import triton as backend

pytest.importorskip("triton")
if backend.unavailable() is not None or not backend.INTERPRETED:
    pytest.skip("kernels run on the GPU; TRITON_INTERPRET=1 runs these tests", allow_module_level=True)

from emulation.triton_interpreter import strict

from grank_kernels.backends.triton import mips_topk_launches as launches

FLOATS = ("float32", "float16", "bfloat16")
N = 1400  # above 32 k


@pytest.fixture(scope="module", autouse=True)
def _strict() -> Iterator[None]:
    """The strict interpreter, with correct bfloat16 products."""
    with pytest.MonkeyPatch.context() as patch, strict():
        patch.setattr(backend, "_MULTIPLIES_BFLOAT16", True)
        yield


def rescored(queries: torch.Tensor, table: gk.ItemTable, k: int, **more: Any) -> list[int]:
    return [int(n) for n in gk.count_rescored(queries, table, k, backend="triton", **more)]


@pytest.mark.parametrize(
    ("shape", "kind"),
    slow_except(
        [("heavy rows", "float32"), ("low rank", "float16")],
        [(shape, kind) for shape in ("heavy rows", "low rank") for kind in FLOATS],
    ),
)
def test_the_result_is_that_of_the_exact_scan(shape: str, kind: str) -> None:
    queries, rows = torch.randn(3, 24), rows_like(shape, N, 24)
    for k in (6, 40):
        table = both(queries, rows, k, kind, "triton")
        assert max(rescored(queries, table, k)) <= 2 * k + 64


@pytest.mark.parametrize("kind", slow_except(["float32"], ["float32", "float16"]))
def test_filters(kind: str) -> None:
    queries, rows = torch.randn(4, 20), torch.randn(N, 20)
    ids = torch.randperm(N) + 2**40
    seen = torch.cat(
        [gk.mips_topk(queries, gk.ItemTable.from_rows(rows, ids=ids), 30).indices, ids[:1].expand(4, 1)], 1
    )
    for allow in (torch.rand(N) < 0.6, torch.rand(4, N) < 0.6):
        both(queries, rows, 20, kind, "triton", ids=ids, exclude=seen, allow=allow)
    few = torch.zeros(N, dtype=torch.bool)
    few[::100] = True  # 14 rows: the list holds all eligible rows, so no bound is checked
    table = both(queries, rows, 20, kind, "triton", allow=few)
    assert rescored(queries, table, 20, allow=few) == [14] * 4


@pytest.mark.slow
def test_wide_rows_and_tiles_of_queries() -> None:
    both(torch.randn(2, 300), torch.randn(700, 300), 20, "float16", "triton")
    both(torch.randn(17, 8), torch.randn(N, 8), 3, "float32", "triton")


@pytest.mark.parametrize("k", slow_except([3], [3, 40]))
def test_undecided_queries_are_collected(k: int) -> None:
    queries = torch.cat([torch.randn(2, 12), torch.zeros(1, 12)])
    for shape in ("equal", "clusters"):
        table = both(queries, rows_like(shape, N, 12), k, "float32", "triton")
        assert rescored(queries, table, k)[2] == N
    table = both(queries, rows_like("equal", N, 12), k, "float16", "triton")
    assert rescored(queries, table, k) == [N] * 3


@pytest.mark.parametrize("k", slow_except([5], [5, 30]))
def test_infinities_and_nan_among_rows_and_queries(k: int) -> None:
    rows, queries = torch.randn(N, 9), torch.randn(7, 9)
    rows[::97, 2], rows[5::97, 3], rows[7::97, 1], rows[9::97] = math.inf, -math.inf, math.nan, 3e38
    queries[1, 2], queries[2, 4], queries[3], queries[4], queries[5] = math.inf, math.nan, 0, 1e-44, 3e38
    table = both(queries, rows, k, "float32", "triton")
    assert rescored(queries, table, k)[1:6] == [N] * 5


@pytest.mark.slow
@settings(max_examples=8)
@given(problem=problems(kinds=FLOATS))
def test_every_bit(problem: Problem) -> None:
    p = problem
    rows, queries = p.rows[:, :128], p.queries[:, :128]  # wider rows are not summed in the reference's order
    k = 1 + p.k % 5
    filters = {name: value for name, value in p.filters.items() if name != "ids"}
    table = gk.ItemTable.from_rows(rows, ids=p.filters.get("ids"), dtype=getattr(torch, p.kind), coarse=torch.int8)
    got = gk.mips_topk(queries, table, k, backend="triton", **filters)
    assert_same(got, expected(queries, rows, k, kind=p.kind, backend="reference", **p.filters))


def test_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    names: list[str] = []
    run = launches.Launch.run

    def recorded(self: Any) -> None:
        names.append(self.kernel.__name__)
        run(self)

    monkeypatch.setattr(launches.Launch, "run", recorded)
    table = gk.ItemTable.from_rows(torch.randn(N, 16), coarse=torch.int8)
    gk.mips_topk(torch.randn(2, 16), table, 40, backend="triton")
    found = ["sample", "threshold", "scan", "select", "collect", "select"]
    assert names == [*found, "threshold", "rescore", "select", "collect", "select", "rank"]


def test_rows_on_another_device_are_searched_without_the_copy() -> None:
    queries, rows = torch.randn(2, 8), torch.randn(40, 8, device="meta")
    assert "items on meta" in str(backend.mips_topk_certified_unsupported(queries, rows))


@pytest.mark.slow
def test_opcheck() -> None:
    torch.library.opcheck(torch.ops.grank.mips_topk_certified, operands("triton"))
