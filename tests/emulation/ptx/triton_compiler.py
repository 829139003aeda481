"""Compiles Triton kernels to PTX in a child process, because TRITON_INTERPRET is read once, at import."""

from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context

import pytest
import triton
from triton.backends.nvidia.compiler import CUDABackend

from grank_kernels.backends.triton.compile_plan import Specialisation

from .nvcc import CACHE


@dataclass(frozen=True)
class Compiled:
    ptx: str
    shared_bytes: int


class Compiler:
    """Compiles to PTX only, since ptxas takes longest; results are in a Triton cache under build/."""

    def __init__(self) -> None:
        self.process = ProcessPoolExecutor(1, get_context("spawn"))
        with pytest.MonkeyPatch.context() as patch:
            patch.delenv("TRITON_INTERPRET", raising=False)  # before the process starts
            self.process.submit(_set_up).result()

    def compile(self, code: Specialisation) -> Compiled:
        return self.process.submit(_compile, code).result()

    def close(self) -> None:
        self.process.shutdown()


def _set_up() -> None:
    triton.knobs.cache.dir = str(CACHE / "triton")  # not the default folder: these entries have no machine code
    CUDABackend.make_cubin = lambda *_, **__: b""


def _compile(code: Specialisation) -> Compiled:
    binary = code.compile()
    return Compiled(binary.asm["ptx"], binary.metadata.shared)
