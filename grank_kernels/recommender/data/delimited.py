"""Columns from delimited text: parsed in blocks, in bounded memory; errors name the line."""

import bisect
import gzip
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
import torch

from grank_kernels.recommender.data.columns import Columns, Numbered

_BLOCK = 1 << 24  # bytes of text parsed at a time


@dataclass(frozen=True)
class Layout:
    """The format of a file's lines.

    Attributes:
        columns: name -> "int8", "int32", "int64", "float32", "text", or a tuple of the accepted words.
        separator: separator of the fields, which are not quoted.
        header: the first line of a file that has a header, or None.
    """

    columns: Mapping[str, str | tuple[str, ...]]
    separator: str
    header: str | None = None

    @property
    def expected(self) -> str:
        """The format in words, for error messages."""
        separator = {"\t": "tabs"}.get(self.separator, f"'{self.separator}'")
        kinds = (kind if isinstance(kind, str) else " | ".join(kind) for kind in self.columns.values())
        fields = ", ".join(f"{name} ({kind})" for name, kind in zip(self.columns, kinds, strict=True))
        return f"{len(self.columns)} fields separated by {separator}: {fields}"


def find(path: str | Path, pattern: str) -> Path:
    """The file at `path`, or the file in the folder `path` that matches `pattern` or `<pattern>.gz`.

    Args:
        path: a file of any name, or a folder.
        pattern: name of the file in the folder, with `*` as a wildcard.

    Raises:
        FileNotFoundError: no file matches.
        ValueError: several files match.
    """
    path = Path(path)
    if path.is_file():
        return path
    expected = f"expected a {pattern} or {pattern}.gz file, or a folder that holds one"
    for name in (pattern, f"{pattern}.gz"):
        found = sorted(path.glob(name)) if path.is_dir() else []
        if len(found) > 1:
            raise ValueError(f"{path}: {expected}, got several: {', '.join(file.name for file in found)}")
        if found:
            return found[0]
    raise FileNotFoundError(f"{path}: {expected}")


def read_columns(path: Path, layout: Layout) -> Columns:
    """All columns of a file: numbers in the layout's dtype, text numbered, words as int8 positions in their tuple.

    Empty lines are skipped. Memory: the columns, one of them twice, and a block of 16 MB.

    Raises:
        ImportError: pyarrow is not installed.
        ValueError: a line does not fit the layout (the message names file, line and format), the file has no rows, or
            its gzip data is damaged.
    """
    columns = {name: _Text() if kind == "text" else _Rows() for name, kind in layout.columns.items()}
    for number, block in _blocks(path):
        if number == 1 and layout.header is not None:
            first, _, block = block.partition(b"\n")
            if first.strip() != layout.header.encode():
                raise ValueError(f"{path}, line 1: expected the header {layout.header!r}, got {_shown(first)}")
            number = 2
        try:
            parsed = _parse(block, layout)
        except ValueError:  # of which pyarrow's own is one
            lines = block.split(b"\n")
            bad = bisect.bisect_left(range(len(lines)), True, key=lambda i: not _parses(lines[: i + 1], layout))
            raise ValueError(
                f"{path}, line {number + bad}: expected {layout.expected}, got {_shown(lines[bad])}"
            ) from None
        for name, part in parsed.items():
            columns[name].append(part)
    if not next(iter(columns.values())):
        raise ValueError(f"{path}: expected lines of {layout.expected}, got none")
    return {name: columns.pop(name).joined() for name in layout.columns}


class _Rows:
    """A growing array of numbers, whose capacity doubles when it is full.

    A list of pyarrow's arrays would keep twice their size allocated. Capacity that was never written takes no memory.
    """

    def __init__(self) -> None:
        self._room = np.empty(0, np.int8)
        self._rows = 0

    def __len__(self) -> int:
        return self._rows

    def append(self, part: npt.NDArray[Any]) -> None:
        rows = self._rows + len(part)
        if rows > len(self._room):
            room = np.empty(2 * rows, part.dtype)
            room[: self._rows] = self.joined()
            self._room = room
        self._room[self._rows : rows] = part
        self._rows = rows

    def joined(self) -> npt.NDArray[Any]:
        return self._room[: self._rows]


class _Text:
    """A growing column of strings, dictionary-encoded by block until it is numbered."""

    def __init__(self) -> None:
        self._parts: list[Any] = []

    def __len__(self) -> int:
        return sum(map(len, self._parts))

    def append(self, part: Any) -> None:
        self._parts.append(part)

    def joined(self) -> Numbered:
        pa, _, pc = _pyarrow()
        column = pa.chunked_array(self._parts).unify_dictionaries().combine_chunks()
        order = pc.sort_indices(column.dictionary).to_numpy()
        place = np.empty(len(order), np.int32)
        place[order] = np.arange(len(order), dtype=np.int32)
        ids = column.dictionary.take(order).to_numpy(zero_copy_only=False).astype(str)
        return Numbered(ids, torch.from_numpy(place[column.indices.to_numpy()]))


@contextmanager
def open_binary(path: Path) -> Iterator[BinaryIO]:
    """The bytes of a file, decompressed if its name ends in `.gz`; a ValueError if that data is damaged."""
    with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
        try:
            yield file  # type: ignore[misc]  # gzip's file is a BinaryIO in all but name
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise ValueError(f"{path}: expected a whole gzip file, got a damaged one: {error}") from None


def _blocks(path: Path) -> Iterator[tuple[int, bytes]]:
    """Blocks of whole lines, each with the number of its first line, from 1."""
    number = 1
    with open_binary(path) as file:
        while block := file.read(_BLOCK) + file.readline():
            yield number, block
            number += block.count(b"\n")


def _parse(block: bytes, layout: Layout) -> dict[str, Any]:
    """The columns of a block of lines; a ValueError, which does not name the line, if one does not fit."""
    pa, csv, pc = _pyarrow()
    if not block.strip(b"\r\n"):  # pyarrow refuses a text of empty lines
        return {}
    separator = layout.separator
    if len(separator) > 1:  # pyarrow takes one byte; this one does not occur in text
        block, separator = block.replace(separator.encode(), b"\x1f"), "\x1f"
    types = {
        name: pa.type_for_alias(kind) if isinstance(kind, str) and kind != "text" else pa.string()
        for name, kind in layout.columns.items()
    }
    table = csv.read_csv(
        pa.py_buffer(block),
        csv.ReadOptions(column_names=list(layout.columns)),
        csv.ParseOptions(delimiter=separator, quote_char=False),
        csv.ConvertOptions(column_types=types, null_values=[]),
    )
    columns = {}
    for name, kind in layout.columns.items():
        column = table[name].combine_chunks()
        if kind == "text":
            column = column.dictionary_encode()
            if pc.any(pc.equal(column.dictionary, "")).as_py():
                raise ValueError(f"{name} is empty")
            columns[name] = column
        elif isinstance(kind, tuple):
            column = pc.index_in(column, value_set=pa.array(kind))
            if column.null_count:
                raise ValueError(f"{name} is none of {kind}")
            columns[name] = column.cast(pa.int8()).to_numpy()
        else:
            columns[name] = column.to_numpy()
            if name == "item" and len(column) and columns[name].min() < 0:
                raise ValueError(f"{name} is negative")
            if kind == "float32" and not np.isfinite(columns[name]).all():
                raise ValueError(f"{name} is not finite")
    return columns


def _parses(lines: list[bytes], layout: Layout) -> bool:
    try:
        _parse(b"\n".join(lines), layout)
    except ValueError:
        return False
    return True


def _shown(line: bytes) -> str:
    text = line.rstrip(b"\r\n").decode("latin-1")
    return repr(text if len(text) <= 200 else f"{text[:200]}...")


def _pyarrow() -> tuple[Any, Any, Any]:
    try:
        import pyarrow
        from pyarrow import compute, csv
    except ImportError:
        raise ImportError("reading data needs pyarrow: pip install 'grank-kernels[train]'") from None
    return pyarrow, csv, compute
