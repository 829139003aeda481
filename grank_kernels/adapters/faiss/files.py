"""Indexes in files: a table file, or FAISS's own layout.

The layout of FAISS, little endian, as its index_write.cpp has it. Nothing is unpickled, and nothing is allocated before
the length of the file has been compared with what it says.

    fourcc      4 bytes: IxFI, IxF2, IxFl (flat), IxMp (IDMap), IxM2 (IDMap2)
    header      int32 d, int64 ntotal, 2 x int64 of 2^20, uint8 is_trained, int32 metric
    flat:       uint64 n = ntotal * d, n float32
    IDMap:      the flat index within, its fourcc included; uint64 n = ntotal, n int64
"""

import io
import os
import struct
from typing import IO, Any

import numpy as np
import numpy.typing as npt
import torch

from grank_kernels.adapters.faiss.errors import FaissError
from grank_kernels.adapters.faiss.flat import IndexFlat, IndexFlatIP, IndexFlatL2
from grank_kernels.adapters.faiss.id_map import IndexIDMap, IndexIDMap2
from grank_kernels.adapters.faiss.index import METRIC_INNER_PRODUCT, METRIC_L2, Index
from grank_kernels.common.atomic_files import replace_file
from grank_kernels.table.item_table import ItemTable
from grank_kernels.table.versions import Version

_HEADER = struct.Struct("<iqqqBi")
_UNUSED = 1 << 20  # FAISS writes this number twice
_FLAT = {b"IxFI": METRIC_INNER_PRODUCT, b"IxF2": METRIC_L2, b"IxFl": None}  # None: the header says
_ID_MAPS: dict[bytes, type[IndexIDMap]] = {b"IxMp": IndexIDMap, b"IxM2": IndexIDMap2}
_PART = 1 << 16  # rows written at a time


def write_index(index: Index, fname: str | os.PathLike[str]) -> None:
    """Writes an index to a file, atomically.

    The file is that of `ItemTable.save`, with the ids of an IDMap, and `ItemTable.load` reads it, too. What a table
    file cannot hold, L2 and ids that repeat or are negative, is written in FAISS's layout, which takes float32 rows.

    Raises:
        FaissError: the index is not one of this module, or would need FAISS's layout and has rows of 8 or 16 bits.
        OSError: the file cannot be written.
    """
    if not isinstance(index, Index):
        raise FaissError(f"index must be an index of grank_kernels.adapters.faiss, got {type(index).__name__}")
    ids = index.id_map if isinstance(index, IndexIDMap) else None
    unusual = ids is not None and len(ids) > 0 and (ids.min() < 0 or len(np.unique(ids)) < len(ids))
    if index.metric_type == METRIC_L2 or unusual:
        _check_float32(index)
        with replace_file(fname) as file:
            _write(index, file)
        return
    version = index.flat.table.current
    columns = version.compact()
    if ids is None or len(columns.rows) == 0:
        columns = columns._replace(ids=None)
    else:
        columns = columns._replace(ids=torch.from_numpy(ids[_ranks(version)]).to(columns.rows.device))
    ItemTable(Version(columns, len(columns.rows), version.basis, mapping=version.mapping)).save(fname)


def read_index(fname: str | os.PathLike[str], io_flags: int = 0) -> Index:
    """Reads an index that `write_index` or FAISS has written.

    Args:
        fname: a table file, which gives an `IndexFlatIP`, or an `IndexIDMap2` if it has ids; or a file of FAISS with a
            flat index, or one in IDMap or IDMap2.
        io_flags: 0, or `IO_FLAG_MMAP` to leave the rows of a table file in the file.

    Raises:
        FaissError: the file does not exist, is damaged, or holds another kind of index; the message says which.
    """
    if io_flags not in (0, IO_FLAG_MMAP):
        raise FaissError(f"io_flags must be 0 or IO_FLAG_MMAP ({IO_FLAG_MMAP}), got {io_flags}")
    path = os.fspath(fname)
    try:
        with open(path, "rb") as file:
            fourcc = file.read(4)
            if fourcc in _FLAT or fourcc in _ID_MAPS or fourcc[:1] == b"I":
                if io_flags:
                    raise FaissError("io_flags must be 0 for a file in FAISS's layout, got IO_FLAG_MMAP")
                file.seek(0)
                return _read_all(file, os.fstat(file.fileno()).st_size, path)
        return _of_table(ItemTable.load(path, mmap=io_flags == IO_FLAG_MMAP))
    except FaissError:
        raise
    except (OSError, ValueError) as error:
        raise FaissError(f"fname must be a table file or a flat index of FAISS: {error}") from error


IO_FLAG_MMAP = 1


def serialize_index(index: Index) -> npt.NDArray[np.uint8]:
    """The bytes of an index in FAISS's layout; float32 rows."""
    _check_float32(index)
    memory = io.BytesIO()
    _write(index, memory)
    return np.array(np.frombuffer(memory.getvalue(), np.uint8))


def deserialize_index(data: npt.NDArray[np.uint8]) -> Index:
    """The index in bytes of `serialize_index`, of this module or of FAISS; errors as `read_index`."""
    raw = np.ascontiguousarray(data, np.uint8).tobytes()
    return _read_all(io.BytesIO(raw), len(raw), "data")


def _ranks(version: Version) -> npt.NDArray[np.int64]:
    """The position in the index of each row of a version: the rank of its id."""
    ids = version.compact().ids
    if ids is None:
        return np.arange(version.num_rows)
    ranks = np.empty(version.num_rows, np.int64)
    ranks[np.argsort(ids.numpy(force=True))] = np.arange(version.num_rows)
    return ranks


def _of_table(table: ItemTable) -> Index:
    version = table.current
    ids = version.columns.ids
    index = IndexFlatIP(table.dim, dtype=table.dtype)
    columns = version.columns._replace(ids=None)
    index.table = ItemTable(Version(columns, version.num_rows, version.basis, mapping=version.mapping))
    if ids is None:
        return index
    named = IndexIDMap2(IndexFlatIP(table.dim, dtype=table.dtype))
    named.index = index
    named._set_ids(ids.numpy())
    return named


# ---- FAISS's layout ----


def _check_float32(index: Index) -> None:
    flat = index.flat
    if flat.table.dtype != torch.float32:
        raise FaissError(f"index must have float32 rows and unique ids of 0 or more for a file, got {index!r}")


def _write(index: Index, file: IO[bytes]) -> None:
    flat, n = index.flat, index.ntotal
    header = _HEADER.pack(index.d, n, _UNUSED, _UNUSED, 1, index.metric_type)
    if isinstance(index, IndexIDMap):
        file.write((b"IxM2" if isinstance(index, IndexIDMap2) else b"IxMp") + header)
        _write(flat, file)
        file.write(struct.pack("<Q", n) + index.id_map.astype("<i8").tobytes())
        return
    file.write((b"IxF2" if index.metric_type == METRIC_L2 else b"IxFI") + header + struct.pack("<Q", n * index.d))
    for start in range(0, n, _PART):
        file.write(flat.read(np.arange(start, min(n, start + _PART))).astype("<f4").tobytes())


def _read_all(file: IO[bytes], size: int, path: str) -> Index:
    index = _read(file, size, path)
    if file.tell() != size:
        raise FaissError(f"{path} is damaged: {size - file.tell()} bytes follow the index")
    return index


def _read(file: IO[bytes], size: int, path: str, inner: bool = False) -> Index:
    fourcc = _bytes(file, 4, size, path)
    if fourcc not in _FLAT and (inner or fourcc not in _ID_MAPS):
        kind = fourcc.decode("ascii", "backslashreplace")
        raise FaissError(
            f"{path} must hold a flat index of FAISS, or one in IDMap, got the kind {kind!r}: "
            "reconstruct_n(0, ntotal) in FAISS gives the rows of most kinds"
        )
    d, n, *unused, trained, metric = _HEADER.unpack(_bytes(file, _HEADER.size, size, path))
    if d < 1 or n < 0 or unused != [_UNUSED, _UNUSED] or trained != 1:
        raise FaissError(f"{path} is damaged: its header holds d = {d}, ntotal = {n}, {unused}, is_trained = {trained}")
    if metric not in (METRIC_INNER_PRODUCT, METRIC_L2):
        raise FaissError(f"{path} must have METRIC_INNER_PRODUCT (0) or METRIC_L2 (1), got the metric {metric}")
    if fourcc in _ID_MAPS:
        flat = _read(file, size, path, inner=True)
        if not isinstance(flat, IndexFlat) or (flat.d, flat.ntotal, flat.metric_type) != (d, n, metric):
            raise FaissError(f"{path} is damaged: IDMap is {n} x {d}, metric {metric}, and holds {flat!r}")
        ids = _vector(file, "<i8", n, size, path)
        named = _ID_MAPS[fourcc](type(flat)(d))
        named.index = flat
        named._set_ids(ids.astype(np.int64))
        return named
    if _FLAT[fourcc] not in (None, metric):
        raise FaissError(f"{path} is damaged: its kind is {fourcc.decode()} and its metric {metric}")
    index = IndexFlatL2(d) if metric == METRIC_L2 else IndexFlatIP(d)
    index.add(_vector(file, "<f4", n * d, size, path).reshape(n, d))
    return index


def _bytes(file: IO[bytes], count: int, size: int, path: str) -> bytes:
    if file.tell() + count > size:
        raise FaissError(f"{path} is truncated: it has {size} bytes, at least {file.tell() + count} are needed")
    return file.read(count)


def _vector(file: IO[bytes], dtype: str, count: int, size: int, path: str) -> npt.NDArray[Any]:
    (told,) = struct.unpack("<Q", _bytes(file, 8, size, path))
    if told != count:
        raise FaissError(f"{path} is damaged: an array has {told} numbers, {count} follow from its header")
    return np.frombuffer(_bytes(file, count * np.dtype(dtype).itemsize, size, path), dtype)
