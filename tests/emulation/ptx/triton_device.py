"""A GPU for the Triton backend to launch on: every launch is compiled to PTX and executed by the simulator."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import triton
from triton.backends.nvidia.compiler import CUDABackend

from grank_kernels.backends.triton.compile_plan import Row, _row, compile_row
from grank_kernels.backends.triton.mips_topk_launches import Launch

from .launch import Coverage, Run, launch
from .memory import GlobalMemory
from .parser import parse
from .tensors import TensorMemory


class TritonDevice:
    """Runs launches for a target ("sm_80", "sm_90"), one after the other."""

    def __init__(self, target: str, programs: "Programs", seed: int | None = None) -> None:
        self.target, self.programs, self.seed = target, programs, seed
        self.memory = TensorMemory()
        self.runs: list[Run] = []
        self.used: set[tuple[tuple, str]] = set()  # keys of programs

    def run(self, work: Launch) -> None:
        program, arguments = self.prepare(work)
        run = program.run(work, arguments, self.memory, self.seed)
        program.coverage.add(run)
        self.runs.append(run)
        self.memory.download([value for value in work.arguments.values() if isinstance(value, torch.Tensor)])

    def prepare(self, work: Launch) -> "tuple[Program, list[int | float]]":
        """The compiled kernel and its arguments, all tensors being on the device."""
        row = _row(self.target, "", work)
        configuration = (self.target, work.kernel.__name__, str(row.signature), str(work.constants), work.warps, work.stages)
        key = (configuration, str(row.attributes))
        if key not in self.programs:
            self.programs[key] = Program.compiled(row)
        self.used.add(key)
        program = self.programs[key]
        values = {name: work.arguments[name] for name in program.arguments}
        return program, [
            self.memory.upload(name, x) if isinstance(x, torch.Tensor) else x for name, x in values.items()
        ]


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
