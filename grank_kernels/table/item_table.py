"""`ItemTable`: the rows a search goes over, in the precision they are searched in."""

import itertools
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch

from grank_kernels.common.arrays import Array, as_tensor
from grank_kernels.table import file as table_file
from grank_kernels.table.quantise import Coarse, basis_for, certify, quantise
from grank_kernels.table.versions import Columns, Log, Version, empty, updated

_FLOATS = (torch.float32, torch.float16, torch.bfloat16)
_DTYPES = (*_FLOATS, torch.int8)


class ItemTable:
    """Item rows in one precision, with external ids if wanted, on one device or on disk. There is no index to build.

    Made by `ItemTable.from_rows` or `ItemTable.load`. `mips_topk(queries, table, k)` searches it.

    Searches may run in any number of threads while one or more update the table: a search that begins after `upsert` or
    `remove` has returned finds what they did, one that runs meanwhile finds all of it or nothing, and none waits. The
    order of the rows, which matters to `allow` alone, is that of `ids`; updates change it, `snapshot` keeps it.

    Rows and ids may also be NumPy arrays, or objects with `__dlpack__`. A table is copied and pickled by its rows; one
    that is memory-mapped cannot be pickled, since only its path would be worth sending.
    """

    def __init__(self, version: Version):
        """Takes what `from_rows` and `load` have checked and converted."""
        self._version = version  # replaced as a whole
        self._log: Log | None = None  # in which the version is, if the table may append to it
        self._writing = threading.Lock()

    # ---- made of rows ----

    @classmethod
    def from_rows(
        cls,
        rows: Array,
        *,
        ids: Array | None = None,
        dtype: torch.dtype | None = None,
        coarse: torch.dtype | None = None,
    ) -> "ItemTable":
        """Copies rows into a table.

        Args:
            rows: (N, d) float32, float16 or bfloat16.
            ids: (N,) int64, unique, not negative: what searches return instead of positions.
            dtype: float32, float16, bfloat16 or int8; None keeps that of `rows`. int8 is symmetric by row:
                `scale = max|row| / 127`, numbers rounded half to even.
            coarse: torch.int8 keeps an int8 copy beside float rows, with a bound of its error for every row. Searches
                scan the copy and read only those rows that the bound cannot rule out: the same result, bit for bit, as
                without it, in the time of an int8 search. Rows may hold infinities and NaN, which are always read.

        Raises:
            TypeError: an argument is no tensor.
            ValueError: a dtype or shape that does not fit, ids that repeat or are negative, rows that int8 or the
                narrower dtype cannot hold (NaN and infinities for int8).
        """
        rows, dtype = _checked_rows(rows, dtype)
        if coarse not in (None, torch.int8) or (coarse is not None and dtype == torch.int8):
            raise ValueError(f"coarse is {coarse} beside {dtype} rows; it takes None, or torch.int8 beside float rows")
        if ids is not None:
            ids = _checked_ids(ids, rows.shape[:1], rows.device)
        columns, basis = _converted(rows, ids, dtype), None
        if coarse is not None:
            basis = basis_for(columns.rows)
            columns = _with_coarse(columns, basis)
        return cls(Version(columns, len(rows), basis))

    # ---- files ----

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the table to a file, beside `path` first: whatever happens, `path` is the old file or the new one.

        The format is safetensors with checksums, described in docs/table_format.md. Rows go to the file piece by piece.

        Raises:
            OSError: the file cannot be written; what was at `path` is still there.
        """
        version = self._version
        shapes = version.columns.map(lambda x: x.new_empty((version.live, *x.shape[1:]), device="meta"))
        table_file.write(path, shapes, version.parts(), version.basis)

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        *,
        mmap: bool = False,
        verify: bool = True,
        part: tuple[int, int] | None = None,
    ) -> "ItemTable":
        """A table that `save` or `write` has written.

        Args:
            path: of the file.
            mmap: leave the rows in the file, for tables larger than memory. A search streams through them, or with an
                int8 copy, which is read into memory, looks up those it needs. Such a table takes no updates. The file
                may be replaced or removed meanwhile, but not be changed in place.
            verify: compare the checksums, which reads the whole file once. That ids are unique is not looked at with
                `mmap`: it would take as much memory.
            part: (r, n), only the rows from N * r // n to N * (r + 1) // n. A table without ids counts them from 0.

        Raises:
            OSError: there is no such file, or it cannot be read.
            ValueError: the file is no table, of another version, truncated or corrupted; the message says which. Or
                there is no such part.
        """
        if part is not None and not 0 <= part[0] < part[1]:
            raise ValueError(f"part is {part}; it takes (r, n) with 0 <= r < n")
        columns, basis, mapping = table_file.read(path, mmap, verify, part)
        if columns.ids is not None and mapping is None:
            try:
                _checked_ids(columns.ids, None, columns.ids.device)
            except ValueError as error:
                raise ValueError(f"{os.fspath(path)} is malformed: {error}") from None
        return cls(Version(columns, len(columns.rows), basis, mapping=mapping))

    @staticmethod
    def write(
        path: str | os.PathLike[str],
        parts: Iterable[Array],
        *,
        num_rows: int,
        dtype: torch.dtype | None = None,
        progress: Callable[[int, int], object] = lambda done, total: None,
    ) -> None:
        """Writes a table of rows that come in parts and need not fit into memory; their positions are the ids.

        Args:
            path: of the file, written as by `save`.
            parts: tensors (n, d), as `from_rows` takes them.
            num_rows: of all parts.
            dtype: as for `from_rows`; None keeps that of the first part.
            progress: called after every part with the rows that are written, and `num_rows`.

        Raises:
            OSError: the file cannot be written; what was at `path` is still there.
            TypeError: a part is no tensor.
            ValueError: a part that `from_rows` would not take, that differs from the first one in width, or more or
                fewer rows than `num_rows`.
        """
        converted = _converted_parts(parts, dtype)
        first = next(converted, None)
        if first is None:
            raise ValueError("parts has none; it takes at least one tensor (n, d), which may have n = 0")
        shapes = first.map(lambda x: x.new_empty((num_rows, *x.shape[1:]), device="meta"))
        table_file.write(path, shapes, _reported(itertools.chain([first], converted), num_rows, progress))

    # ---- updates ----

    def upsert(self, ids: Array, rows: Array) -> None:
        """Puts rows into the table, in place of those of the same ids where there are such.

        Amortised, the cost is proportional to the rows that are given; the first update of a table copies it, since it
        needs room to grow. See grank_kernels/table/versions.py.

        Args:
            ids: (n,) int64, unique, not negative.
            rows: (n, d) float32, float16 or bfloat16, converted to the table's precision.

        Raises:
            TypeError: an argument is no tensor.
            ValueError: what `from_rows` refuses, another width or device, or a memory-mapped table; nothing is changed.
            MemoryError: there is no room for the rows; nothing is changed.
        """
        self._check_updatable()
        rows, _ = _checked_rows(rows, self.dtype)
        if rows.shape[1] != self.dim or rows.device != self.device:
            raise ValueError(
                f"rows have shape {tuple(rows.shape)} on {rows.device}; they take (n, {self.dim}) on {self.device}"
            )
        ids = _checked_ids(ids, rows.shape[:1], rows.device)
        if not len(ids):
            return
        added = _converted(rows, ids, self.dtype)
        if self._version.coarse is not None:
            added = _with_coarse(added, self._version.basis)
        with self._writing:
            old = self._version.find(ids)
            self._update(added, gone=old[old < self._version.size])

    def remove(self, ids: Array) -> None:
        """Takes rows out of the table.

        Args:
            ids: (n,) int64, unique.

        Raises:
            TypeError: ids is no tensor.
            ValueError: ids are not int64 or of another device, repeat, or one is not in the table, or the table is
                memory-mapped; nothing is changed.
            MemoryError: there is no room to work in; nothing is changed.
        """
        self._check_updatable()
        ids = _checked_ids(ids, None, self.device)
        if not len(ids):
            return
        with self._writing:
            gone = _known(self._version, ids)
            self._update(self._version.columns.map(lambda x: x[:0]), gone)

    def snapshot(self) -> "ItemTable":
        """The table as it is now, whatever updates come: it shares the rows, and would copy them if it were updated."""
        return ItemTable(self._version)

    def _update(self, added: Columns, gone: torch.Tensor) -> None:
        log, self._log = self._log, None  # for good, if the update fails
        self._version, self._log = updated(self._version, log, added, gone)

    def _check_updatable(self) -> None:
        if self._version.mapping is not None:
            raise ValueError("a memory-mapped table takes no updates; load it with mmap=False")

    # ---- what is in it ----

    def __len__(self) -> int:
        return self._version.live

    @property
    def version(self) -> int:
        """Number of updates since the table was made or loaded."""
        return self._version.number

    @property
    def dim(self) -> int:
        """Width of a row."""
        return self._version.columns.rows.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        """Precision the rows are kept and searched in."""
        return self._version.columns.rows.dtype

    @property
    def device(self) -> torch.device:
        """Where the rows are."""
        return self._version.columns.rows.device

    @property
    def nbytes(self) -> int:
        """Bytes of rows, scales, ids and the int8 copy with its basis."""
        basis = self._version.basis
        columns = self._version.columns.present().values()
        return sum(x.nbytes for x in columns) + (0 if basis is None else basis.nbytes)

    @property
    def ids(self) -> torch.Tensor:
        """(N,) int64, in the order of the rows, which is that of `allow`."""
        version = self._version
        return version.ids() if version.alive is None else version.ids()[version.alive]

    def rows(self, ids: Array) -> torch.Tensor:
        """The rows of some ids, as they are searched.

        Args:
            ids: int64 of any shape, on the table's device.

        Returns:
            (*ids.shape, d) float32; int8 rows times their scale.

        Raises:
            TypeError: ids is no tensor.
            ValueError: ids are not int64, or one is not in the table.
        """
        ids = _tensor("ids", ids)
        if ids.dtype != torch.int64:
            raise ValueError(f"ids are {ids.dtype}; they take torch.int64: ids.to(torch.int64) converts")
        version = self._version
        positions = _known(version, ids)
        rows, row_scale, *_ = version.columns
        picked = rows[positions].float()
        return picked if row_scale is None else picked * row_scale[positions][..., None]

    def __repr__(self) -> str:
        ids = ", ids" if self._version.columns.ids is not None else ""
        name = str(self.dtype).removeprefix("torch.")
        coarse = "" if self._version.coarse is None else " + int8"
        where = self.device if self._version.mapping is None else "memory-mapped"
        number = f", version {self.version}" if self.version else ""
        return f"ItemTable({len(self):_} x {self.dim} {name}{coarse}, {_megabytes(self.nbytes)}{ids}, {where}{number})"

    # ---- what the ops read ----

    @property
    def current(self) -> Version:
        """The rows as they are now. An op looks here once, or it would mix versions."""
        return self._version

    def operands(self) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None, Coarse | None]:
        """By position: rows (size, d), the scales of int8 rows (size,), external ids (size,), the int8 copy."""
        return self._version.operands()

    # ---- elsewhere ----

    def to(self, device: torch.device | str) -> "ItemTable":
        """The table on another device; itself if it is there already."""
        device = torch.device(device)
        return self if device == self.device else ItemTable(self._version.moved(lambda x: x.to(device)))

    def pin_memory(self) -> "ItemTable":
        """The table in page-locked host memory, from where queries on a GPU search it chunk by chunk; needs a GPU."""
        return ItemTable(self._version.moved(torch.Tensor.pin_memory))

    def __deepcopy__(self, memo: Any) -> "ItemTable":
        return self.snapshot() if self._version.mapping is not None else ItemTable(self._version.moved(torch.clone))

    def __reduce__(self) -> tuple[Any, ...]:
        if self._version.mapping is not None:
            raise TypeError(
                "a memory-mapped ItemTable cannot be pickled: send its path, and load it there with mmap=True"
            )
        return ItemTable, (self._version.moved(torch.clone),)  # the rows alone


def _known(version: Version, ids: torch.Tensor) -> torch.Tensor:
    """Positions of the rows of ids."""
    positions = version.find(ids)
    unknown = positions == version.size
    if bool(unknown.any()):
        raise ValueError(f"ids: {int(ids[unknown][0])} is not in the table")
    return positions


def _converted(rows: torch.Tensor, ids: torch.Tensor | None, dtype: torch.dtype) -> Columns:
    """Checked rows and ids, copied, in the table's precision."""
    rows = rows.detach()
    ids = None if ids is None else ids.clone(memory_format=torch.contiguous_format)
    if dtype != torch.int8:
        return Columns(empty(rows.shape, dtype, rows.device).copy_(rows), None, ids)
    numbers = empty(rows.shape, torch.int8, rows.device)
    scale = torch.empty(len(rows), dtype=torch.float32, device=rows.device)
    for part in _parts(rows):
        numbers[part], scale[part] = quantise(rows[part].float())
    if not bool(scale.isfinite().all()):
        row = int((~scale.isfinite()).nonzero()[0])
        raise ValueError(f"rows hold NaN or infinity, first in row {row}; int8 takes finite numbers")
    return Columns(numbers, scale, ids)


def _with_coarse(columns: Columns, basis: torch.Tensor | None) -> Columns:
    """Float rows with their certified int8 copy."""
    rows = columns.rows
    numbers = empty(rows.shape, torch.int8, rows.device)
    scale, error = (torch.empty(len(rows), dtype=torch.float32, device=rows.device) for _ in range(2))
    for part in _parts(rows):
        numbers[part], scale[part], error[part] = certify(rows[part], basis)
    return columns._replace(coarse_rows=numbers, coarse_scale=scale, coarse_error=error)


def _converted_parts(parts: Iterable[Array], dtype: torch.dtype | None) -> Iterator[Columns]:
    width = None
    for part in parts:
        rows, dtype = _checked_rows(part, dtype)
        width = rows.shape[1] if width is None else width
        if rows.shape[1] != width:
            raise ValueError(f"parts: rows have shape {tuple(rows.shape)}; the first part's have width {width}")
        yield _converted(rows, None, dtype)


def _reported(parts: Iterable[Columns], total: int, progress: Callable[[int, int], object]) -> Iterator[Columns]:
    """The same parts; of each it is told when it has been taken, and the next one is asked for."""
    done = 0
    for part in parts:
        yield part
        done += len(part.rows)
        progress(done, total)


def _parts(rows: torch.Tensor) -> Iterator[slice]:
    """So many rows at a time that copies in float32 take 1 MB and stay in a cache: 0.4 of the processor time of 16 MB
    (measured: int8 rows of 16, a Xeon with AMX).
    """
    step = max(1, (1 << 18) // max(1, rows.shape[1]))
    for start in range(0, len(rows), step):
        yield slice(start, start + step)


def _megabytes(nbytes: int) -> str:
    return f"{nbytes / 1e6:.3g} MB" if nbytes < 1e9 else f"{nbytes / 1e9:.3g} GB"


def _tensor(name: str, x: Any) -> torch.Tensor:
    x = as_tensor(name, x)
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
    return x


def _checked_rows(rows: object, dtype: torch.dtype | None) -> tuple[torch.Tensor, torch.dtype]:
    """Rows, and the precision they are to be kept in."""
    rows = _tensor("rows", rows)
    if rows.dim() != 2 or rows.dtype not in _FLOATS:
        raise ValueError(
            f"rows are {rows.dtype} of shape {tuple(rows.shape)}; they take (N, d) float32, float16 or bfloat16"
            + ("" if rows.dtype in _FLOATS else ": rows.to(torch.float32) converts")
        )
    dtype = rows.dtype if dtype is None else dtype
    if dtype not in _DTYPES:
        raise ValueError(f"dtype is {dtype}; it takes one of {', '.join(map(str, _DTYPES))}")
    return rows, dtype


def _checked_ids(ids: object, shape: tuple[int, ...] | None, device: torch.device) -> torch.Tensor:
    """Ids of rows, one a row, or as many as there are if shape is None."""
    ids = _tensor("ids", ids)
    if ids.dtype != torch.int64 or ids.dim() != 1 or ids.shape != (ids.shape if shape is None else shape):
        takes = "int64 (n,)" if shape is None else f"int64 {tuple(shape)}, one a row"
        raise ValueError(f"ids are {ids.dtype} of shape {tuple(ids.shape)}; they take {takes}")
    if ids.device != device:
        raise ValueError(f"ids are on {ids.device} and rows on {device}; both must be on one device")
    by_id = ids.sort().values
    repeated = by_id[1:][by_id[1:] == by_id[:-1]]
    if len(repeated):
        raise ValueError(f"ids must be unique; {int(repeated[0])} stands there more than once")
    if len(by_id) and int(by_id[0]) < 0:
        raise ValueError(f"ids must not be negative, got {int(by_id[0])}; -1 marks a place where nothing was found")
    return ids
