"""The storage of an `ItemTable`: columns, and versions of them under multi-version concurrency control (MVCC).

Updates append rows to a log, and set tombstones, which hold the number of the update, on rows they replace or remove. A
version is (log length, update number): it sees the first `length` rows except those with a tombstone <= its number.
Later updates append behind that length and set tombstones with larger numbers, so a version is immutable, and readers
need no lock. When the log is full, or a fifth of its rows have tombstones, compaction copies the rows of the newest
version to a new log with room for a quarter more. The old log is freed with the last version that uses it.

Cost: amortised, 4 rows are copied for a row changed. Memory: room for a quarter more rows, 4 bytes a row of tombstones
and 16 bytes a row of index; during compaction also the old log.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch

from grank_kernels.table.mapping import Mapping
from grank_kernels.table.quantise import Coarse

PART_BYTES = 1 << 24  # bytes of rows converted, written or read at a time
_NEVER = torch.iinfo(torch.int32).max  # above the updates of any log: each takes a place or sets a tombstone


def empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """An uninitialised tensor at the start of a cache line, on huge pages.

    NumPy asks Linux for huge pages, torch does not. With them a search of one query is 1.1 (float16) to 1.4 times
    (float32) as fast (measured: 1,000,000 x 64 in a virtual machine on a Xeon with AMX).
    """
    if device.type != "cpu":
        return torch.empty(shape, dtype=dtype, device=device)
    line = 64
    nbytes = math.prod(shape) * dtype.itemsize
    room = np.empty(nbytes + line, np.uint8)
    start = -room.ctypes.data % line
    return torch.from_numpy(room[start : start + nbytes]).view(dtype).view(shape)


class Columns(NamedTuple):
    """Tensors with one entry a row; None for columns that a table lacks.

    Attributes:
        rows: (N, d) float32, float16, bfloat16 or int8, contiguous.
        row_scale: (N,) float32, int8 rows only.
        ids: (N,) int64; None: the positions are the ids.
        coarse_rows: (N, d) int8, the certified copy of float rows.
        coarse_scale: (N,) float32, scales of the copy.
        coarse_error: (N,) float32, error bounds of the copy.
    """

    rows: torch.Tensor
    row_scale: torch.Tensor | None = None
    ids: torch.Tensor | None = None
    coarse_rows: torch.Tensor | None = None
    coarse_scale: torch.Tensor | None = None
    coarse_error: torch.Tensor | None = None

    def map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> "Columns":
        """The columns, each changed by a function."""
        return Columns(*(None if x is None else change(x) for x in self))  # type: ignore[arg-type]

    def present(self) -> dict[str, torch.Tensor]:
        """The columns that are not None, by name."""
        return {name: x for name, x in self._asdict().items() if x is not None}

    def parts(self) -> Iterator[slice]:
        """Slices of all positions, of about `PART_BYTES` each."""
        row_bytes = sum(math.prod(x.shape[1:]) * x.itemsize for x in self.present().values())
        step = max(1, PART_BYTES // max(1, row_bytes))
        for start in range(0, len(self.rows), step):
            yield slice(start, min(len(self.rows), start + step))


class IdIndex:
    """Positions by id: the sorted runs of a log-structured merge tree (LSM), newer runs before older. Immutable.

    A new run is merged with the run before it while that is less than twice as long: at most log2(N) runs, and log2(N)
    merges an id.
    """

    def __init__(self, runs: tuple[tuple[torch.Tensor, torch.Tensor], ...] = ()):
        self._runs = runs  # oldest first

    def updated(self, ids: torch.Tensor, first: int) -> "IdIndex":
        """The index with unique ids added, at the positions `first`, `first` + 1, ..."""
        runs = list(self._runs)
        by_id, order = ids.sort()
        positions = order + first
        while runs and len(runs[-1][0]) < 2 * len(by_id):
            older_ids, older_positions = runs.pop()
            by_id, order = torch.cat([older_ids, by_id]).sort(stable=True)
            positions = torch.cat([older_positions, positions])[order]
            newest = torch.ones_like(by_id, dtype=torch.bool)
            newest[:-1] = by_id[1:] != by_id[:-1]  # the newest position of an id: the sort is stable
            by_id, positions = by_id[newest], positions[newest]
        return IdIndex((*runs, (by_id, positions)))

    def find(self, ids: torch.Tensor, missing: int) -> torch.Tensor:
        """Positions of ids of any shape; `missing` for ids that are not indexed."""
        ids = ids.contiguous()  # searchsorted warns otherwise
        positions = torch.full_like(ids, missing)
        for by_id, at in self._runs:
            if len(by_id):
                place = torch.searchsorted(by_id, ids).clamp(max=len(by_id) - 1)
                positions = at[place].where(by_id[place] == ids, positions)
        return positions


class Log:
    """Append-only memory of rows and tombstones, of which versions see prefixes."""

    def __init__(self, like: Columns, capacity: int):
        self.capacity = capacity
        self.columns = like.map(lambda x: empty((capacity, *x.shape[1:]), x.dtype, x.device))
        self.tombstones = torch.full((capacity,), _NEVER, dtype=torch.int32, device=like.rows.device)

    def write(self, start: int, columns: Columns, kept: torch.Tensor | None = None) -> None:
        """Writes columns, or their rows at the positions `kept`, to the positions from `start` on."""
        for name, x in columns.present().items():
            place = getattr(self.columns, name)[start : start + len(x if kept is None else kept)]
            if kept is None:
                place.copy_(x)
            else:
                torch.index_select(x, 0, kept, out=place)


@dataclass
class Version:
    """An immutable snapshot of a table's rows.

    Attributes:
        columns: one entry a position; positions with a tombstone have no row.
        num_rows: number of rows.
        basis: basis of the int8 copy, see `quantise.Coarse`.
        number: number of updates since the table was created.
        mapping: the file that holds the rows, if they are memory-mapped.
        reordered: whether updates have removed or replaced rows, so that positions are not those of the table created.
    """

    columns: Columns
    num_rows: int
    basis: torch.Tensor | None = None
    number: int = 0
    mapping: Mapping | None = None
    reordered: bool = False
    _tombstones: torch.Tensor | None = None  # (size,) int32, number of the update in the log; None: no row has one
    _updates: int = 0  # update number in the log
    _index: IdIndex | None = None  # computed when first needed, as `_row_mask`
    _row_mask: torch.Tensor | None = None

    @property
    def size(self) -> int:
        """Number of positions."""
        return self.columns.rows.shape[0]

    def operands(self) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None, Coarse | None]:
        """By position: rows, scales of int8 rows, external ids, certified int8 copy.

        Raises:
            ValueError: the rows are in a file that was changed in place.
        """
        self.check_unchanged()
        rows, row_scale, ids, *_ = self.columns
        return rows, row_scale, ids, self.coarse

    @property
    def coarse(self) -> Coarse | None:
        """The certified int8 copy, if there is one."""
        rows, scale, error = self.columns[3:]
        return None if rows is None or scale is None or error is None else Coarse(rows, scale, error, self.basis)

    @property
    def row_mask(self) -> torch.Tensor | None:
        """Bool (size,), whether a position has a row; None: all have."""
        if self._row_mask is None and self._tombstones is not None:
            self._row_mask = self._tombstones > self._updates
        return self._row_mask

    def check_unchanged(self) -> None:
        """That mapped rows are those of the file that was loaded; see `Mapping.check_unchanged`."""
        if self.mapping is not None:
            self.mapping.check_unchanged()

    def ids(self) -> torch.Tensor:
        """Ids of all positions, int64 (size,)."""
        ids, device = self.columns.ids, self.columns.rows.device
        return torch.arange(self.size, device=device) if ids is None else ids

    def index(self) -> IdIndex:
        """The index of the ids."""
        if self._index is None:
            self._index = IdIndex().updated(self.ids(), 0)
        return self._index

    def find(self, ids: torch.Tensor) -> torch.Tensor:
        """Positions of ids, int64 of any shape; `size` for ids without a row."""
        if self.columns.ids is None:
            return ids.where((ids >= 0) & (ids < self.size), self.size)
        positions = self.index().find(ids, self.size)
        if self._tombstones is None:
            return positions
        there = self._tombstones[positions.clamp(max=self.size - 1)] > self._updates
        return positions.where(there, self.size)

    def compact(self) -> Columns:
        """The columns of the rows, without positions that have none."""
        return self._at(slice(None))

    def parts(self) -> Iterator[Columns]:
        """`compact`, piece by piece."""
        self.check_unchanged()
        return map(self._at, self.columns.parts())

    def _at(self, part: slice) -> Columns:
        columns = self.columns.map(lambda x: x[part])
        if self.row_mask is None:
            return columns
        kept = self.row_mask[part].nonzero().squeeze(1)
        return columns.map(lambda x: x[kept])

    def moved(self, move: Callable[[torch.Tensor], torch.Tensor]) -> "Version":
        """A copy in memory of which `move` makes each tensor."""
        self.check_unchanged()
        basis = None if self.basis is None else move(self.basis)
        return Version(self.compact().map(move), self.num_rows, basis, self.number, reordered=self.reordered)


def updated(version: Version, log: Log | None, added: Columns, deleted: torch.Tensor) -> tuple[Version, Log]:
    """The version after an update, and its log, to which the next update may append.

    Args:
        version: the newest version of the table.
        log: its log, or None if that must not be written to. If this function raises, for lack of memory, the log must
            not be used again: it may hold part of the failed update.
        added: rows to append, with their ids.
        deleted: positions of the rows to delete.
    """
    first, size = version.size, version.size + len(added.rows)
    num_rows = version.num_rows + len(added.rows) - len(deleted)
    if log is None or size > log.capacity or size - num_rows > _slack(num_rows):
        return _compacted(version, added, deleted, num_rows)
    index = version.index()
    if added.ids is not None and len(added.ids):
        index = index.updated(added.ids, first)
    log.write(first, added)
    updates = version._updates + 1
    log.tombstones[deleted] = updates
    _wait(log.tombstones.device)
    newer = replace(
        version,
        columns=log.columns.map(lambda x: x[:size]),
        num_rows=num_rows,
        number=version.number + 1,
        reordered=version.reordered or len(deleted) > 0,
        _tombstones=None if num_rows == size else log.tombstones[:size],
        _updates=updates,
        _index=index,
        _row_mask=None,
    )
    return newer, log


def _compacted(version: Version, added: Columns, deleted: torch.Tensor, num_rows: int) -> tuple[Version, Log]:
    """`updated`, in a new log without the deleted rows."""
    ids = version.ids()
    kept = torch.ones_like(ids, dtype=torch.bool) if version.row_mask is None else version.row_mask.clone()
    kept[deleted] = False
    columns = version.columns._replace(ids=ids)
    log = Log(columns, num_rows + _slack(num_rows))
    log.write(0, columns, kept.nonzero().squeeze(1))
    log.write(num_rows - len(added.rows), added)
    _wait(log.tombstones.device)
    columns, reordered = log.columns.map(lambda x: x[:num_rows]), version.reordered or len(deleted) > 0
    return Version(columns, num_rows, version.basis, version.number + 1, reordered=reordered), log


def _slack(num_rows: int) -> int:
    """Positions of a log beyond its rows: free when the log is new, with tombstones when it is compacted."""
    return max(num_rows // 4, 1024)


def _wait(device: torch.device) -> None:
    """Waits until searches on other CUDA streams can read what was written."""
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()
