"""The Triton backend, for NVIDIA (sm_80 and later) and AMD (gfx942) GPUs.

With TRITON_INTERPRET=1 in the environment when this package is imported, the kernels run on CPU tensors in Triton's
interpreter: slow, for tests.
"""

import os
from importlib.util import find_spec

import torch

from grank_kernels.backends.problems import MipsTopkProblem
from grank_kernels.backends.triton.mips_topk_plan import INTERPRETER, Device, listed_rows
from grank_kernels.table.quantise import Coarse, certify_queries

_INSTALLED = find_spec("triton") is not None
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
_MULTIPLIES_BFLOAT16 = not INTERPRETED  # the interpreter multiplies the bit patterns
_MAX_ROWS = (1 << 32) - 1
_MAX_INT8_WIDTH = 1 << 17  # 127^2 d stays below 2^31


def unavailable() -> str | None:
    """Why no op of this backend can run on this machine; None if it can."""
    if not _INSTALLED:
        return "triton is not installed (pip install triton)"
    if not INTERPRETED and not torch.cuda.is_available():
        return "there is no GPU; with TRITON_INTERPRET=1 in the environment its kernels run on CPU tensors, slowly"
    return None


def mips_topk_unsupported(queries: torch.Tensor, items: torch.Tensor) -> str | None:
    """Why `mips_topk` cannot run on these tensors; None if it can."""
    if unavailable() is not None:
        return unavailable()
    if INTERPRETED and not queries.is_cpu:
        return f"queries are on {queries.device}; under TRITON_INTERPRET=1 they must be on the CPU"
    if not INTERPRETED:
        if not queries.is_cuda:
            return f"queries are on {queries.device}, not on a GPU"
        reason = _device_unsupported(queries.device)
        if reason is not None:
            return reason
        if items.device != queries.device and items.stride(1) != 1:
            return f"items in host memory have strides {items.stride()}; to be streamed their rows must be contiguous"
    if items.shape[0] > _MAX_ROWS:
        return f"items have {items.shape[0]} rows; one search takes at most {_MAX_ROWS}, split the table"
    if items.dtype == torch.int8 and items.shape[1] > _MAX_INT8_WIDTH:
        return f"int8 items have width {items.shape[1]}; int32 sums take at most {_MAX_INT8_WIDTH}"
    return None


def _device_unsupported(device: torch.device) -> str | None:
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip is not None:
        name = properties.gcnArchName.partition(":")[0]
        return None if name == "gfx942" else f"{device} is {name}; it takes gfx942"
    capability = (properties.major, properties.minor)
    return None if capability >= (8, 0) else f"{device} is sm_{capability[0]}{capability[1]}; it takes sm_80 or later"


_SHARED = {(8, 0): 166912, (8, 7): 166912, (9, 0): 232448, (10, 0): 232448, (10, 3): 232448}
"""Bytes of shared memory per program by compute capability; at least 101376 for all others (8.6, 8.9, 12.0)."""


def _device(device: torch.device) -> Device:
    if INTERPRETED:
        return INTERPRETER
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip is not None:
        return Device("gfx942", properties.multi_processor_count, 1 << 16)
    name = {9: "sm_90", 10: "sm_100"}.get(properties.major, "sm_80")  # matrix instructions: wgmma, tcgen05, mma.sync
    shared = _SHARED.get((properties.major, properties.minor), 101376)
    return Device(name, properties.multi_processor_count, shared)


def mips_topk(problem: MipsTopkProblem) -> tuple[torch.Tensor, torch.Tensor]:
    """The k best rows by (score, id): `values` (B, k) float32, `positions` (B, k) int64."""
    from grank_kernels.backends.triton.mips_topk_launches import Problem, search

    problem = _with_filters(problem)
    queries, items = problem.queries, problem.items
    (B, d), N = queries.shape, len(items)
    values, positions = _results(problem)
    if B == 0 or N == 0:
        return values.fill_(-torch.inf), positions.fill_(-1)
    if d == 0:
        problem = problem._replace(queries=queries.new_zeros(B, 1), items=items.new_zeros(N, 1))
    elif items.stride(1) != 1 and d > 1:
        problem = problem._replace(items=items.contiguous())
    search(Problem(*problem, _compute_dtype(problem)), _device(queries.device), values, positions)
    return values, positions


def mips_topk_certified_unsupported(queries: torch.Tensor, items: torch.Tensor) -> str | None:
    """Why `mips_topk_certified` cannot run on these tensors; None if it can."""
    if items.device != queries.device:
        return f"queries are on {queries.device} and items on {items.device}"
    if items.shape[1] > _MAX_INT8_WIDTH:
        return f"the int8 copy has width {items.shape[1]}; int32 sums take at most {_MAX_INT8_WIDTH}"
    return mips_topk_unsupported(queries, items)


def mips_topk_certified(problem: MipsTopkProblem, coarse: Coarse) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`mips_topk` of the rows by way of the int8 copy; also the number of rows rescored per query, (B,) int64."""
    from grank_kernels.backends.triton.mips_topk_launches import Problem, certified_search

    (B, d), N = problem.queries.shape, len(problem.items)
    device = _device(problem.queries.device)
    rescored = torch.full((B,), N, dtype=torch.int64, device=problem.queries.device)
    if B == 0 or d == 0 or max(device.small, 32 * problem.k) >= N:
        return *mips_topk(problem), rescored
    problem = _with_filters(problem)
    values, positions = _results(problem)
    numbers, query_scale, radius = certify_queries(problem.queries, coarse.basis)
    copy = problem._replace(queries=numbers, items=coarse.rows, row_scale=coarse.scale, k=listed_rows(problem.k))
    certified_search(
        Problem(*problem, _compute_dtype(problem)), Problem(*copy, torch.int8, query_scale, radius),
        coarse.error, device, values, positions, rescored,
    )  # fmt: skip
    return values, positions, rescored


def _with_filters(problem: MipsTopkProblem) -> MipsTopkProblem:
    """The problem with contiguous excluded ids."""
    if problem.exclude_offsets is None or problem.exclude_ids is None:
        return problem
    offsets, excluded = problem.exclude_offsets.contiguous(), problem.exclude_ids.contiguous()
    return problem._replace(exclude_offsets=offsets, exclude_ids=excluded)


def _results(problem: MipsTopkProblem) -> tuple[torch.Tensor, torch.Tensor]:
    """Uninitialised `values` and `positions`."""
    shape, device = (len(problem.queries), problem.k), problem.queries.device
    values = torch.empty(shape, dtype=torch.float32, device=device)
    return values, torch.empty(shape, dtype=torch.int64, device=device)


def _compute_dtype(problem: MipsTopkProblem) -> torch.dtype:
    """The dtype that products are computed in: that of the tensors, or float32 where they differ."""
    queries, items = problem.queries.dtype, problem.items.dtype
    if items == torch.int8:
        return torch.int8
    if queries != items or (items == torch.bfloat16 and not _MULTIPLIES_BFLOAT16):
        return torch.float32
    return items
