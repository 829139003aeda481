"""State of a batch of CTAs that run together: registers, shared memory, copies and products in flight."""

import functools
import math
from collections import Counter
from dataclasses import dataclass
from typing import NoReturn

import numpy as np

from .memory import GLOBAL_BASE, POISON, SHARED_WINDOW, Accesses, Clocks, GlobalMemory
from .parser import Address, Immediate, Instruction, Kernel, Name, Operand, PtxError, Register, Special
from .values import PLAIN, TYPE_BITS, UNSIGNED, decode, encode, is_float, resize

WARP = 32
Mask = np.ndarray | None  # active lanes of an instruction; None for all


class Space:
    """One state space: flat bytes, and the record of accesses to them."""

    def __init__(self, name: str, data: np.ndarray, accesses: Accesses) -> None:
        self.name, self.data, self.accesses = name, data, accesses

    def words(self, bytes: int) -> np.ndarray:
        return self.data.view(UNSIGNED[8 * bytes])


@dataclass(frozen=True)
class Task:
    """State of a launch that its batches share."""

    kernel: Kernel
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    parameters: bytes
    memory: GlobalMemory
    global_accesses: Accesses
    shared_bytes: int  # per CTA
    shared_granule: int
    counters: Counter[str]
    rng: np.random.Generator | None


class Machine:
    """A batch of CTAs. A register is a vector over lanes: the threads of all CTAs of the batch, CTA after CTA."""

    def __init__(self, task: Task, ctas: range) -> None:
        self.task, self.kernel, self.memory = task, task.kernel, task.memory
        self.counters, self.rng, self.shared_bytes = task.counters, task.rng, task.shared_bytes
        self.threads = math.prod(task.block)
        self.warps_per_cta = self.threads // WARP
        self.lanes = len(ctas) * self.threads
        self.every_lane = np.arange(self.lanes)
        self.thread = self.every_lane % self.threads
        self.local_cta = self.every_lane // self.threads
        self.cta = self.local_cta + ctas.start
        self.warp = (ctas.start * self.warps_per_cta + self.every_lane // WARP).astype(np.int32)  # in the launch
        self.clocks = Clocks(ctas.start, len(ctas), self.warps_per_cta)
        shared = len(ctas) * task.shared_bytes
        accesses = Accesses(shared // task.shared_granule, task.shared_granule, self.warps_per_cta)
        self.shared = Space("shared", np.full(shared, POISON, np.uint8), accesses)
        self.global_ = Space("global", task.memory.data, task.global_accesses)
        self.registers: list[np.ndarray | None] = [None] * len(task.kernel.registers)
        self.locked: dict[int, np.ndarray] = {}  # register of an unfinished wgmma: lanes that must not access it
        self.copies: list = []  # cp.async in flight
        self.committed = np.zeros(self.lanes, np.int64)  # groups of copies per lane
        self.products: list = []  # wgmma in flight
        self.committed_products = np.zeros(self.lanes // WARP, np.int64)  # groups of wgmma per warp
        self.instruction: Instruction = task.kernel.instructions[0]
        self.active = np.ones(self.lanes, bool)  # lanes at the current instruction, before its guard
        self.special: dict[str, np.ndarray] = self._special()

    def fail(self, message: str, lane: int | np.integer | None = None) -> NoReturn:
        who = "" if lane is None else f", thread {self.thread[lane]} of CTA {self.cta[lane]}"
        raise PtxError(f"{self.kernel.name}: {message}{who}, at {self.instruction}")

    # ---- registers and operands

    def bits(self, register: Register) -> np.ndarray:
        """The register's storage. Before the first write it holds garbage."""
        held = self.registers[register.index]
        if held is None:
            nonsense = bool(register.index % 2) if register.bits == 1 else 0xDEADBEEFDEADBEEF & (1 << register.bits) - 1
            dtype = bool if register.bits == 1 else UNSIGNED[register.bits]
            held = self.registers[register.index] = np.full(self.lanes, nonsense, dtype)
        return held

    def read(self, operand: Operand, type: str) -> np.ndarray:
        """Values of an operand: a vector over the lanes, or one value for all lanes."""
        if isinstance(operand, Register):
            if self.locked:
                self._check_unlocked(operand, None)
            bits = self.bits(operand)
            plain = PLAIN.get(type)
            if plain is not None and plain.itemsize * 8 == operand.bits:
                return bits.view(plain)
            if type == "pred":
                return ~bits if operand.negated else bits
            return decode(resize(bits, TYPE_BITS[type]), type)
        if isinstance(operand, Immediate):
            return immediate(operand, type)
        if isinstance(operand, Special):
            if operand.name not in self.special:
                self.fail(f"unknown special register %{operand.name}")
            return decode(resize(self.special[operand.name], TYPE_BITS[type]), type)
        self.fail(f"cannot read {operand} as .{type}")

    def read_lanes(self, operand: Operand, type: str) -> np.ndarray:
        """Values of an operand, one per lane."""
        values = self.read(operand, type)
        return values if values.ndim else np.full(self.lanes, values)

    def write(self, register: Operand, type: str, values: np.ndarray, mask: Mask) -> None:
        if register is None:
            return
        if not isinstance(register, Register):
            self.fail(f"cannot write to {register}")
        if self.locked:
            self._check_unlocked(register, mask)
        held = self.bits(register)
        if values.dtype == PLAIN.get(type) and values.itemsize == held.itemsize:
            bits = values.view(held.dtype)
        else:
            bits = resize(encode(values, type), register.bits, signed=type[0] == "s")
        if mask is None:
            held[...] = bits
        else:
            np.copyto(held, bits, where=mask)

    def _check_unlocked(self, register: Register, mask: Mask) -> None:
        lanes = self.locked.get(register.index)
        if lanes is not None:
            lanes = lanes & self.active if mask is None else lanes & mask
            if lanes.any():
                self.fail(f"{register.name} is in use by a wgmma in flight", np.nonzero(lanes)[0][0])

    def _special(self) -> dict[str, np.ndarray]:
        block, grid, t, c = self.task.block, self.task.grid, self.thread, self.cta
        (bx, by, _), (gx, gy, _) = block, grid
        lane = t % WARP
        values = {"laneid": lane, "warpid": t // WARP, "nwarpid": self.warps_per_cta}
        values |= {"tid.x": t % bx, "tid.y": t // bx % by, "tid.z": t // (bx * by)}
        values |= {"ctaid.x": c % gx, "ctaid.y": c // gx % gy, "ctaid.z": c // (gx * gy)}
        values |= {f"ntid.{axis}": size for axis, size in zip("xyz", block, strict=True)}
        values |= {f"nctaid.{axis}": size for axis, size in zip("xyz", grid, strict=True)}
        below = (1 << lane) - 1
        values |= {"lanemask_lt": below, "lanemask_le": below << 1 | 1, "lanemask_eq": below + 1}
        values |= {"lanemask_ge": ~below & 0xFFFFFFFF, "lanemask_gt": ~(below << 1 | 1) & 0xFFFFFFFF}
        return {name: np.full(self.lanes, value, np.uint32) for name, value in values.items()}

    # ---- addresses

    def lanes_of(self, mask: Mask) -> np.ndarray:
        return self.every_lane if mask is None else np.nonzero(mask)[0]

    def addresses(self, operand: Operand) -> np.ndarray:
        """Addresses as int64, one per lane."""
        if not isinstance(operand, Address) or isinstance(operand.base, Name):
            self.fail(f"not an address: {operand}")
        if isinstance(operand.base, Register):
            return self.read(operand.base, f"u{operand.base.bits}").astype(np.int64) + operand.offset
        return np.full(self.lanes, operand.base.bits + operand.offset, np.int64)

    def locate(
        self, space: str, operand: Operand, size: int, mask: Mask, bytes: np.ndarray | None = None
    ) -> tuple[Space, np.ndarray, np.ndarray]:
        """(space, lanes, byte offsets) of an access of `size` bytes per lane; checks alignment and bounds.

        `bytes` gives the bytes accessed per lane if they are fewer than `size`.
        """
        lanes = self.lanes_of(mask)
        addresses = self.addresses(operand)[lanes]
        misaligned = addresses & (size - 1)
        if misaligned.any():
            at = np.nonzero(misaligned)[0][0]
            self.fail(f"misaligned access of {size} bytes at address {addresses[at]:#x}", lanes[at])
        if space == "generic":
            in_window = (addresses >= SHARED_WINDOW) & (addresses < GLOBAL_BASE)
            if in_window.any() and not in_window.all():
                self.fail("one instruction mixes generic addresses of shared and global memory")
            space = "shared" if len(lanes) and in_window[0] else "global"
            if space == "shared":
                addresses = addresses - SHARED_WINDOW
        touched = size if bytes is None else bytes[lanes]
        return (
            self._locate_shared(lanes, addresses, touched)
            if space == "shared"
            else self._locate_global(lanes, addresses, touched)
        )

    def _locate_shared(
        self, lanes: np.ndarray, addresses: np.ndarray, size: int | np.ndarray
    ) -> tuple[Space, np.ndarray, np.ndarray]:
        outside = (addresses < 0) | (addresses + size > self.shared_bytes)
        if outside.any():
            at = np.nonzero(outside)[0][0]
            self.fail(f"out of bounds of shared memory: byte {addresses[at]} of {self.shared_bytes}", lanes[at])
        return self.shared, lanes, addresses + self.local_cta[lanes] * self.shared_bytes

    def _locate_global(
        self, lanes: np.ndarray, addresses: np.ndarray, size: int | np.ndarray
    ) -> tuple[Space, np.ndarray, np.ndarray]:
        offsets = addresses - GLOBAL_BASE
        outside = self.memory.outside(offsets, size) if len(lanes) else None
        if outside is not None:
            at = np.nonzero(outside)[0][0]
            self.fail(f"out of bounds: {self.memory.describe(int(offsets[at]))}", lanes[at])
        return self.global_, lanes, offsets

    def by_warp(self, lanes: np.ndarray, offsets: np.ndarray) -> np.ndarray:
        """Offsets (warps, 32), -1 for idle lanes, for the traffic counters."""
        rows = np.full(self.lanes, -1, np.int64)
        rows[lanes] = offsets
        rows = rows.reshape(-1, WARP)
        return rows if len(lanes) == self.lanes else rows[(rows >= 0).any(1)]


@functools.cache
def immediate(operand: Immediate, type: str) -> np.ndarray:
    if type == "pred":
        return np.asarray(operand.bits != 0)
    if operand.kind == "int" and is_float(type) and not type.endswith("x2"):
        return np.asarray(operand.bits, np.uint64).view(np.int64).astype(np.float32)
    if operand.kind != "int" and is_float(type) and not type.endswith("x2"):
        held = np.asarray(operand.bits, np.uint32 if operand.kind == "f32" else np.uint64)
        value = held.view(np.float32 if operand.kind == "f32" else np.float64)
        return value if type not in ("f32", "f64", "f16") else decode(encode(value, type), type)
    return decode(np.asarray(operand.bits & (1 << TYPE_BITS[type]) - 1, UNSIGNED[TYPE_BITS[type]]), type)
