"""`ItemTable`: the rows that searches scan, in the precision of the scan."""

import itertools
import os
import threading
import weakref
from collections.abc import Callable, Iterable
from dataclasses import replace
from multiprocessing.reduction import ForkingPickler
from operator import index
from typing import Any, SupportsIndex

import numpy as np
import torch

from grank_kernels.common.arrays import Array
from grank_kernels.common.arrow import column_parts
from grank_kernels.common.checks import check_choice, check_device, check_tensor
from grank_kernels.table import file as table_file
from grank_kernels.table.quantise import Coarse, basis_for
from grank_kernels.table.row_mask import RowMask
from grank_kernels.table.rows import (
    checked_any_ids,
    checked_ids,
    checked_int8,
    checked_num_rows,
    checked_rows,
    converted,
    converted_parts,
    reported,
    with_coarse,
)
from grank_kernels.table.versions import Columns, Log, Version, updated


class ItemTable:
    """Item rows in one precision, with optional external ids, in memory, on a GPU or memory-mapped.

    `ItemTable.from_rows` and `ItemTable.load` make tables; `mips_topk(queries, table, k)` searches them. There is no
    index to build.

    Threads may search a table while others update it. A search that starts after `upsert` or `remove` has returned sees
    the update; a concurrent search sees all of it or nothing. Searches never wait for updates.

    Wherever a tensor is taken, a NumPy array or an object with `__dlpack__` is, too. Copies and pickles hold the rows
    alone. Sent to another process (`multiprocessing`, data loader workers), the rows move to shared memory and are not
    copied. A memory-mapped table cannot be pickled: send its path.
    """

    def __init__(self, version: Version):
        """Takes a version whose columns `from_rows` or `load` has checked and converted."""
        self._version = version  # replaced as a whole
        self._log: Log | None = None  # the version's log, if this table may append to it
        self._writing = threading.Lock()
        _tables.add(self)

    # ---- from rows ----

    @classmethod
    def from_rows(
        cls,
        rows: Array,
        *,
        ids: Array | None = None,
        dtype: torch.dtype | None = None,
        coarse: torch.dtype | None = None,
        scales: Array | None = None,
    ) -> "ItemTable":
        """A table with a copy of the rows. The copy has no gradient; a warning says so for rows that require one.

        Args:
            rows: (N, d) float32, float16 or bfloat16, or int8 with `scales`; also a `pyarrow` column of lists of d.
            ids: (N,) int64, unique and not negative, which searches return; None: the positions.
            dtype: float32, float16, bfloat16 or int8; None: the dtype of `rows`. int8 is symmetric by row:
                `scale = max|row| / 127`, numbers rounded half to even.
            coarse: torch.int8 adds an int8 copy of float rows with an error bound a row. Searches scan the copy and
                read only the rows that the bound cannot rule out: the result is bit for bit that without a copy, in the
                time of an int8 search. Rows with infinities or NaN are always read.
            scales: (N,) float32, finite and 0 or more, for rows that are int8 already: row i is `scales[i] * rows[i]`.

        Raises:
            TypeError: an argument is not a tensor or array with strided memory.
            ValueError: a dtype or shape does not fit, ids repeat or are negative, or rows for int8 hold NaN or
                infinity.
        """
        if scales is None:
            rows, dtype = checked_rows(rows, dtype)
        else:
            rows, scales, dtype = checked_int8(rows, scales, dtype)
        if coarse not in (None, torch.int8) or (coarse is not None and dtype == torch.int8):
            raise ValueError(f"coarse must be None, or torch.int8 with float rows, got {coarse} with {dtype} rows")
        if ids is not None:
            ids = checked_ids(ids, rows.shape[:1], rows.device)
        columns, basis = converted(rows, ids, dtype, scales), None
        if coarse is not None:
            basis = basis_for(columns.rows)
            columns = with_coarse(columns, basis)
        return cls(Version(columns, len(rows), basis))

    # ---- files ----

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the table to a file, atomically: `path` is the old or the new file, also after a kill or power loss.

        The format is safetensors with checksums, see docs/table_format.md.

        Raises:
            OSError: the file cannot be written; unless the message says otherwise, `path` is as before.
            KeyboardInterrupt: `path` is the old or the new file, and complete.
        """
        version = self._version
        shapes = version.columns.map(lambda x: x.new_empty((version.num_rows, *x.shape[1:]), device="meta"))
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
        """Reads a table that `save` or `write` has written. docs/security.md says what is checked.

        Args:
            path: the file.
            mmap: leave the rows in the file, for tables larger than memory. Searches stream through them; with an int8
                copy, which is read into memory, they read single rows. The table takes no updates. The file may be
                replaced or removed while it is mapped, but not be changed in place: a search refuses a file of another
                size or modification time, and a file that shrinks during a search ends the process (SIGBUS).
            verify: compare the checksums, which reads the whole file once.
            part: (r, n), only the rows N * r // n to N * (r + 1) // n. Without ids they are numbered from 0.

        Raises:
            OSError: the file does not exist or cannot be read or mapped.
            TypeError: `path` is not a path, or `part` not a pair of ints.
            ValueError: the file is not a table, of another version, truncated or corrupted, or `part` is invalid; the
                message says which. Unique ids are not checked with `mmap`: that would take as much memory.
        """
        columns, basis, mapping = table_file.read(path, mmap, verify, part)
        if columns.ids is not None and mapping is None:
            try:
                checked_ids(columns.ids, None, columns.ids.device)
            except ValueError as error:
                raise ValueError(f"{os.fspath(path)} is malformed: {error}") from None
        return cls(Version(columns, len(columns.rows), basis, mapping=mapping))

    @staticmethod
    def write(
        path: str | os.PathLike[str],
        parts: Iterable[Array],
        *,
        num_rows: int | None = None,
        dtype: torch.dtype | None = None,
        column: str | None = None,
        progress: Callable[[int, int], object] = lambda done, total: None,
    ) -> None:
        """Writes a table larger than memory from parts of its rows; their positions are the ids.

        Args:
            path: the file, written as by `save`.
            parts: tensors (n, d), as `from_rows` takes them; or a `pyarrow` Dataset or Table, for example
                `pyarrow.dataset.dataset("folder")` over Parquet files, of which one batch is in memory at a time.
            num_rows: number of rows in all parts; a Dataset or Table knows it.
            dtype: as for `from_rows`; None: the dtype of the first part.
            column: the column of a Dataset or Table; None: its only column of lists.
            progress: called after every part with (rows written, `num_rows`).

        Raises:
            OSError: as `save`.
            TypeError: a part is not a tensor or array, or `num_rows` is not an int.
            ValueError: `from_rows` would refuse a part, parts differ in width, or `num_rows` is not their number of
                rows.
        """
        columns = column_parts(parts, column)
        if columns is not None:
            parts, count = columns
            num_rows = count if num_rows is None else num_rows
        elif column is not None:
            raise ValueError(f"column must be None unless parts are a Dataset or Table of pyarrow, got {column!r}")
        num_rows = checked_num_rows(num_rows)
        converted = converted_parts(parts, dtype)
        first = next(converted, None)
        if first is None:
            raise ValueError("parts must hold at least one tensor (n, d), where n may be 0, got none")
        shapes = first.map(lambda x: x.new_empty((num_rows, *x.shape[1:]), device="meta"))
        table_file.write(path, shapes, reported(itertools.chain([first], converted), num_rows, progress))

    # ---- updates ----

    def upsert(self, ids: Array, rows: Array, *, scales: Array | None = None) -> None:
        """Inserts rows, and replaces rows of the same ids.

        The amortised cost is proportional to the number of rows given. The first update copies the table, to have room
        to grow. See grank_kernels/table/versions.py.

        Args:
            ids: (n,) int64, unique and not negative.
            rows: (n, d) float32, float16 or bfloat16, converted to the table's dtype; or int8 with `scales`.
            scales: as for `from_rows`, of an int8 table.

        Raises:
            TypeError: an argument is not a tensor or array with strided memory.
            ValueError: as `from_rows`, another width or device, or a memory-mapped table. The table is unchanged.
            MemoryError: there is no room for the rows. The table is unchanged.
        """
        self._check_updatable()
        if scales is None:
            rows, _ = checked_rows(rows, self.dtype)
        elif self.dtype == torch.int8:
            rows, scales, _ = checked_int8(rows, scales, torch.int8)
        else:
            raise ValueError(f"scales must be None for {self.dtype} tables: pass rows.float() * scales[:, None]")
        if rows.shape[1] != self.dim or rows.device != self.device:
            raise ValueError(f"rows must be (n, {self.dim}) on {self.device}, got {tuple(rows.shape)} on {rows.device}")
        ids = checked_ids(ids, rows.shape[:1], rows.device)
        if not len(ids):
            return
        added = converted(rows, ids, self.dtype, scales)
        if self._version.coarse is not None:
            added = with_coarse(added, self._version.basis)
        with self._writing:
            old = self._version.find(ids)
            self._update(added, deleted=old[old < self._version.size])

    def remove(self, ids: Array, *, missing: str = "raise") -> None:
        """Deletes rows.

        Args:
            ids: (n,) int64, unique.
            missing: "raise" for an error where an id is not in the table, or "ignore".

        Raises:
            TypeError: ids is not a tensor or array.
            ValueError: ids are not int64, on another device, repeat, or one is not in the table; or the table is
                memory-mapped. The table is unchanged.
            MemoryError: there is no room for the update. The table is unchanged.
        """
        self._check_updatable()
        check_choice("missing", missing, ("raise", "ignore"))
        ids = checked_ids(ids, None, self.device)
        if not len(ids):
            return
        with self._writing:
            if missing == "ignore":
                positions = self._version.find(ids)
                deleted = positions[positions < self._version.size]
            else:
                deleted = _known(self._version, ids)
            if not len(deleted):
                return
            self._update(self._version.columns.map(lambda x: x[:0]), deleted)

    def snapshot(self) -> "ItemTable":
        """The table as it is now, unaffected by later updates. It shares the rows; its own first update copies them."""
        version = self._version
        return ItemTable(replace(version, reordered=False) if version.reordered else version)

    def mask(self, rows: Array) -> RowMask:
        """A set of rows for `allow` of `mips_topk`, which stays right when the table is updated.

        Args:
            rows: int64 (n,), ids, of which a search ignores those that it does not find; or bool (N,) in the order of
                `ids`.

        Raises:
            TypeError: rows is not a tensor or array.
            ValueError: rows are neither int64 nor bool, of another shape or on another device.
        """
        rows = check_tensor("rows", rows, (torch.int64, torch.bool), (1,))
        check_device("rows", rows, "the table", self.device)
        if rows.dtype == torch.int64:
            return RowMask(rows.clone())
        ids = self.ids
        if rows.shape != ids.shape:
            raise ValueError(f"rows must be bool ({len(ids)},), one entry a row, got {tuple(rows.shape)}")
        return RowMask(ids[rows])

    def _update(self, added: Columns, deleted: torch.Tensor) -> None:
        log, self._log = self._log, None  # for good, if the update fails
        self._version, self._log = updated(self._version, log, added, deleted)

    def _check_updatable(self) -> None:
        if self._version.mapping is not None:
            raise ValueError(
                "the table must be in memory to be updated, got a memory-mapped one: load it with mmap=False"
            )

    # ---- contents ----

    def __len__(self) -> int:
        return self._version.num_rows

    @property
    def version(self) -> int:
        """Number of updates since the table was created or loaded."""
        return self._version.number

    @property
    def dim(self) -> int:
        """Width of a row."""
        return self._version.columns.rows.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        """Precision in which rows are stored and searched."""
        return self._version.columns.rows.dtype

    @property
    def device(self) -> torch.device:
        """Device of the rows."""
        return self._version.columns.rows.device

    @property
    def nbytes(self) -> int:
        """Bytes of rows, scales, ids, and the int8 copy with its basis."""
        basis = self._version.basis
        columns = self._version.columns.present().values()
        return sum(x.nbytes for x in columns) + (0 if basis is None else basis.nbytes)

    @property
    def ids(self) -> torch.Tensor:
        """(N,) int64, in the order of the rows, which updates change and `snapshot` keeps."""
        version = self._version
        return version.ids() if version.row_mask is None else version.ids()[version.row_mask]

    def rows(self, ids: Array) -> torch.Tensor:
        """The rows of some ids, in the precision that is searched.

        Args:
            ids: int64 of any shape, on the table's device.

        Returns:
            (*ids.shape, d) float32; int8 rows times their scale.

        Raises:
            TypeError: ids is not a tensor or array.
            ValueError: ids are not int64, or one is not in the table; or the table's file was changed in place.
        """
        version, positions = self._at(ids)
        rows, row_scale, *_ = version.columns
        picked = rows[positions].float()
        return picked if row_scale is None else picked * row_scale[positions][..., None]

    def int8_rows(self, ids: Array) -> tuple[torch.Tensor, torch.Tensor]:
        """The stored numbers (*ids.shape, d) int8 and scales (*ids.shape,) float32 of an int8 table.

        Raises:
            ValueError: as `rows`, or the table is not int8.
        """
        version, positions = self._at(ids)
        rows, scales, *_ = version.columns
        if scales is None:
            raise ValueError(f"the table must be int8, got {self.dtype}: rows(ids) returns its rows")
        return rows[positions], scales[positions]

    def _at(self, ids: Array) -> tuple[Version, torch.Tensor]:
        """The current version, and the positions in it of ids, all of which must be there."""
        ids = checked_any_ids("ids", ids)
        check_device("ids", ids, "the table", self.device)
        version = self._version
        version.check_unchanged()
        return version, _known(version, ids)

    def __contains__(self, id: SupportsIndex) -> bool:
        version = self._version
        one = torch.tensor([index(id)], device=self.device)
        return bool(version.find(one)[0] < version.size)

    def __getitem__(self, ids: "int | np.integer[Any] | Array") -> torch.Tensor:
        """The row (d,) float32 of one id, or the rows of ids as `rows`; KeyError for one id that is not there."""
        if not isinstance(ids, (int, np.integer)):
            return self.rows(ids)
        if ids not in self:
            raise KeyError(int(ids))
        return self.rows(torch.tensor(int(ids), device=self.device))

    __iter__ = None  # `table[0]`, `table[1]`, ... would be taken for a sequence

    def __repr__(self) -> str:
        ids = ", ids" if self._version.columns.ids is not None else ""
        name = str(self.dtype).removeprefix("torch.")
        coarse = "" if self._version.coarse is None else " + int8"
        where = self.device if self._version.mapping is None else "memory-mapped"
        number = f", version {self.version}" if self.version else ""
        return f"ItemTable({len(self):_} x {self.dim} {name}{coarse}, {_megabytes(self.nbytes)}{ids}, {where}{number})"

    # ---- for the ops ----

    @property
    def current(self) -> Version:
        """The current version. An op reads this once, so as not to mix versions."""
        return self._version

    def operands(self) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None, Coarse | None]:
        """By position: rows (size, d), scales of int8 rows (size,), external ids (size,), the int8 copy."""
        return self._version.operands()

    # ---- copies ----

    def to(self, device: torch.device | str) -> "ItemTable":
        """A copy on another device; the table itself if it is on the device."""
        device = torch.device(device)
        return self if device == self.device else ItemTable(self._version.moved(lambda x: x.to(device)))

    def pin_memory(self) -> "ItemTable":
        """A copy in page-locked host memory, which queries on a GPU search chunk by chunk; needs a GPU."""
        return ItemTable(self._version.moved(torch.Tensor.pin_memory))

    def __deepcopy__(self, memo: Any) -> "ItemTable":
        return self.snapshot() if self._version.mapping is not None else ItemTable(self._version.moved(torch.clone))

    def __reduce__(self) -> tuple[Any, ...]:
        return ItemTable, (self._picklable().moved(torch.clone),)  # the rows alone

    def _picklable(self) -> Version:
        if self._version.mapping is not None:
            raise TypeError("a memory-mapped ItemTable cannot be pickled: send its path, and load it with mmap=True")
        return self._version

    def _reduce_shared(self) -> tuple[Any, ...]:
        """`__reduce__` for another process on this machine: moves the rows to shared memory, once a version.

        The table keeps them: a spawned process receives the file descriptors of the memory after pickling, when
        temporaries would be gone.
        """
        with self._writing:
            version = self._picklable()
            if version.row_mask is not None or not all(map(_is_shared, version.columns.present().values())):
                self._version, self._log = version.moved(_shared), None
            return ItemTable, (replace(self._version, _index=None),)


_tables: "weakref.WeakSet[ItemTable]" = weakref.WeakSet()
ForkingPickler.register(ItemTable, ItemTable._reduce_shared)


def _after_fork() -> None:
    """Replaces the locks: a thread that held one does not exist in the child, and no version shows its update."""
    for table in _tables:
        table._writing = threading.Lock()


os.register_at_fork(after_in_child=_after_fork)


def _is_shared(x: torch.Tensor) -> bool:
    return bool(x.is_shared())  # type: ignore[no-untyped-call]


def _shared(x: torch.Tensor) -> torch.Tensor:
    """A copy in shared memory, which memory of a GPU always is."""
    if not x.is_cpu:
        return x.clone()
    shared: torch.Tensor = torch.empty_like(x).share_memory_()  # type: ignore[no-untyped-call]
    return shared.copy_(x)


def _known(version: Version, ids: torch.Tensor) -> torch.Tensor:
    """Positions of ids, all of which must be in the table."""
    positions = version.find(ids)
    unknown = positions == version.size
    if bool(unknown.any()):
        raise ValueError(f"ids must be in the table, got {int(ids[unknown][0])}, which is not")
    return positions


def _megabytes(nbytes: int) -> str:
    return f"{nbytes / 1e6:.3g} MB" if nbytes < 1e9 else f"{nbytes / 1e9:.3g} GB"
