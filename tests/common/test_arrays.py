"""NumPy arrays and DLPack objects as arguments: equal results, no copy, no warning."""

from typing import Any

import numpy as np
import pytest
import torch
from oracle import assert_same

import grank_kernels as gk
from grank_kernels.common.arrays import as_tensor
from grank_kernels.mips_topk import TopKArrays

QUERIES, ROWS = torch.randn(3, 8), torch.randn(50, 8)


class Foreign:
    """Another library's array: an object with `__dlpack__`."""

    def __init__(self, x: torch.Tensor):
        self._x = x

    def __dlpack__(self, **options: Any) -> Any:
        return self._x.__dlpack__(**options)

    def __dlpack_device__(self) -> Any:
        return self._x.__dlpack_device__()


def frozen(x: torch.Tensor) -> np.ndarray:
    array = x.numpy().copy()
    array.setflags(write=False)
    return array


KINDS = {"array": torch.Tensor.numpy, "read-only": frozen, "dlpack": Foreign}


@pytest.mark.parametrize("kind", KINDS)
def test_arrays_give_the_results_of_tensors(kind: str) -> None:
    convert = KINDS[kind]
    exclude, allow = torch.randint(-1, 50, (3, 4)), torch.rand(50) < 0.7
    pair = torch.tensor([0, 1, 1, 2]), torch.tensor([7, 9])
    for given in ({}, {"exclude": exclude, "allow": allow}, {"exclude": pair}):
        want = gk.mips_topk(QUERIES, ROWS, 10, **given)  # type: ignore[call-overload]
        arrays: dict[str, Any] = {
            name: tuple(map(convert, x)) if isinstance(x, tuple) else convert(x)  # type: ignore[arg-type]
            for name, x in given.items()
        }
        got = gk.mips_topk(convert(QUERIES), convert(ROWS), 10, **arrays)  # type: ignore[arg-type]
        assert isinstance(got, TopKArrays if kind != "dlpack" else gk.TopK)
        assert isinstance(got.values, np.ndarray if kind != "dlpack" else torch.Tensor)
        assert_same(gk.TopK(*map(torch.as_tensor, got)), want)


def test_the_type_of_queries_decides_the_type_of_results() -> None:
    table = gk.ItemTable.from_rows(ROWS.numpy(), ids=np.arange(50) * 2)
    out = torch.empty(3, 5), torch.empty(3, 5, dtype=torch.int64)
    arrays, tensors = gk.mips_topk(QUERIES.numpy(), table, 5, out=out), gk.mips_topk(QUERIES, table, 5)
    assert np.shares_memory(arrays.values, out[0].numpy())
    assert np.shares_memory(arrays.indices, out[1].numpy())
    assert arrays.indices.tolist() == tensors.indices.tolist()
    one = gk.mips_topk(QUERIES[0].numpy(), torch.nn.Parameter(ROWS), np.arange(6).max())  # requires a gradient
    assert one.values.tolist() == tensors.values[0].tolist()


def test_tables_take_arrays() -> None:
    rows, ids = frozen(ROWS), np.arange(50) + 100
    table, model = gk.ItemTable.from_rows(rows, ids=ids), gk.ItemTable.from_rows(ROWS, ids=torch.arange(50) + 100)
    table.upsert(ids[:3], rows[3:6])
    model.upsert(torch.arange(3) + 100, ROWS[3:6])
    table.remove(ids[7:9])
    model.remove(torch.arange(7, 9) + 100)
    assert_same(gk.mips_topk(QUERIES, table, 50), gk.mips_topk(QUERIES, model, 50))
    assert torch.equal(table.rows(ids[:3]), ROWS[3:6])


def test_parts_of_a_file_may_be_arrays(tmp_path: Any) -> None:
    seen: list[tuple[int, int]] = []
    parts = [part.numpy() for part in ROWS.split(20)]
    gk.ItemTable.write(tmp_path / "table", parts, num_rows=50, progress=lambda *counts: seen.append(counts))
    assert seen == [(20, 50), (40, 50), (50, 50)]
    assert torch.equal(gk.ItemTable.load(tmp_path / "table").rows(torch.arange(50)), ROWS)


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_copied(kind: str) -> None:
    array = KINDS[kind](ROWS)  # type: ignore[operator]
    address = ROWS.data_ptr() if kind == "dlpack" else array.ctypes.data
    assert as_tensor("rows", array).data_ptr() == address
    assert as_tensor("rows", array[::2] if kind != "dlpack" else array).data_ptr() == address


def test_memory_lives_as_long_as_its_tensor() -> None:
    tensor = as_tensor("rows", frozen(torch.full((1 << 18,), 7.0)))
    others = [np.zeros(1 << 18, np.float32) for _ in range(4)]  # would reuse freed memory
    assert bool((tensor == 7).all())
    assert len(others) == 4


@pytest.mark.parametrize(
    ("queries", "error", "message"),
    [
        (
            QUERIES.numpy().astype(np.float64),
            ValueError,
            r'queries must be .*, got torch\.float64: queries\.astype\("float32"\) converts',
        ),
        (QUERIES.numpy().astype(object), TypeError, r"queries: can't convert np\.ndarray of type numpy\.object_"),
        (QUERIES.numpy()[::-1], ValueError, r"queries: .*negative"),
        (QUERIES.numpy().astype(">f4"), ValueError, r"queries: .*byte order"),
        (QUERIES.tolist(), TypeError, r"queries must be a torch\.Tensor or an array, got list"),
    ],
)
def test_arrays_that_do_not_fit_are_named(queries: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        gk.mips_topk(queries, ROWS, 3)
