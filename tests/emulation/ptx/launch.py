"""Runs a kernel over a grid, and counts executed instructions and moved bytes."""

import ctypes
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from . import arithmetic, transfers, warps, wgmma  # noqa: F401  (declare their instructions)
from .machine import WARP, Machine, Task
from .memory import READY, UNWRITTEN, Accesses, GlobalMemory
from .parser import Immediate, Instruction, Kernel, PtxError
from .registry import resolve
from .scheduler import Scheduler
from .values import TYPE_BITS

LANES = 8192  # threads per batch: enough to hide Python's overhead, few enough to keep registers in the cache


@dataclass(frozen=True)
class Run:
    """Counts of a launch.

    Attributes:
        executions: per instruction, the number of warps that executed it.
        counters: sums over the launch:

            global_load_bytes, global_store_bytes, shared_load_bytes, shared_store_bytes: bytes requested by lanes
            global_load_sectors, global_store_sectors: 32-byte sectors touched, per warp instruction
            shared_wavefronts: passes over the banks; shared_wavefronts_ideal: passes without bank conflicts
            matrix_wavefronts, matrix_wavefronts_ideal: the same for ldmatrix and stmatrix
            cp_async_bytes, cp_async_sectors: bytes read from global memory, without the zero-filled bytes
            global_atomics, shared_atomics: lanes
            mma, wgmma: warp instructions; barriers: completed barriers
    """

    kernel: Kernel
    executions: np.ndarray
    counters: Counter[str]

    def executed(self, name: str) -> int:
        """Number of warp instructions with an opcode that begins with `name`."""
        return sum(
            int(n) for i, n in zip(self.kernel.instructions, self.executions, strict=True) if i.opcode.startswith(name)
        )


class Coverage:
    """Instructions of a kernel executed by at least one thread, over several runs."""

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel
        self.executions = np.zeros(len(kernel.instructions), np.int64)

    def add(self, run: Run) -> None:
        self.executions += run.executions

    @property
    def fraction(self) -> float:
        return float((self.executions > 0).mean())

    def lines(self) -> dict[str, bool]:
        """For each source line, whether one of its instructions was executed."""
        executed: dict[str, bool] = {}
        for i, n in zip(self.kernel.instructions, self.executions, strict=True):
            executed[i.source] = executed.get(i.source, False) or n > 0
        return executed

    def missing(self) -> list[Instruction]:
        return [i for i, n in zip(self.kernel.instructions, self.executions, strict=True) if not n]


def launch(
    kernel: Kernel,
    grid: Sequence[int],
    block: Sequence[int],
    arguments: Sequence[int | float | np.generic | bytes],
    memory: GlobalMemory,
    shared_bytes: int = 0,
    seed: int | None = None,
) -> Run:
    """Executes the kernel on `memory`.

    Args:
        kernel: the parsed kernel.
        grid, block: up to three dimensions each.
        arguments: one per parameter: an address, a number, or the bytes of a struct. Trailing parameters may be left
            out, as Triton does with its scratch pointers.
        memory: holds the buffers.
        shared_bytes: dynamic shared memory.
        seed: runs warps and atomics in a random order; None runs them in a fixed order.
    """
    resolve(kernel)
    grid3, block3 = ((*map(int, sizes), 1, 1)[:3] for sizes in (grid, block))
    threads, ctas = math.prod(block3), math.prod(grid3)
    if threads % WARP or not 0 < threads <= 1024:
        raise PtxError(f"block must be a multiple of 32 threads, at most 1024, got {block3}")
    unit = granule(kernel, "global")
    accesses = Accesses(len(memory.data) // unit, unit, threads // WARP)
    accesses.state[:] = np.where(memory.written.reshape(-1, unit).all(1), READY, UNWRITTEN)
    task = Task(
        kernel=kernel,
        grid=grid3,
        block=block3,
        parameters=pack(kernel, arguments),
        memory=memory,
        global_accesses=accesses,
        shared_bytes=-(-(kernel.static_shared_bytes + shared_bytes) // 16) * 16,
        shared_granule=granule(kernel, "shared"),
        counters=Counter(),
        rng=None if seed is None else np.random.default_rng(seed),
    )
    executions = np.zeros(len(kernel.instructions), np.int64)
    batch = max(1, LANES // threads)
    with np.errstate(all="ignore"):
        for first in range(0, ctas, batch):
            Scheduler(Machine(task, range(first, min(first + batch, ctas))), executions).run()
    memory.written |= np.repeat(accesses.writer >= 0, unit)
    return Run(kernel, executions, task.counters)


def granule(kernel: Kernel, space: str) -> int:
    """Largest power of two, up to 16, that divides the size of every access to a memory space."""
    sizes = [16]
    for i in kernel.instructions:
        if i.name in ("ld", "st", "atom", "red") and not i.has("param") and transfers.space_of(i) in (space, "generic"):
            sizes.append(TYPE_BITS[i.type] // 8 * transfers.vector_length(i))
        elif i.name == "cp" and i.has("global"):
            size = i.operands[2].bits if isinstance(i.operands[2], Immediate) else 4
            sizes.append(
                size if space == "shared" or len(i.operands) == 3 else 4
            )  # cp.async with a source size may read less
    return min(sizes)


def pack(kernel: Kernel, arguments: Sequence[int | float | np.generic | bytes]) -> bytes:
    """Parameter memory: the arguments as bytes."""
    if len(arguments) > len(kernel.parameters):
        raise PtxError(f"{kernel.name} takes {len(kernel.parameters)} arguments, got {len(arguments)}")
    packed = bytearray(kernel.parameter_bytes)
    for (name, parameter), argument in zip(kernel.parameters.items(), arguments, strict=False):
        raw = to_bytes(argument, parameter.size)
        if len(raw) != parameter.size:
            raise PtxError(f"{kernel.name}: {name} takes {parameter.size} bytes, got {len(raw)}")
        packed[parameter.offset : parameter.offset + parameter.size] = raw
    return bytes(packed)


def to_bytes(argument: int | float | np.generic | bytes | ctypes.Structure, size: int) -> bytes:
    if isinstance(argument, bytes | ctypes.Structure):
        return bytes(argument)
    if isinstance(argument, np.generic):
        return argument.tobytes()
    if isinstance(argument, float):
        return {2: np.float16, 4: np.float32, 8: np.float64}[size](argument).tobytes()
    return (int(argument) & (1 << 8 * size) - 1).to_bytes(size, "little")
