"""What can be launched, compiled ahead of time for GPUs that are not there: for reports and tests of the compiled code.

Imports Triton. Nothing is compiled where kernels run in its interpreter (TRITON_INTERPRET).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

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
"""A100, H100, B200, MI300X: multiprocessors and bytes of shared memory a program can have."""

_POINTERS = {
    torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.int8: "*i8", torch.uint8: "*u8",
    torch.int32: "*i32", torch.int64: "*i64",
}  # fmt: skip


@dataclass(frozen=True)
class Row:
    """One kernel in one configuration for one target.

    Attributes:
        target: a key of `DEVICES`.
        label: the search it belongs to.
        launch: kernel, constants, warps, stages, and arguments with the values the signature was derived from.
        signature: Triton type of every parameter, "constexpr" for constants and absent arguments.
        attributes: parameters that 16 divides (addresses, strides), in the form `ASTSource` takes.
    """

    target: str
    label: str
    launch: Launch
    signature: dict[str, str]
    attributes: dict[tuple[int, ...], list[list[Any]]]

    @property
    def kernel(self) -> Any:
        """The kernel's function."""
        return self.launch.kernel


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
    """Every kernel of representative searches, in each configuration, once a target."""
    for target in targets:
        seen = set()
        for search in [*((*shape, False) for shape in SEARCHES), *((*shape, True) for shape in CERTIFIED)]:
            B, _, d, k, dtype, filters, certified = search
            label = f"{str(dtype)[6:]}{' certified' * certified} d={d} B={B} k={k}" + " ids exclude allow" * filters
            for launch in _launches(DEVICES[target], *search):
                row = row_of(target, label, launch)
                key = (launch.kernel.__name__, str(row.signature), str(launch.constants), launch.warps, launch.stages)
                if key not in seen:
                    seen.add(key)
                    yield row


def compile_row(row: Row) -> Any:
    """Compiles a row; the result's `asm` holds ttgir, ptx, cubin, or amdgcn and hsaco."""
    launch, names = row.launch, row.kernel.arg_names
    constants = {**launch.constants, **{n: None for n, v in launch.arguments.items() if v is None}}
    source = ASTSource(
        fn=row.kernel,
        signature={name: row.signature[name] for name in names},
        constexprs={(names.index(n),): v for n, v in constants.items()},
        attrs=row.attributes,
    )
    amd = row.target.startswith("gfx")
    target = GPUTarget("hip", row.target, 64) if amd else GPUTarget("cuda", int(row.target[3:]), 32)
    chosen = {"num_warps": launch.warps, "num_stages": launch.stages, **options(amd)}
    return triton.compile(source, target=target, options=chosen)


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


def row_of(target: str, label: str, launch: Launch) -> Row:
    """What a launch compiles for a target; the label says of which search it is."""
    if INTERPRETED:
        raise RuntimeError("kernels are not compiled under TRITON_INTERPRET=1; unset it")
    names = launch.kernel.arg_names
    signature: dict[str, str] = {}
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}
    for name in names:
        value = launch.constants[name] if name in launch.constants else launch.arguments[name]
        if name in launch.constants or value is None:
            signature[name] = "constexpr"
        elif isinstance(value, torch.Tensor):
            signature[name] = _POINTERS[value.dtype]
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
        divisible = isinstance(value, torch.Tensor) or (isinstance(value, int) and value % 16 == 0)
        if signature[name] != "constexpr" and divisible:
            attributes[(names.index(name),)] = [["tt.divisibility", 16]]
    return Row(target, label, launch, signature, attributes)
