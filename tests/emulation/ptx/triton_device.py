"""A GPU for the Triton backend to launch on: every launch is compiled to PTX and executed by the simulator."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import triton
from triton.backends.nvidia.compiler import CUDABackend

from grank_kernels.backends.triton.compile_plan import Row, _row, compile_row
from grank_kernels.backends.triton.mips_topk_launches import Launch

from .launch import Coverage, Run, launch
from .memory import GLOBAL_BASE, POISON, Buffer, GlobalMemory
from .parser import parse


class TritonDevice:
    """Runs launches for a target ("sm_80", "sm_90"), one after the other, on memory that follows the tensors.

    A storage is copied in when a launch names it, and back when the launch is over, so that host code may work on tensors
    between launches. What `empty` returned may not be read by a kernel before something was written to it.
    """

    def __init__(self, target: str, programs: "Programs", seed: int | None = None) -> None:
        self.target, self.programs, self.seed = target, programs, seed
        self.memory = GlobalMemory()
        self.buffers: dict[int, Buffer] = {}  # by the address of a storage
        self.alive: list[torch.Tensor] = []  # so that no address is used twice
        self.fresh: set[int] = set()
        self.runs: list[Run] = []
        self.used: set[tuple[tuple, str]] = set()  # keys of programs
        self.torch = DeviceTorch(self)

    def empty(self, *shape: Any, **options: Any) -> torch.Tensor:
        """Like torch.empty."""
        tensor = torch.empty(*shape, **options)
        storage_of(tensor)[:] = POISON
        self.fresh.add(tensor.untyped_storage().data_ptr())
        self.alive.append(tensor)
        return tensor

    def run(self, work: Launch) -> None:
        program, arguments = self.prepare(work)
        run = program.run(work, arguments, self.memory, self.seed)
        program.coverage.add(run)
        self.runs.append(run)
        for value in work.arguments.values():
            if isinstance(value, torch.Tensor) and value.numel():
                storage_of(value)[:] = self._held(value, self.memory)

    def prepare(self, work: Launch) -> "tuple[Program, list[int | float]]":
        """The compiled kernel and its arguments, all tensors being on the device."""
        program = self._program(work)
        values = {name: work.arguments[name] for name in program.arguments}
        return program, [self._upload(name, x) if isinstance(x, torch.Tensor) else x for name, x in values.items()]

    def content(self, tensor: torch.Tensor, memory: GlobalMemory) -> torch.Tensor:
        """What a tensor is on the device, or in a copy of its memory."""
        held = torch.from_numpy(self._held(tensor, memory).copy()).view(tensor.dtype)
        return held.as_strided(tensor.size(), tensor.stride(), tensor.storage_offset())

    def _held(self, tensor: torch.Tensor, memory: GlobalMemory) -> np.ndarray:
        buffer = self.buffers[tensor.untyped_storage().data_ptr()]
        return memory.data[buffer.offset : buffer.end]

    def _program(self, work: Launch) -> "Program":
        row = _row(self.target, "", work)
        configuration = (self.target, work.kernel.__name__, str(row.signature), str(work.constants), work.warps, work.stages)
        key = (configuration, str(row.attributes))
        if key not in self.programs:
            self.programs[key] = Program.compiled(row)
        self.used.add(key)
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


class DeviceTorch(ModuleType):
    """torch, but `empty` allocates on the device: for launchers to use."""

    def __init__(self, device: TritonDevice) -> None:
        super().__init__("torch")
        self.empty = device.empty

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


class Program:
    """A kernel in one configuration, as Triton compiled it, and what of it was executed so far."""

    def __init__(self, ptx: str, shared_bytes: int, arguments: list[str]) -> None:
        self.ptx, self.shared_bytes, self.arguments = ptx, shared_bytes, arguments
        self.kernel = parse(ptx)
        self.coverage = Coverage(self.kernel)

    @classmethod
    def compiled(cls, row: Row) -> "Program":
        binary = compile_row(row)
        arguments = [name for name in row.kernel.arg_names if row.signature[name] != "constexpr"]
        return cls(binary.asm["ptx"], binary.metadata.shared, arguments)

    def run(self, work: Launch, arguments: list[int | float], memory: GlobalMemory, seed: int | None) -> Run:
        return launch(self.kernel, work.grid, (32 * work.warps,), arguments, memory, self.shared_bytes, seed)

    def changed(self, ptx: str) -> "Program":
        return Program(ptx, self.shared_bytes, self.arguments)


Programs = dict[tuple[tuple, str], Program]
"""By configuration (target, kernel, types, constants, warps, stages) and by which arguments 16 divides."""


@contextmanager
def without_assembler(cache: Path) -> Iterator[None]:
    """Triton stops at PTX: ptxas is not run. `cache` must be no cache of Triton's own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton.knobs.cache, "dir", str(cache))
        patch.setattr(CUDABackend, "make_cubin", lambda *_, **__: b"")
        yield


def storage_of(tensor: torch.Tensor) -> np.ndarray:
    """The bytes of the whole storage, in place."""
    return torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage()).numpy()
