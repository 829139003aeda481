"""A GPU for the Triton backend to launch on: every launch is compiled to PTX and executed by the simulator."""

from typing import Any

import torch

from grank_kernels.backends.triton.mips_topk_launches import Launch

from .launch import Coverage, Run, launch
from .memory import GlobalMemory
from .parser import parse
from .tensors import TensorMemory
from .triton_compiler import Compiled, Compiler


class Program:
    """A kernel in one configuration, as Triton compiled it."""

    def __init__(self, compiled: Compiled) -> None:
        self.compiled = compiled
        self.kernel = parse(compiled.ptx)

    def run(self, work: Launch, arguments: list[Any], memory: GlobalMemory, seed: int | None) -> Run:
        return launch(self.kernel, work.grid, (32 * work.warps,), arguments, memory, self.compiled.shared_bytes, seed)

    def changed(self, ptx: str) -> "Program":
        return Program(Compiled(ptx, self.compiled.shared_bytes))


Key = tuple[tuple, tuple[str, ...]]
"""Configuration (target, kernel, types, constants, warps, stages), and which arguments 16 divides."""


class Programs(dict[Key, Program]):
    """Whatever was compiled, and the compiler."""

    def __init__(self) -> None:
        super().__init__()
        self.compiler = Compiler()


class TritonDevice:
    """Runs launches for a target ("sm_80", "sm_90"), one after the other."""

    def __init__(self, target: str, programs: Programs, seed: int | None = None) -> None:
        self.target, self.programs, self.seed = target, programs, seed
        self.memory = TensorMemory()
        self.runs: list[Run] = []
        self.coverage: dict[Key, Coverage] = {}

    def run(self, work: Launch) -> None:
        key, program, arguments = self.prepare(work)
        run = program.run(work, arguments, self.memory, self.seed)
        self.coverage.setdefault(key, Coverage(program.kernel)).add(run)
        self.runs.append(run)
        self.memory.download([value for value in work.arguments.values() if isinstance(value, torch.Tensor)])

    def prepare(self, work: Launch) -> tuple[Key, Program, list[Any]]:
        """The compiled kernel and its arguments, all tensors being on the device."""
        names = [each for each in work.kernel.arg_names if each not in work.constants]
        given = {each: work.arguments[each] for each in names if work.arguments[each] is not None}
        types = tuple((each, type_of(x)) for each, x in given.items())
        configuration = (self.target, work.kernel.fn.__name__, types, str(work.constants), work.warps, work.stages)
        key = (configuration, tuple(each for each, x in given.items() if isinstance(x, int) and x % 16 == 0))
        if key not in self.programs:
            self.programs[key] = Program(self.programs.compiler.compile(self.target, work))
        arguments = [self.memory.upload(each, x) if isinstance(x, torch.Tensor) else x for each, x in given.items()]
        return key, self.programs[key], arguments


def type_of(argument: torch.Tensor | int | float) -> str:
    if isinstance(argument, torch.Tensor):
        return str(argument.dtype)
    return "float" if isinstance(argument, float) else "int32" if -(2**31) <= argument < 2**31 else "int64"
