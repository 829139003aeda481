"""A GPU for the Triton backend to launch on: every launch is compiled to PTX and executed by the simulator."""

from typing import Any

import numpy as np
import torch

from grank_kernels.backends.triton.compile_plan import _row, compile_row
from grank_kernels.backends.triton.mips_topk_launches import Launch

from .launch import Coverage, Run, launch
from .memory import GLOBAL_BASE, POISON, Buffer, GlobalMemory
from .parser import Kernel, parse


class TritonDevice:
    """Runs launches for a target ("sm_80", "sm_90"), one after the other, on memory that follows the tensors.

    A storage is copied in when a launch names it, and back when the launch is over, so that host code may work on tensors
    between launches. What `empty` returned may not be read by a kernel before something was written to it.
    """

    def __init__(self, target: str, programs: "dict[Any, Program]", seed: int | None = None) -> None:
        self.target, self.programs, self.seed = target, programs, seed
        self.memory = GlobalMemory()
        self.buffers: dict[int, Buffer] = {}  # by the address of a storage
        self.alive: list[torch.Tensor] = []  # so that no address is used twice
        self.fresh: set[int] = set()
        self.runs: list[Run] = []

    def empty(self, *shape: Any, **options: Any) -> torch.Tensor:
        """Like torch.empty."""
        tensor = torch.empty(*shape, **options)
        storage_of(tensor)[:] = POISON
        self.fresh.add(tensor.untyped_storage().data_ptr())
        self.alive.append(tensor)
        return tensor

    def run(self, work: Launch) -> None:
        program = self._program(work)
        named = {name: work.arguments[name] for name in program.arguments}
        tensors = [value for value in named.values() if isinstance(value, torch.Tensor) and value.numel()]
        arguments = [self._upload(name, x) if isinstance(x, torch.Tensor) else x for name, x in named.items()]
        run = launch(
            program.kernel, work.grid, (32 * work.warps,), arguments, self.memory, program.shared_bytes, self.seed
        )
        program.coverage.add(run)
        self.runs.append(run)
        for tensor in tensors:
            buffer = self.buffers[tensor.untyped_storage().data_ptr()]
            storage_of(tensor)[:] = self.memory.data[buffer.offset : buffer.end]

    def _program(self, work: Launch) -> "Program":
        row = _row(self.target, "", work)
        key = (self.target, work.kernel.__name__, str(row.signature), str(row.attributes), str(work.constants))
        key += (work.warps, work.stages)
        if key not in self.programs:
            self.programs[key] = Program(row)
        return self.programs[key]

    def _upload(self, name: str, tensor: torch.Tensor) -> int:
        """Its address on the device."""
        if not tensor.numel():
            return 0
        host, at = storage_of(tensor), tensor.untyped_storage().data_ptr()
        if at not in self.buffers:
            self.alive.append(tensor)
            self.memory.empty(f"{name}@{at:x}", host.shape, np.uint8)
            self.buffers[at] = self.memory.buffers[-1]
            self.memory.written[self.buffers[at].offset : self.buffers[at].end] = at not in self.fresh
        part = slice(self.buffers[at].offset, self.buffers[at].end)
        self.memory.written[part] |= self.memory.data[part] != host
        self.memory.data[part] = host
        return GLOBAL_BASE + part.start + tensor.storage_offset() * tensor.element_size()


class Program:
    """A kernel in one configuration, as Triton compiled it, and what of it was executed so far."""

    def __init__(self, row: Any) -> None:
        compiled = compile_row(row)
        self.ptx: str = compiled.asm["ptx"]
        self.kernel: Kernel = parse(self.ptx)
        self.shared_bytes: int = compiled.metadata.shared
        self.arguments = [name for name in row.kernel.arg_names if row.signature[name] != "constexpr"]
        self.coverage = Coverage(self.kernel)


def storage_of(tensor: torch.Tensor) -> np.ndarray:
    """The bytes of the whole storage, in place."""
    return torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage()).numpy()
