"""Triton kernels to PTX, in a process of its own: at its import Triton decides whether to interpret or compile."""

from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from importlib import import_module
from multiprocessing import get_context

import pytest
import triton
from triton.backends.nvidia.compiler import CUDABackend

from grank_kernels.backends.triton.compile_plan import Row, compile_row

from .nvcc import CACHE


@dataclass(frozen=True)
class Compiled:
    ptx: str
    shared_bytes: int


class Compiler:
    """Stops at PTX: ptxas, the longer half, is not run. Triton keeps what it compiled under build/."""

    def __init__(self) -> None:
        self.process = ProcessPoolExecutor(1, get_context("spawn"))
        with pytest.MonkeyPatch.context() as patch:
            patch.delenv("TRITON_INTERPRET", raising=False)  # before the process starts
            self.process.submit(_set_up).result()

    def compile(self, row: Row) -> Compiled:
        function = row.kernel.fn
        absent = {name: None for name, value in row.launch.arguments.items() if value is None}
        row = replace(row, launch=replace(row.launch, kernel=None, arguments=absent))  # all that a compiler looks at
        return self.process.submit(_compile, function.__module__, function.__name__, row).result()

    def close(self) -> None:
        self.process.shutdown()


def _set_up() -> None:
    triton.knobs.cache.dir = str(CACHE / "triton")  # not Triton's own: there is no machine code in it
    CUDABackend.make_cubin = lambda *_, **__: b""


def _compile(module: str, name: str, row: Row) -> Compiled:
    kernel = getattr(import_module(module), name)
    binary = compile_row(replace(row, launch=replace(row.launch, kernel=kernel)))
    return Compiled(binary.asm["ptx"], binary.metadata.shared)
