"""Scheduler: branches, barriers and exits. The lowest program counter runs first, so diverged threads reconverge.

With a random generator a random subset of the warps runs until all of them wait or have exited, then another subset. A
correct kernel gives the same result under every order.
"""

import numpy as np

from .machine import WARP, Machine, Mask
from .parser import Instruction, Name, PtxError, Vector
from .registry import HANDLERS, instruction
from .warps import members

STEPS = 5_000_000  # most instructions of a batch; more are reported as an endless loop


@instruction("bra", "uni")
@instruction("ret exit trap bar barrier", "uni sync red popc and or aligned warp cta")
def control(machine: Machine, i: Instruction, mask: Mask) -> None:
    """Registers the control instructions, which the scheduler executes itself."""


def warps_of(lanes: np.ndarray) -> int:
    return int(np.count_nonzero(lanes.reshape(-1, WARP).any(1)))


class Scheduler:
    def __init__(self, machine: Machine, executions: np.ndarray) -> None:
        self.machine, self.executions = machine, executions
        self.code = machine.kernel.instructions
        self.handlers = [HANDLERS[i.name] for i in self.code]
        self.end = len(self.code)
        self.pc = np.zeros(machine.lanes, np.int64)
        self.barrier = np.full(machine.lanes, -1)  # number of the barrier at which a lane waits
        self.expected = np.zeros(machine.lanes, np.int64)
        self.predicate = np.zeros(machine.lanes, bool)  # operand of bar.red
        self.chosen = np.ones(machine.lanes, bool)
        self.steps = 0

    def run(self) -> None:
        while (ready := self._ready()) is not None:
            p = int(self.pc[ready].min())
            active = ready & (self.pc == p)
            ahead = self.pc[ready & (self.pc > p)]
            self._straight_run(p, active, int(ahead.min()) if ahead.size else self.end)

    def _ready(self) -> np.ndarray | None:
        live = self.pc < self.end
        ready = live & (self.barrier < 0)
        if not ready.any():
            if live.any():
                stuck = np.nonzero(live)[0][0]
                self.machine.instruction = self.code[self.pc[stuck] - 1]
                self.machine.fail("deadlock: not all threads of the CTA reach this barrier", stuck)
            return None
        rng = self.machine.rng
        if rng is None:
            return ready
        if not (ready & self.chosen).any():
            warps = np.nonzero(ready.reshape(-1, WARP).any(1))[0]
            chosen = rng.choice(warps, max(1, len(warps) // 4), replace=False)
            self.chosen = np.repeat(np.isin(np.arange(self.machine.lanes // WARP), chosen), WARP)
        return ready & self.chosen

    def _straight_run(self, p: int, active: np.ndarray, stop: int) -> None:
        """Executes from p to a branch, a barrier, an exit, or the program counter of other ready threads."""
        machine = self.machine
        machine.active = active
        threads = np.count_nonzero(active)
        everybody = None if threads == machine.lanes else active
        warps = warps_of(active)
        while True:
            i = machine.instruction = self.code[p]
            mask, acting = everybody, warps
            if i.guard is not None:
                mask = active & machine.read(i.guard, "pred")
                passed = np.count_nonzero(mask)
                if passed == threads:
                    mask = everybody
                else:
                    acting = warps_of(mask) if passed else 0
            self.executions[p] += acting
            handler = self.handlers[p]
            p += 1
            if handler is control:
                self.pc[active] = p
                if acting:
                    self._control(i, active if mask is None else mask)
                return
            if acting:
                handler(machine, i, mask)
            if p >= stop:
                self.pc[active] = p
                return
            self.steps += 1
            if self.steps > STEPS:
                machine.fail(f"still running after {STEPS} instructions")

    def _control(self, i: Instruction, lanes: np.ndarray) -> None:
        match i.name:
            case "bra":
                target = i.operands[0]
                if not isinstance(target, Name) or target.name not in self.machine.kernel.labels:
                    raise PtxError(f"no such label: {i}")
                self.pc[lanes] = self.machine.kernel.labels[target.name]
            case "ret" | "exit":
                self.pc[lanes] = self.end
                for cta in np.unique(self.machine.local_cta[lanes]):
                    self._release(cta)
            case "trap":
                self.machine.fail("trap", np.nonzero(lanes)[0][0])
            case _:
                self._arrive(i, lanes)

    def _arrive(self, i: Instruction, lanes: np.ndarray) -> None:
        rows = lanes.reshape(-1, WARP)
        if i.has("warp"):
            members(self.machine, lanes, i.operands[0])
            return
        partial = rows.any(1) & ~rows.all(1)
        if partial.any():
            self.machine.fail("barrier reached by part of a warp", np.nonzero(lanes & np.repeat(partial, WARP))[0][0])
        operands = i.operands
        if i.has("red"):
            self.predicate[lanes] = self.machine.read_lanes(operands[-1], "pred")[lanes]
            operands = operands[1:-1]
        self.barrier[lanes] = self.machine.read_lanes(operands[0], "u32")[lanes]
        counts = self.machine.read_lanes(operands[1], "u32")[lanes] if len(operands) > 1 else self.machine.threads
        self.expected[lanes] = counts
        for cta in np.unique(self.machine.local_cta[lanes]):
            self._release(cta)

    def _release(self, cta: int) -> None:
        """Releases the threads of every CTA with a complete barrier."""
        machine = self.machine
        first = cta * machine.threads
        mine = slice(first, first + machine.threads)
        for barrier in np.unique(self.barrier[mine][self.barrier[mine] >= 0]):
            waiting = np.nonzero(self.barrier[mine] == barrier)[0] + first
            gone = self.pc[mine] >= self.end
            if len(waiting) < self.expected[waiting].max():
                if gone.any() and len(waiting) + gone.sum() == machine.threads:
                    machine.instruction = self.code[self.pc[waiting[0]] - 1]
                    machine.fail("barrier reached by part of the CTA, the other threads have exited", waiting[0])
                continue
            i = self.code[self.pc[waiting[0]] - 1]
            if i.has("red"):
                self._reduce(i, waiting)
            self.barrier[waiting] = -1
            machine.clocks.meet(np.unique(machine.warp[waiting]))
            machine.counters["barriers"] += 1

    def _reduce(self, i: Instruction, waiting: np.ndarray) -> None:
        mask = np.zeros(self.machine.lanes, bool)
        mask[waiting] = True
        brought = self.predicate[waiting]
        result = brought.sum() if i.has("popc") else brought.all() if i.has("and") else brought.any()
        if isinstance(i.operands[0], Vector):
            self.machine.fail("unknown result of a barrier")
        self.machine.write(i.operands[0], "u32" if i.has("popc") else "pred", np.asarray(result), mask)
