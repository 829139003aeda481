import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import BACKENDS, KINDS, assert_same, quantise, search

from grank_kernels import ItemTable, mips_topk

FLOATS = KINDS[:3]


def dtype_of(kind: str) -> torch.dtype:
    dtype = getattr(torch, kind)
    assert isinstance(dtype, torch.dtype)
    return dtype


# ---- stored rows ----


@pytest.mark.parametrize("kind", FLOATS)
@pytest.mark.parametrize("source", FLOATS)
def test_float_rows_are_rounded_once(source: str, kind: str) -> None:
    rows = torch.randn(50, 7).to(dtype_of(source))
    table = ItemTable.from_rows(rows, dtype=dtype_of(kind))
    assert table.dtype == dtype_of(kind)
    assert torch.equal(table.rows(torch.arange(50)), rows.to(dtype_of(kind)).float())


@pytest.mark.parametrize("source", FLOATS)
def test_dtype_of_the_rows_is_kept(source: str) -> None:
    assert ItemTable.from_rows(torch.randn(5, 3).to(dtype_of(source))).dtype == dtype_of(source)


def assert_quantised(rows: torch.Tensor) -> None:
    table = ItemTable.from_rows(rows, dtype=torch.int8)
    numbers, scale = quantise(rows.float().numpy())
    kept, kept_scale, ids, _ = table.operands()
    assert (kept.dtype, kept.shape, ids) == (torch.int8, rows.shape, None)
    assert kept_scale is not None
    assert kept_scale.dtype == torch.float32
    assert np.array_equal(kept.numpy(), numbers)
    assert np.array_equal(kept_scale.numpy().view(np.int32), scale.view(np.int32))
    with np.errstate(over="ignore"):  # 127 * (3.4e38 / 127)
        dequantised = numbers.astype(np.float32) * scale[:, None]
    assert np.array_equal(table.rows(torch.arange(len(rows))).numpy(), dequantised)


@pytest.mark.parametrize("source", FLOATS)
def test_int8_formula(source: str) -> None:
    assert_quantised((torch.randn(3000, 37) * torch.randn(3000, 1).exp()).to(dtype_of(source)))


def test_int8_rounds_half_to_even() -> None:
    rows = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 126.5]])
    table = ItemTable.from_rows(rows, dtype=torch.int8)
    assert table.operands()[0].tolist() == [[127, 0, 2, 2, 0, -2, -2, 126]]
    assert_quantised(rows)


@pytest.mark.parametrize(
    "rows",
    [
        torch.zeros(3, 4),
        torch.tensor([[0.0, -0.0], [1e-45, -1e-45], [1e-44, 3e-45], [1e-40, 1e-41], [3.4e38, -3.4e38]]),
        torch.zeros(2, 0),
        torch.zeros(0, 5),
    ],
    ids=["zeros", "subnormal and large", "no columns", "no rows"],
)
def test_int8_of_odd_rows(rows: torch.Tensor) -> None:
    assert_quantised(rows)


@settings(max_examples=200)
@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=8))
def test_int8_of_any_row(row: list[float]) -> None:
    assert_quantised(torch.tensor([row], dtype=torch.float32))


def test_int8_of_a_table_larger_than_a_step() -> None:
    rows = torch.randn(2, 5).repeat(3, 1).repeat_interleave(1 << 18, 0)  # 1.6 million rows, quantised in two steps
    rows *= torch.arange(1, len(rows) + 1)[:, None] / len(rows)
    rows = rows[:, :3]
    assert_quantised(rows)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_int8_takes_finite_numbers(bad: float) -> None:
    rows = torch.randn(9, 4)
    rows[6, 1] = rows[7, 0] = bad
    with pytest.raises(ValueError, match="rows must be finite for int8, got NaN or infinity in row 6"):
        ItemTable.from_rows(rows, dtype=torch.int8)
    assert len(ItemTable.from_rows(rows)) == 9


@pytest.mark.parametrize("kind", KINDS)
def test_a_table_is_a_copy(kind: str) -> None:
    rows, ids = torch.randn(20, 4).to(dtype_of(kind) if kind != "int8" else torch.float32), torch.arange(20) + 3
    table = ItemTable.from_rows(rows, ids=ids, dtype=dtype_of(kind))
    before = table.rows(torch.tensor([3, 22]))
    rows.zero_()
    ids.zero_()
    assert torch.equal(table.rows(torch.tensor([3, 22])), before)
    assert before.abs().sum() > 0
    table.rows(torch.tensor([3])).zero_()
    assert torch.equal(table.rows(torch.tensor([3, 22])), before)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_any_layout(kind: str) -> None:
    rows = torch.randn(30, 6)
    want = ItemTable.from_rows(rows, dtype=dtype_of(kind)).rows(torch.arange(30))
    for same in (rows.T.contiguous().T, rows.repeat(1, 2)[:, 6:], rows.repeat_interleave(2, 0)[::2]):
        table = ItemTable.from_rows(same, dtype=dtype_of(kind))
        assert torch.equal(table.rows(torch.arange(30)), want)
        assert table.operands()[0].is_contiguous()


@pytest.mark.parametrize("kind", ["float32", "int8"])
@pytest.mark.parametrize("shape", [(0, 4), (3, 0), (1, 1), (5, 7), (70_000, 17)])
def test_rows_begin_with_a_cache_line(kind: str, shape: tuple[int, int]) -> None:
    rows = torch.ones(shape)
    held, *_ = ItemTable.from_rows(rows, dtype=getattr(torch, kind)).operands()
    assert held.shape == shape
    assert held.data_ptr() % 64 == 0
    assert held.is_contiguous()


def test_a_table_has_no_gradient() -> None:
    rows = torch.nn.Parameter(torch.randn(5, 3))
    with pytest.warns(UserWarning, match="rows require a gradient, and an ItemTable is a copy without one") as warned:
        table = ItemTable.from_rows(rows)
    assert warned[0].filename == __file__  # the caller's line, so that Python reports it once
    with torch.no_grad():
        ItemTable.from_rows(rows)
    ItemTable.from_rows(rows.detach())
    assert not table.rows(torch.arange(5)).requires_grad
    assert not mips_topk(torch.randn(2, 3), table, 2).values.requires_grad


# ---- properties ----


@pytest.mark.parametrize(("kind", "nbytes"), [("float32", 4096), ("float16", 2048), ("bfloat16", 2048), ("int8", 1280)])
def test_size_and_text(kind: str, nbytes: int) -> None:
    table = ItemTable.from_rows(torch.randn(64, 16), dtype=dtype_of(kind))
    assert (len(table), table.dim, table.dtype, table.nbytes) == (64, 16, dtype_of(kind), nbytes)
    assert table.device == torch.device("cpu")
    assert repr(table) == f"ItemTable(64 x 16 {kind}, {nbytes / 1e6:.3g} MB, cpu)"
    with_ids = ItemTable.from_rows(torch.randn(64, 16), dtype=dtype_of(kind), ids=torch.arange(64))
    assert with_ids.nbytes == nbytes + 512
    assert repr(with_ids).endswith(" MB, ids, cpu)")
    with_ids.remove(torch.arange(3))
    with_ids.remove(torch.arange(3, 5))
    assert repr(with_ids).startswith("ItemTable(59 x 16")
    assert repr(with_ids).endswith(" MB, ids, cpu, version 2)")


def test_to() -> None:
    table = ItemTable.from_rows(torch.randn(64, 16), dtype=torch.int8, ids=torch.arange(64))
    assert table.to("cpu") is table
    meta = table.to("meta")
    assert (len(meta), meta.dim, meta.dtype, meta.nbytes) == (64, 16, torch.int8, table.nbytes)
    assert {x.device.type for x in meta.operands() if x is not None} == {"meta"}


# ---- rows by id ----


@pytest.mark.parametrize("kind", KINDS)
def test_rows_by_id(kind: str) -> None:
    rows, ids = torch.randn(100, 5), torch.randperm(1000)[:100] * 10**15
    plain, table = (ItemTable.from_rows(rows, dtype=dtype_of(kind), ids=i) for i in (None, ids))
    places = torch.randint(0, 100, (3, 7))
    got = table.rows(ids[places])
    assert (got.shape, got.dtype) == ((3, 7, 5), torch.float32)
    assert torch.equal(got, plain.rows(places))
    assert table.rows(ids[4]).shape == (5,)
    assert table.rows(ids[:0]).shape == (0, 5)


UNKNOWN: list[tuple[ItemTable, list[int], tuple[int, ...]]] = [
    (ItemTable.from_rows(torch.ones(10, 2)), [9], (-1, 10, 2**40)),
    (ItemTable.from_rows(torch.ones(10, 2), ids=torch.arange(10) * 2 + 1), [19], (-1, 0, 2, 20, 2**40)),
    (ItemTable.from_rows(torch.ones(0, 2), ids=torch.arange(0)), [], (0, -1)),
    (ItemTable.from_rows(torch.ones(0, 2)), [], (0, -1)),
]


@pytest.mark.parametrize(
    ("table", "known", "wrong"), [(table, known, each) for table, known, unknown in UNKNOWN for each in unknown]
)
def test_rows_of_unknown_ids(table: ItemTable, known: list[int], wrong: int) -> None:
    with pytest.raises(ValueError, match=f"ids must be in the table, got {wrong}, which is not"):
        table.rows(torch.tensor([*known, wrong]))


# ---- searching a table ----


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", FLOATS)
def test_a_table_of_floats_searches_as_its_tensor(kind: str, backend: str) -> None:
    queries, rows = torch.randn(6, 21), torch.randn(900, 21).to(dtype_of(kind))
    want = mips_topk(queries, rows, 40, backend=backend)
    assert_same(mips_topk(queries, ItemTable.from_rows(rows), 40, backend=backend), want)
    ids = torch.arange(900) * 7 + 2**35
    got = mips_topk(queries, ItemTable.from_rows(rows, ids=ids), 40, backend=backend)
    assert torch.equal(got.values, want.values)
    assert torch.equal(got.indices, want.indices * 7 + 2**35)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
def test_scores_match_the_rows_of_the_table(kind: str, backend: str) -> None:
    """Whole numbers with a maximum of 127 in every query and row, the others below 5 in bfloat16: exact scores."""
    most = 4 if kind == "bfloat16" else 127
    queries, rows = torch.randint(-most, most + 1, (5, 30)).float(), torch.randint(-most, most + 1, (400, 30)).float()
    queries[:, 3] = 127
    rows[:, 7] = 127
    ids = torch.randperm(400) + 11
    got = search(queries, rows, 25, kind=kind, backend=backend, ids=ids)
    table = ItemTable.from_rows(rows, dtype=dtype_of(kind), ids=ids)
    scores = (queries[:, None] * table.rows(got.indices)).sum(2)
    assert torch.equal(got.values, scores)
    assert torch.equal(got.values, (queries @ rows.T).sort(dim=1, descending=True).values[:, :25])


# ---- errors ----

ROWS = torch.ones(4, 3)
ERRORS: list[tuple[type[Exception], str, Any, dict[str, Any]]] = [
    (TypeError, "rows must be a torch.Tensor or an array, got list", [[1.0]], {}),
    (TypeError, "ids must be a torch.Tensor or an array, got list", ROWS, {"ids": [1, 2, 3, 4]}),
    (ValueError, r"rows must have 2 dimensions, got \(3,\)", ROWS[0], {}),
    (ValueError, r"rows must have 2 dimensions, got \(1, 4, 3\)", ROWS[None], {}),
    (ValueError, r"rows must be .*, got torch.float64: rows.to\(torch.float32\) converts", ROWS.double(), {}),
    (ValueError, "rows must be .*, got torch.int8", ROWS.to(torch.int8), {}),
    (ValueError, "dtype must be torch.float32, .* or torch.int8, got torch.float64", ROWS, {"dtype": torch.float64}),
    (ValueError, "dtype must be .*, got 'int8'", ROWS, {"dtype": "int8"}),
    (ValueError, "coarse must be None, or torch.int8 with float rows, got torch.int8 with torch.int8 rows", ROWS,
     {"dtype": torch.int8, "coarse": torch.int8}),
    (ValueError, r"ids must be \(4,\), one a row, got \(3,\)", ROWS, {"ids": torch.arange(3)}),
    (ValueError, r"ids must have 1 dimension, got \(4, 1\)", ROWS, {"ids": torch.arange(4)[:, None]}),
    (ValueError, "ids must be torch.int64, got torch.int32", ROWS, {"ids": torch.arange(4, dtype=torch.int32)}),
    (ValueError, "ids must be unique, got 7 more than once", ROWS, {"ids": torch.tensor([7, 1, 7, 2])}),
    (ValueError, "ids must not be negative, got -5", ROWS, {"ids": torch.tensor([7, -5, 1, 2])}),
    (ValueError, "ids must be on cpu, the device of rows, got meta", ROWS, {"ids": torch.arange(4, device="meta")}),
]  # fmt: skip


@pytest.mark.parametrize(("error", "message", "rows", "more"), ERRORS)
def test_errors(error: type[Exception], message: str, rows: Any, more: dict[str, Any]) -> None:
    with pytest.raises(error, match=message):
        ItemTable.from_rows(rows, **more)


def test_errors_of_rows() -> None:
    table = ItemTable.from_rows(ROWS)
    with pytest.raises(TypeError, match=r"ids must be a torch\.Tensor or an array, got list"):
        table.rows([1])
    with pytest.raises(ValueError, match=r"ids must be torch\.int64, got torch.int32"):
        table.rows(torch.ones(1, dtype=torch.int32))
