"""Global and shared memory with bounds, initialisation, copies in flight, and a race detector on vector clocks.

Two accesses race if they are from different warps, at least one of them writes, and no barrier orders them. Warps of
different CTAs are never ordered. Exempt: two atomics; two writes of equal bytes, which Triton emits for replicated
tensors; accesses of one warp.
"""

import copy
from dataclasses import dataclass

import numpy as np

from .parser import PtxError

GLOBAL_BASE = 0x7F00_0000_0000
SHARED_WINDOW = 0x7E00_0000_0000  # generic address of shared memory
POISON = 0xFF  # NaN in every float format, -1 in every integer

UNWRITTEN, READY, IN_FLIGHT = range(3)
NOBODY, SEVERAL_CTAS = -1, -2
SEVERAL_WARPS = -16  # SEVERAL_WARPS - c: several warps of CTA c


class Clocks:
    """Vector clocks: for each pair of warps of a CTA, the other's clock at their last common barrier."""

    def __init__(self, first_cta: int, ctas: int, warps: int) -> None:
        self.warps = warps
        self.first = first_cta * warps
        self.known = np.zeros((ctas * warps, warps), np.int32)
        self.known[np.arange(ctas * warps), np.arange(ctas * warps) % warps] = 1
        self.now = np.ones(ctas * warps, np.int32)
        self.oldest = self.known.min(1)

    def meet(self, warps: np.ndarray) -> None:
        """A barrier of these warps of one CTA: orders all their earlier accesses."""
        local = warps - self.first
        self.known[local] = self.known[local].max(0)
        self.now[local] += 1
        self.known[local, local % self.warps] = self.now[local]
        self.oldest[local] = self.known[local].min(1)


class Accesses:
    """State per granule of a memory space; a granule is the largest unit that no access of the kernel splits."""

    def __init__(self, granules: int, granule: int, warps_per_cta: int) -> None:
        self.granule, self.warps_per_cta = granule, warps_per_cta
        self.state = np.full(granules, UNWRITTEN, np.uint8)
        self.writer = np.full(granules, NOBODY, np.int32)
        self.written_at = np.zeros(granules, np.int32)
        self.by_atomic = np.zeros(granules, bool)
        self.reader = np.full(granules, NOBODY, np.int32)
        self.read_at = np.zeros(granules, np.int32)
        self.unfenced = np.zeros(granules, bool)  # written after the last fence.proxy.async

    def granules(self, offsets: np.ndarray, size: int) -> np.ndarray:
        first = offsets // self.granule
        return first[:, None] + np.arange(-(-size // self.granule))

    def unordered_write(self, at: np.ndarray, warps: np.ndarray, clocks: Clocks) -> np.ndarray:
        """Granules with a last write that is not ordered before the current access of `warps`."""
        who = self.writer[at]
        other = (who != warps) & (who >= 0)
        if not other.any():
            return other
        known = clocks.known[warps - clocks.first, who % self.warps_per_cta] >= self.written_at[at]
        same_cta = who // self.warps_per_cta == warps // self.warps_per_cta
        return other & ~(same_cta & known)

    def unordered_read(self, at: np.ndarray, warps: np.ndarray, clocks: Clocks) -> np.ndarray:
        """Granules with a read that is not ordered before the current access of `warps`."""
        who = self.reader[at]
        other = (who != warps) & (who != NOBODY)
        if not other.any():
            return other
        several = who <= SEVERAL_WARPS
        cta = np.where(several, SEVERAL_WARPS - who, who // self.warps_per_cta)
        local = warps - clocks.first
        known = np.where(several, clocks.oldest[local], clocks.known[local, who % self.warps_per_cta])
        ordered = (who != SEVERAL_CTAS) & (cta == warps // self.warps_per_cta) & (known >= self.read_at[at])
        return other & ~ordered

    def mark_write(self, at: np.ndarray, warps: np.ndarray, clocks: Clocks, atomic: bool = False) -> np.ndarray:
        """Records a write; returns where another warp of the same instruction is recorded as the writer."""
        shape = np.broadcast_to(warps, at.shape)
        self.writer[at] = shape
        self.written_at[at] = clocks.now[warps - clocks.first]
        self.by_atomic[at] = atomic
        self.unfenced[at] = True
        return self.writer[at] != shape

    def mark_read(self, at: np.ndarray, warps: np.ndarray, clocks: Clocks) -> None:
        before = self.reader[at]
        new = np.where(self.unordered_read(at, warps, clocks), self._several(before, warps), warps)
        self.reader[at] = new
        self.read_at[at] = clocks.now[warps - clocks.first]
        after = self.reader[at]
        if (after != new).any():  # several warps in this instruction
            self.reader[at] = np.where(after == new, new, self._several(after, warps))

    def _several(self, who: np.ndarray, warps: np.ndarray) -> np.ndarray:
        mine = warps // self.warps_per_cta
        cta = np.where(who <= SEVERAL_WARPS, SEVERAL_WARPS - who, who // self.warps_per_cta)
        return np.where((cta == mine) & (who != SEVERAL_CTAS), SEVERAL_WARPS - mine, SEVERAL_CTAS)

    def fence(self, warps: np.ndarray, clocks: Clocks) -> None:
        """fence.proxy.async: writes ordered before the fences of these warps become visible to wgmma."""
        at = np.nonzero(self.unfenced)[0]
        for warp in warps:
            self.unfenced[at] &= self.unordered_write(at, np.full(len(at), warp), clocks)


@dataclass
class Buffer:
    name: str
    offset: int
    shape: tuple[int, ...]
    dtype: np.dtype
    nbytes: int

    @property
    def end(self) -> int:
        return self.offset + self.nbytes


class GlobalMemory:
    """Named buffers with unmapped gaps between them; may be used by several launches."""

    GAP, ALIGNMENT = 4096, 512

    def __init__(self) -> None:
        self.buffers: list[Buffer] = []
        self.data = np.zeros(self.GAP, np.uint8)
        self.written = np.ones(self.GAP, bool)  # gaps are found by the bounds check

    def put(self, name: str, array: np.ndarray) -> int:
        """Copies the array; returns its address. A buffer of the same name, type and shape is overwritten."""
        array = np.ascontiguousarray(array)
        known = next((b for b in self.buffers if b.name == name), None)
        if known is None:
            known = self._add(name, array)
        elif (known.shape, known.dtype) != (array.shape, array.dtype):
            raise PtxError(f"{name} must stay {known.dtype} {known.shape}, got {array.dtype} {array.shape}")
        self.data[known.offset : known.end] = array.reshape(-1).view(np.uint8)
        self.written[known.offset : known.end] = True
        return GLOBAL_BASE + known.offset

    def empty(self, name: str, shape: int | tuple[int, ...], dtype: np.typing.DTypeLike) -> int:
        """Adds an uninitialised buffer; returns its address."""
        buffer = self._add(name, np.empty(shape, dtype))
        self.data[buffer.offset : buffer.end] = POISON
        self.written[buffer.offset : buffer.end] = False
        return GLOBAL_BASE + buffer.offset

    def get(self, name: str) -> np.ndarray:
        buffer = next(b for b in self.buffers if b.name == name)
        return self.data[buffer.offset : buffer.end].view(buffer.dtype).reshape(buffer.shape).copy()

    def copy(self) -> "GlobalMemory":
        """A deep copy of the buffers' bytes."""
        twin = copy.copy(self)
        twin.data, twin.written = self.data.copy(), self.written.copy()
        return twin

    def _add(self, name: str, array: np.ndarray) -> Buffer:
        buffer = Buffer(name, len(self.data), array.shape, array.dtype, array.nbytes)
        size = -(-array.nbytes // self.ALIGNMENT) * self.ALIGNMENT + self.GAP
        self.buffers.append(buffer)
        self.data = np.concatenate([self.data, np.zeros(size, np.uint8)])
        self.written = np.concatenate([self.written, np.ones(size, bool)])
        return buffer

    def outside(self, offsets: np.ndarray, size: int | np.ndarray) -> np.ndarray | None:
        """Mask of the accesses that are not within one buffer; None if all are."""
        low, high = int(offsets.min()), int((offsets + size).max())
        if any(b.offset <= low and high <= b.end for b in self.buffers):
            return None
        starts = np.array([-1] + [b.offset for b in self.buffers])
        ends = np.array([-1] + [b.end for b in self.buffers])
        found = np.searchsorted(starts, offsets, "right") - 1
        outside = (offsets < 0) | (offsets + size > ends[found])
        return outside if outside.any() else None

    def describe(self, offset: int) -> str:
        """The nearest buffer to an offset, as text."""

        def distance(buffer: Buffer) -> int:
            return max(buffer.offset - offset, offset - buffer.end + 1, 0)

        if not self.buffers:
            return "no buffer at all"
        near = min(self.buffers, key=distance)
        return f"{near.name}{offset - near.offset:+d} of {near.nbytes} bytes"


def distinct_sectors(offsets: np.ndarray, size: int) -> int:
    """Number of 32-byte sectors touched per warp, summed. `offsets` is (warps, lanes); -1 is an idle lane."""
    parts = [offsets] if size <= 32 else [offsets + i for i in range(0, size, 32)]
    sectors = np.sort(np.concatenate(parts, 1) >> 5, axis=1)
    new = np.diff(sectors, axis=1, prepend=np.int64(-1)) != 0
    return int(np.count_nonzero(new & (sectors >= 0)))


def wavefronts(offsets: np.ndarray, size: int) -> tuple[int, int]:
    """(passes over the 32 banks of shared memory, passes without conflicts); offsets as in `distinct_sectors`."""
    lanes = min(offsets.shape[1], 32, 128 // size)  # lanes that share a pass: 128 bytes
    rows = offsets.reshape(-1, lanes)
    rows = rows[(rows >= 0).any(1)]
    words = np.where(rows >= 0, rows >> 2, -1)[..., None] + np.arange(max(1, size // 4))
    words = np.where((rows >= 0)[..., None], words, -1).reshape(len(rows), -1)
    words.sort(axis=1)
    new = (np.diff(words, axis=1, prepend=-1) != 0) & (words >= 0)
    row, column = np.nonzero(new)
    banks = np.bincount(row * 32 + (words[row, column] & 31), minlength=len(rows) * 32).reshape(-1, 32)
    return int(banks.max(1, initial=0).sum()), len(rows)
