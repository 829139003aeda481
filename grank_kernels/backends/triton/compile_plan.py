"""Ahead-of-time compilation of the kernels of representative searches; needs no GPU.

For reports and tests of the compiled code; searches do not use it. Imports Triton. Nothing is compiled under
TRITON_INTERPRET=1.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime import jit

from grank_kernels.backends.triton import INTERPRETED
from grank_kernels.backends.triton.mips_topk_launches import Launch, Problem, certified_launches, launches, options
from grank_kernels.backends.triton.mips_topk_plan import Device, listed_rows, make_certified_plans, make_plan
from grank_kernels.backends.triton.streaming import Chunk

DEVICES = {
    "sm_80": Device("sm_80", 108, 166912),
    "sm_90": Device("sm_90", 132, 232448),
    "sm_100": Device("sm_100", 148, 232448),
    "gfx942": Device("gfx942", 304, 65536),
}
"""A100, H100, B200, MI300X: target, multiprocessors, bytes of shared memory per program."""

TRITON_VERSIONS = "3.6 or 3.7"  # tried: 3.6.0 and 3.7.1


@dataclass(frozen=True)
class Specialisation:
    """A kernel, a target, and Triton's specialisation of the arguments of a launch.

    Attributes:
        target: a key of `DEVICES`.
        module: name of the kernel's module.
        name: name of the kernel in it.
        signature: Triton type by parameter, one type per field of a group; "constexpr" for compiled-in values.
        constants: the compiled-in values (constants, absent tensors, integers of value 1) by path: (parameter,) or
            (parameter, field).
        attributes: "divisible by 16" and the like, by path.
        warps: warps per program.
        stages: stages of the software pipeline.
    """

    target: str
    module: str
    name: str
    signature: dict[str, Any]
    constants: dict[tuple[int, ...], Any]
    attributes: dict[tuple[int, ...], list[list[Any]]]
    warps: int
    stages: int

    def compile(self) -> Any:
        """The compiled kernel; its `asm` holds ttgir, ptx and cubin, or amdgcn and hsaco.

        Raises:
            RuntimeError: under TRITON_INTERPRET=1.
        """
        if INTERPRETED:
            raise RuntimeError("kernels are not compiled under TRITON_INTERPRET=1; unset it")
        kernel = getattr(import_module(self.module), self.name)
        source = ASTSource(kernel, self.signature, self.constants, self.attributes)
        chosen = {"num_warps": self.warps, "num_stages": self.stages, **options(self.target.startswith("gfx"))}
        return triton.compile(source, target=_gpu_target(self.target), options=chosen)


def specialise(target: str, launch: Launch) -> Specialisation:
    """The specialisation that Triton compiles for `launch` on a target. Of tensors only the types are read.

    Raises:
        RuntimeError: this version of Triton specialises launches by other functions.
    """
    function = jit.JITFunction(launch.kernel.fn)  # launch.kernel may be wrapped for the interpreter
    backend = make_backend(_gpu_target(target))
    bind, pack = _internals(function)
    arguments, specialisation, _ = bind(function.signature, function.params, backend)(**launch.arguments)
    _, signature, constants, attributes = pack(backend, {}, arguments, specialisation, {})
    module, name = function.fn.__module__, function.fn.__name__
    return Specialisation(target, module, name, signature, constants, attributes, launch.warps, launch.stages)


def _internals(function: Any) -> tuple[Any, Any]:
    """Triton's functions that bind and specialise the arguments of a launch; there is no public interface for them."""
    bind, pack = getattr(jit, "create_function_from_signature", None), getattr(function, "_pack_args", None)
    if bind is None or pack is None:
        raise RuntimeError(f"triton must be {TRITON_VERSIONS} to compile without a GPU, got {triton.__version__}")
    return bind, pack


def _gpu_target(name: str) -> GPUTarget:
    return GPUTarget("hip", name, 64) if name.startswith("gfx") else GPUTarget("cuda", int(name[3:]), 32)


@dataclass(frozen=True)
class Row:
    """One kernel of the plan.

    Attributes:
        label: text that describes the search.
        launch: a launch with tensors on the meta device.
        code: the specialised kernel.
    """

    label: str
    launch: Launch
    code: Specialisation


SEARCHES = [
    # B, N, d, k, items, filters
    (1, 10_000_000, 128, 10, torch.float16, False),
    (16, 10_000_000, 128, 500, torch.float16, False),
    (256, 10_000_000, 128, 500, torch.float16, True),
    (256, 10_000_000, 64, 500, torch.bfloat16, False),
    (16, 10_000_000, 128, 10, torch.int8, True),
    (256, 10_000_000, 128, 500, torch.int8, False),
    (256, 10_000_000, 768, 500, torch.float16, False),
    (16, 10_000_000, 128, 500, torch.float32, False),
    (256, 10_000_000, 128, 500, torch.float32, False),
]
CERTIFIED = [(16, 10_000_000, 128, 500, torch.float16, False), (256, 10_000_000, 128, 500, torch.bfloat16, True)]


def compile_plan(targets: Sequence[str] = tuple(DEVICES)) -> Iterator[Row]:
    """Every kernel of representative searches, in each configuration, once per target."""
    for target in targets:
        seen = set()
        for search in [*((*shape, False) for shape in SEARCHES), *((*shape, True) for shape in CERTIFIED)]:
            B, _, d, k, dtype, filters, certified = search
            label = f"{str(dtype)[6:]}{' certified' * certified} d={d} B={B} k={k}" + " ids exclude allow" * filters
            for launch in _launches(DEVICES[target], *search):
                code = specialise(target, launch)
                key = (code.name, str(code.signature), str(code.constants), code.warps, code.stages)
                if key not in seen:
                    seen.add(key)
                    yield Row(label, launch, code)


def _launches(
    device: Device, B: int, N: int, d: int, k: int, dtype: torch.dtype, filters: bool, certified: bool
) -> Iterator[Launch]:
    def meta(*shape: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    excluded = 100 if filters else 0
    problem = Problem(
        meta(B, d, dtype=torch.float16 if dtype == torch.int8 else dtype),
        meta(N, d, dtype=dtype),
        meta(N, dtype=torch.float32) if dtype == torch.int8 else None,
        meta(N, dtype=torch.int64) if filters else None,
        k,
        meta(B + 1, dtype=torch.int64) if filters else None,
        meta(B * 100, dtype=torch.int64) if filters else None,
        meta(N, dtype=torch.bool) if filters else None,
        dtype,
    )
    values, positions = meta(B, k, dtype=torch.float32), meta(B, k, dtype=torch.int64)
    if certified:
        copy = replace(
            problem, queries=meta(B, d, dtype=torch.int8), items=meta(N, d, dtype=torch.int8), k=listed_rows(k),
            compute=torch.int8, query_scale=meta(B, dtype=torch.float32), query_radius=meta(B, dtype=torch.float32),
        )  # fmt: skip
        chunk = Chunk(0, copy.items, meta(N, dtype=torch.float32), meta(N, dtype=torch.float32))
        plans = make_certified_plans(device, B, N, d, k, dtype, excluded)
        return certified_launches(problem, copy, chunk, plans, device, values, positions)
    plan = make_plan(device, B, N, d, k, dtype, excluded)
    table = [Chunk(0, problem.items, problem.row_scale)]
    return launches(problem, table, plan, device, values, positions)
