"""Triton kernels to PTX, in a process of its own: at its import Triton decides whether to interpret or compile."""

from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from importlib import import_module
from multiprocessing import get_context
from typing import Any

import pytest
import torch
import triton
from triton.backends.nvidia.compiler import CUDABackend

from grank_kernels.backends.triton.mips_topk_launches import Launch

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

    def compile(self, target: str, work: Launch) -> Compiled:
        """Only the types of tensors matter, and only those are sent."""
        function = work.kernel.fn
        arguments = {name: x.dtype if isinstance(x, torch.Tensor) else x for name, x in work.arguments.items()}
        work = replace(work, kernel=None, arguments=arguments)
        return self.process.submit(_compile, target, function.__module__, function.__name__, work).result()

    def close(self) -> None:
        self.process.shutdown()


def _set_up() -> None:
    triton.knobs.cache.dir = str(CACHE / "triton")  # not Triton's own: there is no machine code in it
    CUDABackend.make_cubin = lambda *_, **__: b""


def _compile(target: str, module: str, name: str, work: Launch) -> Compiled:
    from grank_kernels.backends.triton.compile_plan import compile_row, row_of

    def restored(x: Any) -> Any:
        return torch.empty(0, dtype=x) if isinstance(x, torch.dtype) else x

    arguments = {each: restored(x) for each, x in work.arguments.items()}
    work = replace(work, kernel=getattr(import_module(module), name), arguments=arguments)
    binary = compile_row(row_of(target, "", work))
    return Compiled(binary.asm["ptx"], binary.metadata.shared)
