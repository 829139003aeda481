"""The file of an `ItemTable`: safetensors with checksums. docs/table_format.md is the specification.

The safetensors library reads such files, but is not used here: it writes only what is in memory, and what it maps it
maps privately, which Linux refuses for files larger than memory.
"""

import json
import math
import os
from collections.abc import Iterable, Iterator
from typing import Any, BinaryIO, NamedTuple

import torch
import xxhash

from grank_kernels.common.atomic_files import replace_file
from grank_kernels.table.mapping import Mapping, streamed
from grank_kernels.table.versions import PART_BYTES, Columns, empty

FORMAT, FORMAT_VERSION = "grank_kernels.ItemTable", "1"
_MOST_HEADER = 1 << 16  # bytes; a table's has about 1000
_MOST = 1 << 40  # of any size in a header: products of a few stay below what tensors can have
_ALIGNMENT = 64  # of the data: a cache line
_BASIS = "coarse_basis"
_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I8": torch.int8,
}  # fmt: skip
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


class _Entry(NamedTuple):
    """Where a tensor stands in a file: its bytes from `begin` to `end`, counted from the end of the header."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int

    def checksum(self, name: str) -> "xxhash.xxh3_64":
        """What the checksum of a tensor begins with, so that it covers the tensor's entry in the header too."""
        return xxhash.xxh3_64(f"{name} {_NAMES[self.dtype]} {list(self.shape)}\n".encode())


# ---- writing ----


def write(
    path: str | os.PathLike[str], like: Columns, parts: Iterable[Columns], basis: torch.Tensor | None = None
) -> None:
    """Writes a table to `path`, which is the old file or the whole new one at any time, also if the system fails.

    Args:
        path: the file to create or replace, atomically; see `grank_kernels.common.atomic_files`.
        like: the shapes and dtypes of the columns; their device does not matter.
        parts: the rows, piece by piece.
        basis: of the int8 copy.
    """
    tensors = like.present() | ({} if basis is None else {_BASIS: basis})
    layout = _layout(tensors)
    checksums = {name: entry.checksum(name) for name, entry in layout.items()}
    with replace_file(path) as stream:
        file = stream.fileno()
        start = len(_header(layout, checksums))
        written = dict.fromkeys(layout, 0)

        def append(name: str, x: torch.Tensor) -> None:
            data = x.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
            if written[name] + len(data) > layout[name].end - layout[name].begin:
                raise ValueError(f"parts hold more rows than the {len(like.rows)} that were announced")
            _write(file, data, start + layout[name].begin + written[name])
            checksums[name].update(data)
            written[name] += len(data)

        for part in parts:
            for name, x in part.present().items():
                append(name, x)
        if basis is not None:
            append(_BASIS, basis)
        if any(written[name] != entry.end - entry.begin for name, entry in layout.items()):
            raise ValueError(f"parts hold fewer rows than the {len(like.rows)} that were announced")
        _write(file, memoryview(_header(layout, checksums)), 0)


def _write(file: int, data: memoryview, offset: int) -> None:
    while data:
        written = os.pwrite(file, data, offset)
        data, offset = data[written:], offset + written


def _layout(tensors: dict[str, torch.Tensor]) -> dict[str, _Entry]:
    """Tensor after tensor without gaps, as safetensors wants it, each aligned to its elements: first those that leave
    the next one aligned to a cache line, as rows nearly always do, then by size of the elements.
    """
    order = sorted(tensors, key=lambda name: (tensors[name].nbytes % _ALIGNMENT != 0, -tensors[name].itemsize))
    layout, end = {}, 0
    for name in order:
        x = tensors[name]
        begin, end = end, end + x.nbytes
        layout[name] = _Entry(x.dtype, tuple(x.shape), begin, end)
    return layout


def _header(layout: dict[str, _Entry], checksums: dict[str, "xxhash.xxh3_64"]) -> bytes:
    """The same length whatever the checksums are."""
    metadata = {"format": FORMAT, "format_version": FORMAT_VERSION}
    metadata |= {f"xxh3_64.{name}": checksum.hexdigest() for name, checksum in checksums.items()}
    header: dict[str, Any] = {"__metadata__": metadata}
    for name, (dtype, shape, begin, end) in layout.items():
        header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % _ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


# ---- reading ----


def read(
    path: str | os.PathLike[str], mapped: bool, verify: bool, part: tuple[int, int] | None = None
) -> tuple[Columns, torch.Tensor | None, Mapping | None]:
    """The columns of a table's file, the basis of its int8 copy, and the file's mapping if columns stay in it.

    Args:
        path: of the file.
        mapped: leave the rows in the file, and their scales and ids too unless there is an int8 copy to search instead.
        verify: compare the checksums.
        part: (r, n), the r-th of n parts of the rows. What is not left in the file is copied from its mapping.

    Raises:
        OSError: there is no such file, or it cannot be read.
        ValueError: the file is not what `write` writes; the message says in what.
    """
    with open(path, "rb", buffering=0) as file:
        try:
            start, layout, checksums = _parsed(file)
            mapping = Mapping(file) if (mapped or part is not None) and layout["rows"].shape[0] > 0 else None
            tensors = {}
            for name, entry in layout.items():
                stays = mapped and (name == "rows" or "coarse_rows" not in layout)
                if mapping is not None and (stays or part is not None):
                    tensors[name] = mapping.tensor(entry.dtype, entry.shape, start + entry.begin)
                    pieces = streamed(_bytes(tensors[name]), mapping.read_ahead) if verify else iter(())
                else:
                    tensors[name] = empty(entry.shape, entry.dtype, torch.device("cpu"))
                    pieces = _filled(_bytes(tensors[name]), file, start + entry.begin)
                checksum = entry.checksum(name)
                for piece in pieces:
                    if verify:
                        checksum.update(piece.numpy().data)
                if verify and checksum.hexdigest() != checksums[name]:
                    raise ValueError(f"is corrupted: {name} has checksum {checksum.hexdigest()}, not {checksums[name]}")
                if mapping is not None and part is not None:
                    x = tensors[name] if name == _BASIS else _part(tensors[name], *part)
                    tensors[name] = x if stays else empty(tuple(x.shape), x.dtype, x.device).copy_(x)
        except ValueError as error:
            raise ValueError(f"{os.fspath(path)} {error}") from None
    basis = tensors.pop(_BASIS, None)
    return Columns(**tensors), basis, mapping if mapped else None


def _part(x: torch.Tensor, r: int, n: int) -> torch.Tensor:
    """The rows of the r-th of n parts."""
    return x[len(x) * r // n : len(x) * (r + 1) // n]


def _bytes(x: torch.Tensor) -> Iterator[torch.Tensor]:
    """The memory of a contiguous tensor, `PART_BYTES` at a time."""
    return iter(torch.split(x.reshape(-1).view(torch.uint8), PART_BYTES))


def _filled(parts: Iterator[torch.Tensor], file: BinaryIO, offset: int) -> Iterator[torch.Tensor]:
    """The same memory, after it has been filled from a file."""
    for part in parts:
        data = part.numpy().data
        while data:
            read = os.preadv(file.fileno(), [data], offset)
            if read == 0:
                raise ValueError("is truncated: it became shorter while it was read")
            data, offset = data[read:], offset + read
        yield part


def _parsed(file: BinaryIO) -> tuple[int, dict[str, _Entry], dict[str, str]]:
    """Of a file that may hold anything: where the data begin, the tensors, and their checksums."""
    size = os.fstat(file.fileno()).st_size
    if size == 0:
        raise ValueError("is empty")
    start = 8 + int.from_bytes(os.pread(file.fileno(), 8, 0), "little")
    if start > 8 + _MOST_HEADER:
        raise ValueError(f"is no table: its header would have {start - 8} bytes; a table's has at most {_MOST_HEADER}")
    if size < start:
        raise ValueError(f"is truncated: it has {size} bytes, and its header alone {start}")
    try:
        header = json.loads(os.pread(file.fileno(), start - 8, 8))
    except (ValueError, RecursionError):
        raise ValueError("is no table: its header is not JSON") from None
    metadata = header.pop("__metadata__", None) if isinstance(header, dict) else None
    if not isinstance(metadata, dict) or metadata.get("format") != FORMAT:
        raise ValueError(f"is no table: its header does not say that its format is {FORMAT}")
    if metadata.get("format_version") != FORMAT_VERSION:
        version = metadata.get("format_version")
        raise ValueError(f"has format_version {version!r}; this version of grank_kernels reads {FORMAT_VERSION!r}")
    layout = {str(name): _entry(name, entry) for name, entry in header.items()}
    _check_columns(layout)
    end = 0
    for name, entry in sorted(layout.items(), key=lambda item: (item[1].begin, item[1].end)):
        if entry.begin != end or (start + entry.begin) % entry.dtype.itemsize:
            raise ValueError(f"is malformed: {name} begins at byte {entry.begin} of the data, not at {end}")
        end = entry.end
    if start + end != size:
        what = "truncated" if size < start + end else "malformed"
        raise ValueError(f"is {what}: it has {size} bytes, and its header says {start + end}")
    checksums = {name: str(metadata.get(f"xxh3_64.{name}")) for name in layout}
    return start, layout, checksums


def _entry(name: str, entry: Any) -> _Entry:
    """A tensor's entry in the header."""
    if name not in (*Columns._fields, _BASIS):
        raise ValueError(f"is malformed: tables have no tensor {name!r}")
    fields = entry if isinstance(entry, dict) else {}
    dtype = _DTYPES.get(str(fields.get("dtype")))
    shape, offsets = _sizes(fields.get("shape")), _sizes(fields.get("data_offsets"))
    if dtype is None or shape is None or offsets is None or len(offsets) != 2:
        raise ValueError(f"is malformed: {name} is {entry}")
    begin, end = offsets
    if end - begin != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"is malformed: {name} has {end - begin} bytes for shape {list(shape)} of {_NAMES[dtype]}")
    return _Entry(dtype, shape, begin, end)


def _sizes(x: Any) -> tuple[int, ...] | None:
    """A list of sizes, or None for anything else."""
    good = isinstance(x, list) and all(type(size) is int and 0 <= size < _MOST for size in x)
    return tuple(x) if good else None


def _check_columns(layout: dict[str, _Entry]) -> None:
    """That the tensors are those of a table."""
    rows = layout.get("rows")
    if rows is None or len(rows.shape) != 2 or rows.dtype in (torch.float64, torch.int64):
        raise ValueError(f"is malformed: rows are {rows}; they take (N, d) of F32, F16, BF16 or I8")
    (N, d), int8 = rows.shape, rows.dtype == torch.int8
    takes: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {"rows": (rows.dtype, (N, d)), "ids": (torch.int64, (N,))}
    if int8:
        takes["row_scale"] = (torch.float32, (N,))
    elif "coarse_rows" in layout:
        takes |= {"coarse_rows": (torch.int8, (N, d)), _BASIS: (torch.float64, (2, d, d))}
        takes |= {"coarse_scale": (torch.float32, (N,)), "coarse_error": (torch.float32, (N,))}
    for name, entry in layout.items():
        if takes.get(name) != entry[:2]:
            raise ValueError(f"is malformed: {name} has shape {list(entry.shape)} of {_NAMES[entry.dtype]}")
    missing = takes.keys() - layout.keys() - {"ids", _BASIS}
    if missing:
        raise ValueError(f"is malformed: it has no {min(missing)}")
