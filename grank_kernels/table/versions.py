"""What an `ItemTable` holds: columns of rows, and versions of them that share memory.

Updates append rows to a log, and mark the rows that they replace or remove with their number. A version is a length of
the log and a number: it sees the rows before its length that no update up to its number has marked. Later updates
write behind that length and mark with larger numbers, so a version never changes, and readers need no lock. When the
log is full or a fifth of its rows are gone, the rows of the newest version move to a new log, with room for a quarter
more; the old one is freed with the last version of it that anybody holds.

Cost: amortised, 4 rows are copied for a row changed. Memory: room for a quarter more rows, 4 bytes a row of marks and
16 bytes a row of index; while rows move also the old log.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from grank_kernels.table.mapping import Mapping
from grank_kernels.table.quantise import Coarse

PART_BYTES = 1 << 24  # of rows that are converted, written or read at a time
_NEVER = torch.iinfo(torch.int32).max  # no log sees as many updates: each takes room for a row or leaves a row gone


def empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Memory for rows. NumPy asks Linux for huge pages, which torch does not: a search spends less on translating
    addresses and is 1.1 (float16) to 1.4 times (float32) as fast for one query (measured: 1,000,000 x 64 in a virtual
    machine on a Xeon with AMX).
    """
    if device.type != "cpu":
        return torch.empty(shape, dtype=dtype, device=device)
    line = 64
    nbytes = math.prod(shape) * dtype.itemsize
    room = np.empty(nbytes + line, np.uint8)
    start = -room.ctypes.data % line
    return torch.from_numpy(room[start : start + nbytes]).view(dtype).view(shape)


class Columns(NamedTuple):
    """Tensors with one entry a row; what a table does not have is None.

    Attributes:
        rows: (N, d) float32, float16, bfloat16 or int8, contiguous.
        row_scale: (N,) float32, int8 rows only.
        ids: (N,) int64; None: the positions are the ids.
        coarse_rows: (N, d) int8, the certified copy of float rows, with
        coarse_scale: (N,) float32, and
        coarse_error: (N,) float32.
    """

    rows: torch.Tensor
    row_scale: torch.Tensor | None = None
    ids: torch.Tensor | None = None
    coarse_rows: torch.Tensor | None = None
    coarse_scale: torch.Tensor | None = None
    coarse_error: torch.Tensor | None = None

    def map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> "Columns":
        """The same columns, each changed."""
        return Columns(*(None if x is None else change(x) for x in self))  # type: ignore[arg-type]

    def present(self) -> dict[str, torch.Tensor]:
        """The columns there are, by name."""
        return {name: x for name, x in self._asdict().items() if x is not None}

    def parts(self) -> Iterator[slice]:
        """All positions, `PART_BYTES` at a time."""
        row_bytes = sum(math.prod(x.shape[1:]) * x.itemsize for x in self.present().values())
        step = max(1, PART_BYTES // max(1, row_bytes))
        for start in range(0, len(self.rows), step):
            yield slice(start, min(len(self.rows), start + step))


class IdIndex:
    """Where the rows of ids are: sorted runs of (id, position), the newer of which hide the older. Immutable.

    A run absorbs the one before while that is less than twice as long. So there are at most log2(N) runs, and an id
    takes part in as many merges.
    """

    def __init__(self, runs: tuple[tuple[torch.Tensor, torch.Tensor], ...] = ()):
        self._runs = runs  # oldest first

    def updated(self, ids: torch.Tensor, first: int) -> "IdIndex":
        """With these ids, unique among themselves, at the positions from `first` on."""
        runs = list(self._runs)
        by_id, order = ids.sort()
        positions = order + first
        while runs and len(runs[-1][0]) < 2 * len(by_id):
            older_ids, older_positions = runs.pop()
            by_id, order = torch.cat([older_ids, by_id]).sort(stable=True)
            positions = torch.cat([older_positions, positions])[order]
            newest = torch.ones_like(by_id, dtype=torch.bool)
            newest[:-1] = by_id[1:] != by_id[:-1]  # of equal ids the last, which the stable sort has left there
            by_id, positions = by_id[newest], positions[newest]
        return IdIndex((*runs, (by_id, positions)))

    def find(self, ids: torch.Tensor, missing: int) -> torch.Tensor:
        """Positions of ids of any shape; `missing` for those that no run has."""
        ids = ids.contiguous()  # searchsorted warns otherwise
        positions = torch.full_like(ids, missing)
        for by_id, at in self._runs:
            if len(by_id):
                place = torch.searchsorted(by_id, ids).clamp(max=len(by_id) - 1)
                positions = at[place].where(by_id[place] == ids, positions)
        return positions


class Log:
    """Memory that versions share, each a part of it from the start."""

    def __init__(self, like: Columns, capacity: int):
        self.capacity = capacity
        self.columns = like.map(lambda x: empty((capacity, *x.shape[1:]), x.dtype, x.device))
        self.died = torch.full((capacity,), _NEVER, dtype=torch.int32, device=like.rows.device)

    def write(self, start: int, columns: Columns, kept: torch.Tensor | None = None) -> None:
        """Writes columns, or the rows of them at the positions `kept`, from position `start` on."""
        for name, x in columns.present().items():
            place = getattr(self.columns, name)[start : start + len(x if kept is None else kept)]
            if kept is None:
                place.copy_(x)
            else:
                torch.index_select(x, 0, kept, out=place)


@dataclass
class Version:
    """The rows of a table at one time. It never changes.

    Attributes:
        columns: with one entry a position; a position may have no row.
        live: number of rows.
        basis: of the int8 copy, see `quantise.Coarse`.
        number: of updates that the table has seen.
        mapping: the file in which the rows are, if they are not in memory.
    """

    columns: Columns
    live: int
    basis: torch.Tensor | None = None
    number: int = 0
    mapping: Mapping | None = None
    _died: torch.Tensor | None = None  # (size,) int32: the update of the log that removed the row; None: no row is gone
    _updates: int = 0  # of the log
    _index: IdIndex | None = None  # this and the next are made when they are first needed
    _alive: torch.Tensor | None = None

    @property
    def size(self) -> int:
        """Number of positions."""
        return self.columns.rows.shape[0]

    def operands(self) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None, Coarse | None]:
        """What an op reads, by position: rows, the scales of int8 rows, external ids, the certified int8 copy."""
        rows, row_scale, ids, *_ = self.columns
        return rows, row_scale, ids, self.coarse

    @property
    def coarse(self) -> Coarse | None:
        """The certified int8 copy, if there is one."""
        rows, scale, error = self.columns[3:]
        return None if rows is None or scale is None or error is None else Coarse(rows, scale, error, self.basis)

    @property
    def alive(self) -> torch.Tensor | None:
        """Which positions have a row, bool (size,); None: all."""
        if self._alive is None and self._died is not None:
            self._alive = self._died > self._updates
        return self._alive

    def ids(self) -> torch.Tensor:
        """Of every position, int64 (size,)."""
        ids, device = self.columns.ids, self.columns.rows.device
        return torch.arange(self.size, device=device) if ids is None else ids

    def index(self) -> IdIndex:
        """Of the ids."""
        if self._index is None:
            self._index = IdIndex().updated(self.ids(), 0)
        return self._index

    def find(self, ids: torch.Tensor) -> torch.Tensor:
        """Positions of the rows of some ids (int64, any shape); `size` where there is no such row."""
        if self.columns.ids is None:
            return ids.where((ids >= 0) & (ids < self.size), self.size)
        positions = self.index().find(ids, self.size)
        if self._died is None:
            return positions
        there = self._died[positions.clamp(max=self.size - 1)] > self._updates
        return positions.where(there, self.size)

    def compact(self) -> Columns:
        """The rows, without the positions that have none."""
        return self._at(slice(None))

    def parts(self) -> Iterator[Columns]:
        """What `compact` gives, piece by piece."""
        return map(self._at, self.columns.parts())

    def _at(self, part: slice) -> Columns:
        columns = self.columns.map(lambda x: x[part])
        if self.alive is None:
            return columns
        kept = self.alive[part].nonzero().squeeze(1)
        return columns.map(lambda x: x[kept])

    def moved(self, move: Callable[[torch.Tensor], torch.Tensor]) -> "Version":
        """The rows, each tensor moved to where `move` puts it."""
        basis = None if self.basis is None else move(self.basis)
        return Version(self.compact().map(move), self.live, basis, self.number)


def updated(version: Version, log: Log | None, added: Columns, gone: torch.Tensor) -> tuple[Version, Log]:
    """The version after an update, and the log it is in, to which the next update may append.

    Args:
        version: the newest of its table.
        log: in which it is, or None if that must not be written to. If this function raises, for want of memory, the
            log must not be used again: what the failed update left in it is not to be seen by the next one.
        added: rows to append, with their ids.
        gone: positions of rows that are there no longer.
    """
    first, size = version.size, version.size + len(added.rows)
    live = version.live + len(added.rows) - len(gone)
    if log is None or size > log.capacity or size - live > _slack(live):
        return _rewritten(version, added, gone, live)
    index = version.index()
    if added.ids is not None and len(added.ids):
        index = index.updated(added.ids, first)
    log.write(first, added)
    updates = version._updates + 1
    log.died[gone] = updates
    _wait(log.died.device)
    columns, died = log.columns.map(lambda x: x[:size]), None if live == size else log.died[:size]
    return Version(columns, live, version.basis, version.number + 1, None, died, updates, index), log


def _rewritten(version: Version, added: Columns, gone: torch.Tensor, live: int) -> tuple[Version, Log]:
    """`updated`, in a new log."""
    ids = version.ids()
    kept = torch.ones_like(ids, dtype=torch.bool) if version.alive is None else version.alive.clone()
    kept[gone] = False
    columns = version.columns._replace(ids=ids)
    log = Log(columns, live + _slack(live))
    log.write(0, columns, kept.nonzero().squeeze(1))
    log.write(live - len(added.rows), added)
    _wait(log.died.device)
    return Version(log.columns.map(lambda x: x[:live]), live, version.basis, version.number + 1), log


def _slack(live: int) -> int:
    """Positions that a log of `live` rows may have beyond them: free ones at first, at last rows that are gone."""
    return max(live // 4, 1024)


def _wait(device: torch.device) -> None:
    """Searches on other streams must find written what a version shows them."""
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()
