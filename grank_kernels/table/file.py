"""The file of an `ItemTable`: safetensors with checksums, specified in docs/table_format.md.

The safetensors library reads such files, but is not used here: it writes only tensors in memory, and maps files
privately, which Linux refuses for files larger than memory.
"""

import json
import math
import os
from collections.abc import Iterable, Iterator
from typing import Any, BinaryIO, NamedTuple

import torch
import xxhash

from grank_kernels.common.atomic_files import replace_file
from grank_kernels.common.checks import check_int
from grank_kernels.table.mapping import Mapping, streamed
from grank_kernels.table.versions import PART_BYTES, Columns, empty

FORMAT, FORMAT_VERSION = "grank_kernels.ItemTable", "1"
_MOST_HEADER = 1 << 16  # bytes; a table's header has about 1000
MOST = 1 << 40  # bound of sizes in a header: products of a few fit into int64
_MOST_EMPTY_ROWS = 1 << 24  # rows of width 0 take no bytes, so that the length of the file does not bound their number
_ALIGNMENT = 64  # bytes of a cache line
_BASIS = "coarse_basis"
_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I8": torch.int8,
}  # fmt: skip
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


class _Entry(NamedTuple):
    """A tensor in a file: its bytes from `begin` to `end`, counted from the end of the header."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int

    def checksum(self, name: str) -> "xxhash.xxh3_64":
        """The state of the checksum before the data: it covers the tensor's entry in the header, too."""
        return xxhash.xxh3_64(f"{name} {_NAMES[self.dtype]} {list(self.shape)}\n".encode())


# ---- writing ----


def write(
    path: str | os.PathLike[str], like: Columns, parts: Iterable[Columns], basis: torch.Tensor | None = None
) -> None:
    """Writes a table to a file, atomically.

    Args:
        path: the file to create or replace, see `grank_kernels.common.atomic_files`.
        like: tensors of the shapes and dtypes of the columns, on any device.
        parts: the rows, piece by piece.
        basis: basis of the int8 copy.

    Raises:
        OSError: the file cannot be written.
        ValueError: the parts hold more or fewer rows than `like`.
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
                raise ValueError(
                    f"num_rows must be the number of rows in all parts, got {len(like.rows)}, and more rows"
                )
            _write(file, data, start + layout[name].begin + written[name])
            checksums[name].update(data)
            written[name] += len(data)

        for part in parts:
            for name, x in part.present().items():
                append(name, x)
        if basis is not None:
            append(_BASIS, basis)
        if any(written[name] != entry.end - entry.begin for name, entry in layout.items()):
            raise ValueError(f"num_rows must be the number of rows in all parts, got {len(like.rows)}, and fewer rows")
        _write(file, memoryview(_header(layout, checksums)), 0)


def _write(file: int, data: memoryview, offset: int) -> None:
    while data:
        written = os.pwrite(file, data, offset)
        data, offset = data[written:], offset + written


def _layout(tensors: dict[str, torch.Tensor]) -> dict[str, _Entry]:
    """The place of each tensor: without gaps, as safetensors requires, and aligned to its elements.

    Tensors of whole cache lines, which rows nearly always are, come first; the others by element size.
    """
    order = sorted(tensors, key=lambda name: (tensors[name].nbytes % _ALIGNMENT != 0, -tensors[name].itemsize))
    layout, end = {}, 0
    for name in order:
        x = tensors[name]
        begin, end = end, end + x.nbytes
        layout[name] = _Entry(x.dtype, tuple(x.shape), begin, end)
    return layout


def _header(layout: dict[str, _Entry], checksums: dict[str, "xxhash.xxh3_64"]) -> bytes:
    """The bytes before the data. Their number does not depend on the checksums."""
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
    """Columns, basis of the int8 copy, and the mapping that holds the columns left in the file.

    Args:
        path: the file.
        mapped: leave the rows in the file, and without an int8 copy their scales and ids, too.
        verify: compare the checksums.
        part: (r, n), only the r-th of n parts of the rows.

    Raises:
        OSError: the file does not exist or cannot be read or mapped.
        TypeError: `path` is not a path, or `part` not a pair of ints.
        ValueError: the file is not a table of this version, or `part` is invalid; the message says why.
    """
    path = os.fsdecode(path)
    if part is not None:
        part = _checked_part(part)
    with open(path, "rb", buffering=0) as file:
        try:
            start, layout, checksums = _parsed(file)
            maps = (mapped or part is not None) and layout["rows"].shape[0] > 0
            mapping = Mapping(file, path) if maps else None
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
            _check_values(tensors)
        except ValueError as error:
            raise ValueError(f"{path} {error}") from None
    basis = tensors.pop(_BASIS, None)
    return Columns(**tensors), basis, mapping if mapped else None


def _checked_part(part: Any) -> tuple[int, int]:
    if not isinstance(part, (tuple, list)) or len(part) != 2:
        raise TypeError(f"part must be a pair of ints (r, n), got {part!r}")
    r, n = check_int("part's r", part[0], 0), check_int("part's n", part[1], 1)
    if r >= n:
        raise ValueError(f"part must be (r, n) with 0 <= r < n, got {part}")
    return r, n


def _part(x: torch.Tensor, r: int, n: int) -> torch.Tensor:
    """The r-th of n parts of the rows."""
    return x[len(x) * r // n : len(x) * (r + 1) // n]


def _bytes(x: torch.Tensor) -> Iterator[torch.Tensor]:
    """Views of the bytes of a contiguous tensor, `PART_BYTES` at a time."""
    return iter(torch.split(x.reshape(-1).view(torch.uint8), PART_BYTES))


def _filled(parts: Iterator[torch.Tensor], file: BinaryIO, offset: int) -> Iterator[torch.Tensor]:
    """The views, each after it was filled from the file."""
    for part in parts:
        data = part.numpy().data
        while data:
            read = os.preadv(file.fileno(), [data], offset)
            if read == 0:
                raise ValueError("is truncated: it became shorter during reading")
            data, offset = data[read:], offset + read
        yield part


def _parsed(file: BinaryIO) -> tuple[int, dict[str, _Entry], dict[str, str]]:
    """Offset of the data, tensors and checksums of a file with arbitrary content."""
    size = os.fstat(file.fileno()).st_size
    if size == 0:
        raise ValueError("is empty")
    start = 8 + int.from_bytes(os.pread(file.fileno(), 8, 0), "little")
    if start > 8 + _MOST_HEADER:
        raise ValueError(f"is not a table: its header must have at most {_MOST_HEADER} bytes, got {start - 8}")
    if size < start:
        raise ValueError(f"is truncated: it has {size} bytes, and its header alone {start}")
    try:
        header = json.loads(os.pread(file.fileno(), start - 8, 8))
    except (ValueError, RecursionError):
        raise ValueError("is not a table: its header is not JSON") from None
    metadata = header.pop("__metadata__", None) if isinstance(header, dict) else None
    if not isinstance(metadata, dict) or metadata.get("format") != FORMAT:
        raise ValueError(f"is not a table: its header does not say that its format is {FORMAT}")
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
    """A tensor's entry in the header, checked."""
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
    """A list of sizes as a tuple, or None."""
    good = isinstance(x, list) and all(type(size) is int and 0 <= size < MOST for size in x)
    return tuple(x) if good else None


def _check_columns(layout: dict[str, _Entry]) -> None:
    """That names, dtypes and shapes of the tensors are those of a table."""
    rows = layout.get("rows")
    if rows is None or len(rows.shape) != 2 or rows.dtype in (torch.float64, torch.int64):
        raise ValueError(f"is malformed: rows must be (N, d) of F32, F16, BF16 or I8, got {rows}")
    (N, d), int8 = rows.shape, rows.dtype == torch.int8
    if d == 0 and N > _MOST_EMPTY_ROWS:
        raise ValueError(f"is malformed: rows of width 0 must be at most {_MOST_EMPTY_ROWS}, got {N}")
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


def _check_values(tensors: dict[str, torch.Tensor]) -> None:
    """That scales and error bounds of the int8 copy are numbers: searches would skip rows of NaN bounds in silence.

    Without `verify` nothing else would notice.
    """
    for name, most in (("coarse_scale", torch.finfo(torch.float32).max), ("coarse_error", math.inf)):
        x = tensors.get(name)
        if x is not None and not bool(((x >= 0) & (x <= most)).all()):
            raise ValueError(f"is malformed: {name} must be from 0 to {most:.3g}, got other numbers or NaN")
