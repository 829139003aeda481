"""Memory instructions: loads, stores, atomics, cp.async, fences. Every access is checked first."""

from dataclasses import dataclass

import numpy as np

from .machine import Machine, Mask, Space
from .memory import IN_FLIGHT, READY, distinct_sectors, wavefronts
from .parser import Instruction, Operand, Register, Vector
from .registry import CACHE, ORDER, SPACES, instruction
from .values import TYPE_BITS, UNSIGNED, decode, encode

STRONG = {"relaxed", "acquire", "release", "acq_rel", "volatile"}


def space_of(i: Instruction) -> str:
    if i.has("shared") or i.has("shared::cta"):
        return "shared"
    return "global" if i.has("global") else "generic"


def vector_length(i: Instruction) -> int:
    return 4 if i.has("v4") else 2 if i.has("v2") else 8 if i.has("v8") else 1


def items(operand: Operand) -> tuple[Operand, ...]:
    return operand.items if isinstance(operand, Vector) else (operand,)


# ---- the checks


def where(m: Machine, space: Space, offset: int) -> str:
    return f"shared byte {offset % m.shared_bytes}" if space is m.shared else m.memory.describe(offset)


def race(m: Machine, space: Space, at: np.ndarray, bad: np.ndarray, lanes: np.ndarray, what: str) -> None:
    if bad.any():
        lane, part = np.argwhere(bad)[0]
        offset = int(at[lane, part]) * space.accesses.granule
        m.fail(f"race on {where(m, space, offset)}: {what} by another warp, without a barrier in between", lanes[lane])


def observe(
    m: Machine, space: Space, lanes: np.ndarray, offsets: np.ndarray, size: int, strong: bool = False
) -> np.ndarray:
    """Checks and records a read; returns its granules."""
    accesses, warps = space.accesses, m.warp[lanes][:, None]
    at = accesses.granules(offsets, size)
    state = accesses.state[at]
    if (state != READY).any():
        lane, part = np.argwhere(state != READY)[0]
        kind = "in-flight" if state[lane, part] == IN_FLIGHT else "uninitialised"
        m.fail(f"read of {kind} memory: {where(m, space, int(offsets[lane]))}", lanes[lane])
    bad = accesses.unordered_write(at, warps, m.clocks)
    if strong:
        bad &= ~accesses.by_atomic[at]
    race(m, space, at, bad, lanes, "written")
    if not strong:
        accesses.mark_read(at, warps, m.clocks)
    return at


def overwrite(
    m: Machine, space: Space, lanes: np.ndarray, offsets: np.ndarray, words: np.ndarray, strong: bool = False
) -> None:
    """Checks, records and makes a write of one row of words per lane."""
    accesses, warps = space.accesses, m.warp[lanes][:, None]
    width = words.dtype.itemsize
    at = accesses.granules(offsets, width * words.shape[1])
    if (accesses.state[at] == IN_FLIGHT).any():
        lane = np.argwhere(accesses.state[at] == IN_FLIGHT)[0][0]
        m.fail(f"write to in-flight memory: {where(m, space, int(offsets[lane]))}", lanes[lane])
    race(m, space, at, accesses.unordered_read(at, warps, m.clocks), lanes, "read")
    written = accesses.unordered_write(at, warps, m.clocks)
    if strong:
        written &= ~accesses.by_atomic[at]
    memory = space.words(width)
    index = (offsets // width)[:, None] + np.arange(words.shape[1])
    if written.any():
        different = (memory[index] != words).any(1)[:, None]
        race(m, space, at, written & different, lanes, "written differently")
    memory[index] = words
    accesses.state[at] = READY
    lost = accesses.mark_write(at, warps, m.clocks, atomic=strong)
    if lost.any():
        different = (memory[index] != words).any(1)[:, None]
        race(m, space, at, lost & different, lanes, "written differently")


def count(m: Machine, kind: str, space: Space, lanes: np.ndarray, offsets: np.ndarray, size: int) -> None:
    rows = m.by_warp(lanes, offsets)
    if space is m.shared:
        taken, ideal = wavefronts(rows, size)
        m.counters["shared_wavefronts"] += taken
        m.counters["shared_wavefronts_ideal"] += ideal
    else:
        m.counters[f"global_{kind}_sectors"] += distinct_sectors(rows, size)
    m.counters[f"{space.name}_{kind}_bytes"] += size * len(lanes)


# ---- loads and stores


@instruction("ld ldu", f"{SPACES} {CACHE} {ORDER} v2 v4 v8")
def load(m: Machine, i: Instruction, mask: Mask) -> None:
    if i.has("param"):
        load_parameter(m, i, mask)
        return
    targets = items(i.operands[0])
    width = TYPE_BITS[i.type] // 8
    space, lanes, offsets = m.locate(space_of(i), i.operands[1], width * len(targets), mask)
    observe(m, space, lanes, offsets, width * len(targets), strong=not STRONG.isdisjoint(i.modifiers))
    count(m, "load", space, lanes, offsets, width * len(targets))
    words = space.words(width)[(offsets // width)[:, None] + np.arange(len(targets))]
    for column, target in enumerate(targets):
        put(m, target, i.type, words[:, column], lanes)


def put(m: Machine, target: Operand, type: str, bits: np.ndarray, lanes: np.ndarray) -> None:
    """Writes the bits of a type to lanes of a register."""
    if isinstance(target, Register):
        spread = np.zeros(m.lanes, bits.dtype)
        spread[lanes] = bits
        mask = np.zeros(m.lanes, bool)
        mask[lanes] = True
        m.write(target, f"s{TYPE_BITS[type]}" if type[0] == "s" else f"u{TYPE_BITS[type]}", spread, mask)


def load_parameter(m: Machine, i: Instruction, mask: Mask) -> None:
    width, targets = TYPE_BITS[i.type] // 8, items(i.operands[0])
    lanes = m.lanes_of(mask)
    start = m.addresses(i.operands[1])[lanes]
    outside = (start < 0) | (start + width * len(targets) > len(m.task.parameters))
    if outside.any():
        m.fail(f"out of bounds of the parameters: byte {start[outside][0]} of {len(m.task.parameters)}")
    bytes = start[:, None] + np.arange(width * len(targets))
    words = np.frombuffer(m.task.parameters, np.uint8)[bytes].view(UNSIGNED[8 * width])
    for column, target in enumerate(targets):
        put(m, target, i.type, words[:, column], lanes)


@instruction("st", f"{SPACES} {CACHE} {ORDER} v2 v4 v8")
def store(m: Machine, i: Instruction, mask: Mask) -> None:
    sources = items(i.operands[1])
    width = TYPE_BITS[i.type] // 8
    space, lanes, offsets = m.locate(space_of(i), i.operands[0], width * len(sources), mask)
    words = np.stack([m.read_lanes(each, f"b{8 * width}")[lanes] for each in sources], 1)
    count(m, "store", space, lanes, offsets, width * len(sources))
    overwrite(m, space, lanes, offsets, words, strong=not STRONG.isdisjoint(i.modifiers))


# ---- atomics

COMBINE = {
    "add": lambda old, new: old + new,
    "min": np.minimum,
    "max": np.maximum,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
    "exch": lambda old, new: new,
    "inc": lambda old, new: np.where(old >= new, 0, old + 1),
    "dec": lambda old, new: np.where((old == 0) | (old > new), new, old - 1),
}


@instruction("atom red", f"{SPACES} {ORDER} {CACHE} noftz cas " + " ".join(COMBINE))
def atomic(m: Machine, i: Instruction, mask: Mask) -> None:
    result, address, *operands = i.operands if i.name == "atom" else (None, *i.operands)
    width = TYPE_BITS[i.type] // 8
    space, lanes, offsets = m.locate(space_of(i), address, width, mask)
    if m.rng is not None:
        order = m.rng.permutation(len(lanes))
        lanes, offsets = lanes[order], offsets[order]
    accesses, warps = space.accesses, m.warp[lanes][:, None]
    at = accesses.granules(offsets, width)
    if (accesses.state[at] != READY).any():
        lane = np.argwhere(accesses.state[at] != READY)[0][0]
        m.fail(f"atomic on uninitialised memory: {where(m, space, int(offsets[lane]))}", lanes[lane])
    race(m, space, at, accesses.unordered_read(at, warps, m.clocks), lanes, "read")
    plain = accesses.unordered_write(at, warps, m.clocks) & ~accesses.by_atomic[at]
    race(m, space, at, plain, lanes, "written without an atomic")
    accesses.mark_write(at, warps, m.clocks, atomic=True)
    m.counters[f"{space.name}_atomics"] += len(lanes)

    memory, index = space.words(width), offsets // width
    values = [m.read_lanes(each, i.type)[lanes] for each in operands]
    before = np.zeros(len(lanes), memory.dtype)
    for turn in turns(index):  # lanes with the same word go one after another
        before[turn] = memory[index[turn]]
        old = decode(before[turn], i.type)
        if i.has("cas"):
            new = np.where(old == values[0][turn], values[1][turn], old)
        else:
            new = next(COMBINE[each] for each in i.modifiers if each in COMBINE)(old, values[0][turn])
        memory[index[turn]] = encode(new, i.type)
    put(m, result, i.type, before, lanes)


def turns(index: np.ndarray) -> list[np.ndarray]:
    """Groups of positions, in order, each with distinct indices."""
    order = np.argsort(index, kind="stable")
    new = np.diff(index[order], prepend=-1) != 0
    start = np.maximum.accumulate(np.where(new, np.arange(len(index)), 0))
    rank = np.empty(len(index), np.int64)
    rank[order] = np.arange(len(index)) - start
    return [np.nonzero(rank == r)[0] for r in range(rank.max(initial=-1) + 1)]


# ---- cp.async


@dataclass
class Copy:
    """One cp.async in flight: its lanes, destinations and bytes."""

    lanes: np.ndarray
    targets: np.ndarray
    sources: np.ndarray
    size: int
    read: np.ndarray  # bytes read from global memory; the others are zeros
    group: np.ndarray

    def part(self, which: np.ndarray) -> "Copy":
        return Copy(
            self.lanes[which], self.targets[which], self.sources[which], self.size, self.read[which], self.group[which]
        )


@instruction("cp", f"async commit_group wait_group wait_all {SPACES} {CACHE}")
def copy(m: Machine, i: Instruction, mask: Mask) -> None:
    if i.has("commit_group"):
        m.committed[m.lanes_of(mask)] += 1
    elif i.has("wait_group") or i.has("wait_all"):
        keep = int(m.read(i.operands[0], "u32")) if i.has("wait_group") else -1
        land(m, keep, m.active if mask is None else mask)
    else:
        issue(m, i, mask)


def issue(m: Machine, i: Instruction, mask: Mask) -> None:
    """Starts a copy: its destination must not be accessed before the wait of the copying lane."""
    size = int(m.read(i.operands[2], "u32"))
    read = np.full(m.lanes, size)
    for extra in i.operands[3:]:
        if isinstance(extra, Register) and extra.bits == 1:  # ignore-src
            read = np.where(m.read_lanes(extra, "pred"), 0, read)
        elif not (isinstance(extra, Register) and extra.bits == 64):  # 64 bits: a cache policy
            read = m.read_lanes(extra, "u32").astype(np.int64)
    target, lanes, targets = m.locate("shared", i.operands[0], size, mask)
    if (read[lanes] > size).any():
        most = lanes[read[lanes].argmax()]
        m.fail(f"the source size of cp.async must be at most {size} bytes, got {read[most]}", most)
    sources = np.zeros(m.lanes, np.int64)
    everyone = np.ones(m.lanes, bool) if mask is None else mask
    for bytes in np.unique(read[lanes]):
        if bytes:
            some = everyone & (read == bytes)
            source, reading, offsets = m.locate("global", i.operands[1], size, some, np.where(some, bytes, 0))
            observe(m, source, reading, offsets, int(bytes))
            m.counters["cp_async_bytes"] += int(bytes) * len(reading)
            m.counters["cp_async_sectors"] += distinct_sectors(m.by_warp(reading, offsets), int(bytes))
            sources[reading] = offsets
    nonsense = np.full((len(lanes), size // 4), -1, np.int32).view(np.uint32)
    overwrite(m, target, lanes, targets, nonsense)
    accesses = target.accesses
    accesses.state[accesses.granules(targets, size)] = IN_FLIGHT
    m.copies.append(Copy(lanes, targets, sources[lanes], size, read[lanes], m.committed[lanes]))


def land(m: Machine, keep: int, waiting: np.ndarray) -> None:
    """Completes all but the last `keep` groups of the waiting lanes; -1 also completes uncommitted copies."""
    under_way = []
    for each in m.copies:
        done = waiting[each.lanes] & (each.group < m.committed[each.lanes] - keep)
        landed, rest = each.part(done), each.part(~done)
        if len(rest.lanes):
            under_way.append(rest)
        if len(landed.lanes):
            column = np.arange(landed.size)
            source = np.where(column < landed.read[:, None], landed.sources[:, None] + column, 0)
            bytes = np.where(column < landed.read[:, None], m.memory.data[source], 0)
            m.shared.data[landed.targets[:, None] + column] = bytes
            accesses = m.shared.accesses
            at = accesses.granules(landed.targets, landed.size)
            accesses.state[at] = READY
            accesses.mark_write(at, m.warp[landed.lanes][:, None], m.clocks)
    m.copies = under_way


# ---- fences and prefetches


@instruction("fence membar", f"{ORDER} sc gl proxy async shared::cta")
def fence(m: Machine, i: Instruction, mask: Mask) -> None:
    """Fences; only fence.proxy.async has an effect: generic writes become visible to wgmma."""
    if i.has("proxy"):
        m.shared.accesses.fence(np.unique(m.warp[m.active if mask is None else mask]), m.clocks)


@instruction("prefetch prefetchu", f"{SPACES} L1 L2")
@instruction("griddepcontrol", "wait launch_dependents")
def advice(m: Machine, i: Instruction, mask: Mask) -> None:
    """Hints without an effect on results."""


@instruction("createpolicy", "fractional range L2::evict_first L2::evict_last L2::evict_normal L2::evict_unchanged")
def cache_policy(m: Machine, i: Instruction, mask: Mask) -> None:
    m.write(i.operands[0], "b64", np.asarray(0, np.uint64), mask)
