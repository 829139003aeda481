"""The search of one table, and the torch ops `grank::mips_topk` and `grank::mips_topk_certified`."""

from collections.abc import Callable
from typing import Any

import torch

from grank_kernels.backends import BACKENDS
from grank_kernels.backends.problems import MipsTopkProblem
from grank_kernels.common.arrays import Array
from grank_kernels.common.checks import FLOATS, check_device, check_k, check_tensor, exclusions, shape_of
from grank_kernels.ops import mapped_search
from grank_kernels.ops.dispatch import choose, is_plain, supports
from grank_kernels.ops.operands import version_of
from grank_kernels.table.item_table import ItemTable
from grank_kernels.table.quantise import Coarse

Exclude = Array | tuple[Array, Array]
Progress = Callable[[int, int], object]


def search_table(
    queries: torch.Tensor,
    items: "Array | ItemTable",
    k: int,
    exclude: Exclude | None,
    allow: torch.Tensor | None,
    backend: str | None,
    progress: Progress | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Checks the arguments and searches: values, indices and, of a certified search, the rows it rescored."""
    check_tensor("queries", queries, FLOATS, (1, 2))
    one = queries.dim() == 1
    queries_2d = queries[None] if one else queries
    version = version_of(items)
    rows, row_scale, ids, coarse = version.operands()
    (B, d), width = queries_2d.shape, rows.shape[1]
    if d != width:
        raise ValueError(
            f"queries and items differ in width: queries are {shape_of(queries)}, items {shape_of(rows)}; "
            f"both take d = {width} as the last dimension"
        )
    if rows.device != queries.device and not _streams(queries, rows):
        raise ValueError(
            f"queries are on {queries.device} and items on {rows.device}; both must be on one device, as after "
            f"queries.to({str(rows.device)!r}), or the queries on a GPU and the items in pinned host memory"
        )
    k = check_k(k)
    offsets, excluded = None, None
    if exclude is not None:
        offsets, excluded = exclusions(exclude, B, one, queries.device)
    if allow is not None:
        _check_allow(allow, B, version.live, queries.device)
    if version.alive is not None:
        allow = version.alive if allow is None else _by_position(allow, version.alive)
    if ids is not None and ids.device != queries.device:
        ids = ids.to(queries.device, non_blocking=True)
    name = choose("mips_topk", backend, queries_2d, rows)
    problem = MipsTopkProblem(queries_2d, rows, row_scale, ids, k, offsets, excluded, allow)
    plain = is_plain(queries_2d, rows)
    results: tuple[torch.Tensor, ...]
    if coarse is not None and supports("mips_topk_certified", name, queries_2d, rows):
        if plain:
            results = BACKENDS[name].mips_topk_certified(problem, coarse)
        else:
            results = torch.ops.grank.mips_topk_certified.default(queries_2d, rows, *coarse, *problem[3:], name)
    else:
        op = BACKENDS[name].mips_topk if plain else lambda p: torch.ops.grank.mips_topk.default(*p, name)
        if version.mapping is None:
            results = op(problem)
        else:
            results = mapped_search.search(op, version.mapping, problem, progress)
            ids = None  # the result holds them
    values, positions, *more = results
    indices = positions if ids is None else _external(positions, ids)
    rescored = more[0] if more else None
    if one:
        return values[0], indices[0], None if rescored is None else rescored[0]
    return values, indices, rescored


def _streams(queries: torch.Tensor, rows: torch.Tensor) -> bool:
    """Whether rows in host memory can be copied to the queries' GPU as they are searched."""
    return queries.is_cuda and rows.is_cpu and rows.is_pinned()


def _check_allow(allow: Any, B: int, N: int, device: torch.device) -> None:
    check_tensor("allow", allow, (torch.bool,), (1, 2))
    if tuple(allow.shape) not in ((N,), (B, N)):
        takes = f"for {B} queries and {N} items it takes ({N},) or ({B}, {N})"
        raise ValueError(f"allow has shape {shape_of(allow)}; {takes}")
    check_device("allow", allow, "queries", device)


def _by_position(allow: torch.Tensor, alive: torch.Tensor) -> torch.Tensor:
    """`allow`, which has an entry a row, with an entry a position."""
    spread = allow.new_zeros((*allow.shape[:-1], len(alive)))
    spread[..., alive] = allow
    return spread


def _external(positions: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """The ids of the rows at `positions`, -1 where there is none."""
    if ids.shape[0] == 0:
        return positions
    return torch.where(positions >= 0, ids[positions.clamp(min=0)], -1)


# ---- the torch ops ----

torch.library.define(
    "grank::mips_topk",
    "(Tensor queries, Tensor items, Tensor? row_scale, Tensor? ids, SymInt k, Tensor? exclude_offsets, "
    "Tensor? exclude_ids, Tensor? allow, str backend) -> (Tensor values, Tensor positions)",
    tags=torch.Tag.pt2_compliant_tag,
)


@torch.library.impl("grank::mips_topk", "default")
def _run(*operands: Any) -> tuple[torch.Tensor, torch.Tensor]:
    *fields, backend = operands
    values, positions = BACKENDS[backend].mips_topk(MipsTopkProblem(*fields))
    return values, positions


torch.library.define(
    "grank::mips_topk_certified",
    "(Tensor queries, Tensor items, Tensor coarse_rows, Tensor coarse_scale, Tensor coarse_error, Tensor? basis, "
    "Tensor? ids, SymInt k, Tensor? exclude_offsets, Tensor? exclude_ids, Tensor? allow, str backend) -> "
    "(Tensor values, Tensor positions, Tensor rescored)",
    tags=torch.Tag.pt2_compliant_tag,
)


@torch.library.impl("grank::mips_topk_certified", "default")
def _run_certified(
    queries: torch.Tensor, items: torch.Tensor, *operands: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    rows, scale, error, basis, *fields, backend = operands
    values, positions, rescored = BACKENDS[backend].mips_topk_certified(
        MipsTopkProblem(queries, items, None, *fields), Coarse(rows, scale, error, basis)
    )
    return values, positions, rescored


def _fake(queries: torch.Tensor, items: torch.Tensor, row_scale: Any, ids: Any, k: int, *_: Any) -> Any:
    shape = (queries.shape[0], k)
    return queries.new_empty(shape, dtype=torch.float32), queries.new_empty(shape, dtype=torch.int64)


def _fake_certified(queries: torch.Tensor, *operands: Any) -> Any:
    values, positions = _fake(queries, *operands[:2], None, operands[6])
    return values, positions, queries.new_empty(queries.shape[:1], dtype=torch.int64)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    queries, items, row_scale = inputs[:3]
    _, positions = output
    ctx.mark_non_differentiable(positions)
    ctx.save_for_backward(queries, items, row_scale, positions)


def _setup_context_certified(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    _, positions, rescored = output
    ctx.mark_non_differentiable(positions, rescored)
    ctx.save_for_backward(*inputs[:2], None, positions)


def _backward(ctx: Any, grad_values: torch.Tensor, *_: Any) -> tuple[torch.Tensor | None, ...]:
    """The gradient of values[b, j] = <queries[b], items[positions[b, j]]>; deterministic, no (B, N) matrix."""
    queries, items, row_scale, positions = ctx.saved_tensors
    (B, k), (N, d) = positions.shape, items.shape
    found = (positions >= 0)[..., None]
    rows = positions.clamp(min=0)
    weights = grad_values[..., None]
    grad_queries = grad_items = None
    if ctx.needs_input_grad[0]:
        if N == 0:
            grad_queries = torch.zeros_like(queries)
        else:
            there = rows.to(items.device)  # which may be the host
            picked = items[there].float() if row_scale is None else items[there] * row_scale[there][..., None]
            picked = picked.to(queries.device)
            grad_queries = (weights * picked).masked_fill(~found, 0).sum(1).to(queries.dtype)
    if ctx.needs_input_grad[1]:
        by_place = (weights * queries.float()[:, None]).masked_fill(~found, 0).reshape(B * k, d)
        grad_items = torch.ops.aten.embedding_dense_backward(by_place, rows.reshape(-1), N, -1, False)
        grad_items = grad_items.to(items.device, items.dtype)
    return grad_queries, grad_items, *[None] * (len(ctx.needs_input_grad) - 2)


torch.library.register_fake("grank::mips_topk", _fake)
torch.library.register_autograd("grank::mips_topk", _backward, setup_context=_setup_context)
torch.library.register_fake("grank::mips_topk_certified", _fake_certified)
torch.library.register_autograd("grank::mips_topk_certified", _backward, setup_context=_setup_context_certified)
