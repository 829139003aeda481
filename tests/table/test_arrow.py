"""Columns of Arrow as rows of a table."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from grank_kernels import ItemTable

pa: Any = pytest.importorskip("pyarrow")
parquet: Any = pytest.importorskip("pyarrow.parquet")
dataset: Any = pytest.importorskip("pyarrow.dataset")

X = np.random.default_rng(1).standard_normal((30, 4)).astype(np.float32)


def fixed(x: np.ndarray) -> Any:
    return pa.FixedSizeListArray.from_arrays(pa.array(x.ravel()), x.shape[1])


COLUMNS: dict[str, Any] = {
    "fixed-size lists": fixed(X),
    "a slice": fixed(np.concatenate([X[:2], X, X[:3]]))[2:32],
    "chunks": pa.chunked_array([fixed(X[:7]), fixed(X[7:7]), fixed(X[7:])]),
    "lists": pa.array(X.tolist(), pa.list_(pa.float32())),
    "a slice of lists": pa.array([[9.0], *X.tolist()], pa.list_(pa.float32()))[1:],
    "large lists": pa.array(X.tolist(), pa.large_list(pa.float32())),
    "tensors": pa.FixedShapeTensorArray.from_numpy_ndarray(X),
}


@pytest.mark.parametrize("column", COLUMNS.values(), ids=COLUMNS)
def test_rows_of_a_column(column: Any) -> None:
    table = ItemTable.from_rows(column)
    assert table.dtype == torch.float32
    np.testing.assert_array_equal(table.rows(np.arange(30)), X)
    table.upsert(np.arange(5, 35), column)
    np.testing.assert_array_equal(table.rows(np.arange(5, 35)), X)


def test_a_single_chunk_is_not_copied_on_the_way() -> None:
    from grank_kernels.common.arrow import matrix_of

    values = pa.array(X.ravel())
    matrix = matrix_of("rows", pa.FixedSizeListArray.from_arrays(values, 4))
    assert matrix.ctypes.data == values.buffers()[1].address


def test_half_precision_and_no_rows() -> None:
    assert ItemTable.from_rows(fixed(X.astype(np.float16))).dtype == torch.float16
    table = ItemTable.from_rows(pa.chunked_array([], pa.list_(pa.float32(), 4)))
    assert (len(table), table.dim) == (0, 4)


@pytest.mark.parametrize(
    ("column", "error", "message"),
    [
        (pa.array([1.0, 2.0]), TypeError, "rows must be a column of lists of numbers, got double"),
        (pa.array([["a"]]), TypeError, "rows must be a column of lists of numbers, got list<item: string>"),
        (pa.array([[1.0], None]), ValueError, "rows must have no nulls"),
        (pa.array([[1.0], [None]]), ValueError, "rows must have no nulls"),
        (pa.array([[1.0], [1.0, 2.0]]), ValueError, r"rows must be lists of one length, got lengths \[1, 2\]"),
        (pa.array([[1.0], [2.0]]), ValueError, "rows must be torch.float32, .* got torch.float64"),
    ],
)
def test_refused(column: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ItemTable.from_rows(column)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for i, part in enumerate(np.split(X, [11, 11, 20])):
        columns = {"title": [f"{i}"] * len(part), "embedding": fixed(part)}
        parquet.write_table(pa.table(columns), tmp_path / f"{i}.parquet")
    return tmp_path


@pytest.mark.parametrize("column", [None, "embedding"])
def test_a_file_from_parts_in_parquet(column: str | None, folder: Path, tmp_path: Path) -> None:
    parts, done = dataset.dataset(folder, format="parquet"), []
    ItemTable.write(
        tmp_path / "table", parts, column=column, dtype=torch.float16, progress=lambda n, of: done.append(n)
    )
    table = ItemTable.load(tmp_path / "table", mmap=True)
    np.testing.assert_array_equal(table.rows(np.arange(30)), X.astype(np.float16))
    assert done[-1] == 30
    ItemTable.write(tmp_path / "table", parts.to_table(), num_rows=30)
    np.testing.assert_array_equal(ItemTable.load(tmp_path / "table").rows(np.arange(30)), X)


def test_columns_that_are_not_there(folder: Path, tmp_path: Path) -> None:
    parts = dataset.dataset(folder, format="parquet")
    with pytest.raises(ValueError, match=r"column must be one of \['title', 'embedding'\], got 'vector'"):
        ItemTable.write(tmp_path / "table", parts, column="vector")
    with pytest.raises(
        ValueError, match=r"column must name the column of rows, got None and the columns of lists \[\]"
    ):
        ItemTable.write(tmp_path / "table", pa.table({"title": ["a"]}))
    with pytest.raises(ValueError, match="column must be None unless parts are a Dataset or Table"):
        ItemTable.write(tmp_path / "table", [torch.zeros(1, 2)], num_rows=1, column="embedding")
    with pytest.raises(TypeError, match="num_rows must be an int, got NoneType"):
        ItemTable.write(tmp_path / "table", [torch.zeros(1, 2)])
    assert not (tmp_path / "table").exists()
