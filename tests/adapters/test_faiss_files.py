"""Files of indexes: ours, FAISS's, and damaged ones."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from grank_kernels import ItemTable
from grank_kernels.adapters import faiss as ours

theirs: Any = pytest.importorskip("faiss")

X = np.random.default_rng(2).integers(-9, 10, (50, 5)).astype(np.float32)
IDS = np.random.default_rng(3).permutation(900)[:50]
KINDS = ["IndexFlatIP", "IndexFlatL2", "IndexIDMap", "IndexIDMap2"]


def built(faiss: Any, kind: str, n: int = 50, ids: np.ndarray = IDS) -> Any:
    if not kind.startswith("IndexIDMap"):
        index = getattr(faiss, kind)(5)
        index.add(X[:n])
        return index
    index = getattr(faiss, kind)(faiss.IndexFlatIP(5))
    index.add_with_ids(X[:n], ids[:n])
    return index


def assert_same(index: Any, other: Any) -> None:
    assert index.ntotal == other.ntotal
    n = max(1, other.ntotal)
    for got, wanted in zip(index.search(X, n), other.search(X, n), strict=True):
        np.testing.assert_array_equal(got, wanted)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n", [0, 50])
def test_written_and_read(kind: str, n: int, tmp_path: Path) -> None:
    ours.write_index(built(ours, kind, n), tmp_path / "index")
    again, other = ours.read_index(str(tmp_path / "index")), built(theirs, kind, n)
    assert_same(again, other)
    for index in (again, other):
        if not kind.startswith("IndexIDMap"):
            index.add(X[:3])
        elif n:  # an empty table has no ids
            index.add_with_ids(X[:3], np.array([5000, 5001, 5002]))
    assert_same(again, other)


def test_the_file_is_that_of_a_table(tmp_path: Path) -> None:
    ours.write_index(built(ours, "IndexIDMap"), tmp_path / "index")
    table = ItemTable.load(tmp_path / "index")
    assert table.ids.tolist() == IDS.tolist()
    assert (table.rows(IDS).numpy() == X).all()
    mapped = ours.read_index(tmp_path / "index", ours.IO_FLAG_MMAP)
    assert_same(mapped, built(theirs, "IndexIDMap"))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.int8])
def test_precisions(dtype: torch.dtype, tmp_path: Path) -> None:
    index = ours.IndexIDMap(ours.IndexFlatIP(5, dtype=dtype))
    index.add_with_ids(X, IDS)
    index.remove_ids(IDS[10:20])
    index.add_with_ids(X[:3], np.array([1000, 1001, 1002]))
    ours.write_index(index, tmp_path / "index")
    again = ours.read_index(tmp_path / "index")
    assert again.table.dtype == dtype
    assert_same(again, index)


def test_rows_keep_their_positions_after_a_removal(tmp_path: Path) -> None:
    index, other = built(ours, "IndexFlatIP"), built(theirs, "IndexFlatIP")
    for each in (index, other):
        each.remove_ids(np.array([0, 7, 49]))
        each.add(X[:2])
    ours.write_index(index, tmp_path / "index")
    assert_same(ours.read_index(tmp_path / "index"), other)


@pytest.mark.parametrize("ids", [np.arange(50) - 20, np.arange(50) // 2], ids=["negative", "repeated"])
def test_ids_that_a_table_cannot_have(ids: np.ndarray, tmp_path: Path) -> None:
    ours.write_index(built(ours, "IndexIDMap", ids=ids), tmp_path / "index")
    assert_same(ours.read_index(tmp_path / "index"), built(theirs, "IndexIDMap", ids=ids))
    assert_same(theirs.read_index(str(tmp_path / "index")), built(theirs, "IndexIDMap", ids=ids))
    half = ours.IndexIDMap(ours.IndexFlatIP(5, dtype=torch.float16))
    half.add_with_ids(X, ids)
    with pytest.raises(ValueError, match="index must have float32 rows and unique ids"):
        ours.write_index(half, tmp_path / "half")
    assert not (tmp_path / "half").exists()


@pytest.mark.parametrize("kind", KINDS)
def test_faiss_reads_our_bytes_and_we_read_its(kind: str, tmp_path: Path) -> None:
    other = built(theirs, kind)
    theirs.write_index(other, str(tmp_path / "theirs"))
    again = ours.read_index(tmp_path / "theirs")
    assert type(again).__name__ == kind
    assert_same(again, other)
    data = ours.serialize_index(built(ours, kind))
    np.testing.assert_array_equal(data, theirs.serialize_index(other))
    assert_same(ours.deserialize_index(data), other)


def test_other_kinds_of_faiss_are_named(tmp_path: Path) -> None:
    theirs.write_index(theirs.IndexHNSWFlat(5, 8), str(tmp_path / "graph"))
    with pytest.raises(ours.FaissError, match=r"must hold a flat index of FAISS.*got the kind 'IHNf'"):
        ours.read_index(tmp_path / "graph")
    theirs.write_index(theirs.IndexFlat(5, theirs.METRIC_L1), str(tmp_path / "metric"))
    with pytest.raises(ours.FaissError, match="got the metric 2"):
        ours.read_index(tmp_path / "metric")


@pytest.mark.parametrize("kind", KINDS)
def test_every_truncation_is_noticed(kind: str) -> None:
    data = theirs.serialize_index(built(theirs, kind, 3))
    for end in range(4, len(data)):
        with pytest.raises(ours.FaissError, match=r"truncated|damaged"):
            ours.deserialize_index(data[:end])
    with pytest.raises(ours.FaissError, match="1 bytes follow the index"):
        ours.deserialize_index(np.append(data, np.uint8(0)))


@pytest.mark.parametrize("kind", KINDS)
def test_every_changed_bit_of_a_header_is_noticed_or_harmless(kind: str) -> None:
    data = theirs.serialize_index(built(theirs, kind, 3))
    structure = 45 if not kind.startswith("IndexIDMap") else 82  # bytes before the rows
    for byte in range(structure):
        for bit in range(8):
            changed = data.copy()
            changed[byte] ^= 1 << bit
            try:
                index = ours.deserialize_index(changed)
            except ours.FaissError:
                continue
            assert type(index).__name__ != kind, (byte, bit)  # IxMp and IxM2 may turn into one another


def test_files_that_are_no_index(tmp_path: Path) -> None:
    with pytest.raises(ours.FaissError, match=r"fname must be a table file or a flat index of FAISS: .*No such file"):
        ours.read_index(tmp_path / "none")
    (tmp_path / "other").write_bytes(b"I am something else")
    with pytest.raises(ours.FaissError, match="got the kind 'I am'"):
        ours.read_index(tmp_path / "other")
    (tmp_path / "pickle").write_bytes(b"\x80\x04K\x01." * 100)
    with pytest.raises(ours.FaissError, match="fname must be a table file"):
        ours.read_index(tmp_path / "pickle")
    with pytest.raises(ours.FaissError, match="io_flags must be 0 or IO_FLAG_MMAP"):
        ours.read_index(tmp_path / "other", 64)
