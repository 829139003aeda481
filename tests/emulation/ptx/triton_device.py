"""A simulated GPU for the Triton backend: every launch is compiled to PTX and executed by the simulator."""

from collections.abc import Iterator
from typing import Any

import torch

from grank_kernels.backends.triton.compile_plan import specialise
from grank_kernels.backends.triton.mips_topk_launches import Launch

from .launch import Coverage, Run, launch
from .memory import GlobalMemory
from .parser import parse
from .tensors import TensorMemory
from .triton_compiler import Compiled, Compiler


class Program:
    """A compiled kernel in one configuration."""

    def __init__(self, compiled: Compiled) -> None:
        self.compiled = compiled
        self.kernel = parse(compiled.ptx)

    def run(self, work: Launch, arguments: list[Any], memory: GlobalMemory, seed: int | None) -> Run:
        return launch(self.kernel, work.grid, (32 * work.warps,), arguments, memory, self.compiled.shared_bytes, seed)

    def changed(self, ptx: str) -> "Program":
        return Program(Compiled(ptx, self.compiled.shared_bytes))


Key = tuple[tuple[Any, ...], str]
"""Configuration (target, kernel, types, constants, warps, stages), and which integers are 1 or divisible by 16."""


class Programs(dict[Key, Program]):
    """The programs compiled so far, and the compiler."""

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
        self.memory.download([x for x in leaves(tuple(work.arguments.values())) if isinstance(x, torch.Tensor)])

    def prepare(self, work: Launch) -> tuple[Key, Program, list[Any]]:
        """The compiled kernel and its arguments; copies all tensors to the device."""
        code = specialise(self.target, work)
        types = tuple(type_of(x) for x in leaves(tuple(work.arguments[name] for name in code.signature)))
        constants = tuple(str(work.arguments[name]) for name in work.kernel.fn.__annotations__)  # all are tl.constexpr
        configuration = (code.target, code.name, types, constants, code.warps, code.stages)
        key = (configuration, f"{code.constants} {code.attributes}")
        if key not in self.programs:
            self.programs[key] = Program(self.programs.compiler.compile(code))
        values = (work.arguments[name] for name in code.signature)
        passed = [
            (name, value)
            for name, kinds, values in zip(code.signature, code.signature.values(), values, strict=True)
            for kind, value in zip(
                leaves(kinds), leaves(values) if isinstance(kinds, tuple) else (values,), strict=True
            )
            if kind != "constexpr"
        ]
        return (
            key,
            self.programs[key],
            [self.memory.upload(name, x) if isinstance(x, torch.Tensor) else x for name, x in passed],
        )


def leaves(value: Any) -> Iterator[Any]:
    """The values in nested tuples."""
    if isinstance(value, tuple):
        for each in value:
            yield from leaves(each)
    else:
        yield value


def type_of(argument: Any) -> str:
    if isinstance(argument, torch.Tensor):
        return str(argument.dtype)
    return type(argument).__name__
