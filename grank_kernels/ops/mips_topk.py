"""The search of one table, and the torch ops `grank::mips_topk` and `grank::mips_topk_certified`."""

from functools import partial
from typing import Any

import torch

from grank_kernels.backends import BACKENDS
from grank_kernels.backends.problems import MipsTopkProblem
from grank_kernels.common.checks import check_exclude
from grank_kernels.ops import mapped_search
from grank_kernels.ops.dispatch import is_plain, supports
from grank_kernels.ops.requests import SearchRequest
from grank_kernels.ops.transforms import TransformableOp, dispatch
from grank_kernels.table.quantise import Coarse


def search(request: SearchRequest) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Values and ids (B, k), and the number of rows that a certified search rescored (B,), else None.

    Of one query the results have no dimension B.
    """
    queries, version, k, offsets, excluded, allow, backend, progress, one, _ = request
    rows, row_scale, ids, coarse = version.operands()
    if ids is not None and ids.device != queries.device:  # rows in pinned host memory
        ids = ids.to(queries.device, non_blocking=True)
    problem = MipsTopkProblem(queries, rows, row_scale, ids, k, offsets, excluded, allow)
    plain = is_plain(*(x for x in (queries, rows, offsets, excluded, allow) if x is not None))
    rescored = None
    if coarse is not None and supports("mips_topk_certified", backend, queries, rows):
        certified = BACKENDS[backend].mips_topk_certified if plain else partial(_dispatched_certified, backend=backend)
        values, positions, rescored = certified(problem, coarse)
    else:
        op = BACKENDS[backend].mips_topk if plain else partial(_dispatched, backend=backend)
        if version.mapping is not None:
            values, positions = mapped_search.search(op, version.mapping, problem, progress)
            ids = None  # `positions` holds ids already
        else:
            values, positions = op(problem)
    indices = positions if ids is None else _ids_at(positions, ids)
    if one:
        return values[0], indices[0], None if rescored is None else rescored[0]
    return values, indices, rescored


def _ids_at(positions: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """`ids[positions]`, -1 where the position is -1."""
    if ids.shape[0] == 0:
        return positions
    return torch.where(positions >= 0, ids[positions.clamp(min=0)], -1)


# ---- the torch ops ----

_FILTERS = "Tensor? exclude_offsets, Tensor? exclude_ids, Tensor? allow"
torch.library.define(
    "grank::mips_topk",
    f"(Tensor queries, Tensor items, Tensor? row_scale, Tensor? ids, SymInt k, {_FILTERS}, str backend) -> "
    "(Tensor values, Tensor positions)",
    tags=torch.Tag.pt2_compliant_tag,
)
torch.library.define(
    "grank::mips_topk_certified",
    "(Tensor queries, Tensor items, Tensor coarse_rows, Tensor coarse_scale, Tensor coarse_error, Tensor? basis, "
    f"Tensor? ids, SymInt k, {_FILTERS}, str backend) -> (Tensor values, Tensor positions, Tensor rescored)",
    tags=torch.Tag.pt2_compliant_tag,
)


def _run(*operands: Any) -> tuple[torch.Tensor, torch.Tensor]:
    *fields, backend = operands
    problem = MipsTopkProblem(*fields)
    _check_excluded(problem)
    values, positions = BACKENDS[backend].mips_topk(problem)
    return values, positions


def _run_certified(
    queries: torch.Tensor,
    items: torch.Tensor,
    coarse_rows: torch.Tensor,
    coarse_scale: torch.Tensor,
    coarse_error: torch.Tensor,
    basis: torch.Tensor | None,
    *operands: Any,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    *fields, backend = operands
    problem = MipsTopkProblem(queries, items, None, *fields)
    _check_excluded(problem)
    values, positions, rescored = BACKENDS[backend].mips_topk_certified(
        problem, Coarse(coarse_rows, coarse_scale, coarse_error, basis)
    )
    return values, positions, rescored


def _check_excluded(problem: MipsTopkProblem) -> None:
    """For callers that no request has checked: compiled graphs, transforms."""
    if problem.exclude_offsets is not None and problem.exclude_ids is not None:
        limit = None if problem.ids is not None else len(problem.items)
        check_exclude(problem.exclude_offsets, problem.exclude_ids, limit)


def _fake(
    queries: torch.Tensor, items: torch.Tensor, row_scale: Any, ids: Any, k: int, *_: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    shape = (queries.shape[0], k)
    return queries.new_empty(shape, dtype=torch.float32), queries.new_empty(shape, dtype=torch.int64)


def _fake_certified(
    queries: torch.Tensor, items: torch.Tensor, rows: Any, scale: Any, error: Any, basis: Any, ids: Any, k: int, *_: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return *_fake(queries, items, None, ids, k), queries.new_empty(queries.shape[:1], dtype=torch.int64)


# ---- derivatives ----


def _save(ctx: Any, *tensors: torch.Tensor | None) -> None:
    ctx.save_for_backward(*tensors)
    ctx.save_for_forward(*tensors)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    queries, items, row_scale = inputs[:3]
    _, positions = output
    ctx.mark_non_differentiable(positions)
    _save(ctx, queries, items, row_scale, positions)


def _setup_context_certified(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    queries, items = inputs[:2]
    _, positions, rescored = output
    ctx.mark_non_differentiable(positions, rescored)
    _save(ctx, queries, items, None, positions)


def _rows_at(
    rows: torch.Tensor, row_scale: torch.Tensor | None, positions: torch.Tensor, device: torch.device
) -> torch.Tensor:
    """(B, k, d) float32: the rows at `positions`, wherever they are; zeros where the position is -1."""
    if len(rows) == 0:
        return torch.zeros((*positions.shape, rows.shape[1]), device=device)
    at = positions.clamp(min=0).to(rows.device)
    picked = rows[at].float() if row_scale is None else rows[at] * row_scale[at][..., None]
    return picked.to(device).masked_fill((positions < 0)[..., None], 0)


def _backward(ctx: Any, grad_values: torch.Tensor, *_: Any) -> tuple[torch.Tensor | None, ...]:
    """The gradient of values[b, j] = <queries[b], items[positions[b, j]]>; deterministic, no (B, N) matrix."""
    queries, items, row_scale, positions = ctx.saved_tensors
    found, weights = (positions >= 0)[..., None], grad_values[..., None]
    grad_queries = grad_items = None
    if ctx.needs_input_grad[0]:
        picked = _rows_at(items, row_scale, positions, queries.device)
        grad_queries = (weights * picked).masked_fill(~found, 0).sum(1).to(queries.dtype)
    if ctx.needs_input_grad[1]:
        by_place = (weights * queries.float()[:, None]).masked_fill(~found, 0).flatten(0, 1)
        grad_items = torch.ops.aten.embedding_dense_backward(
            by_place, positions.clamp(min=0).flatten(), items.shape[0], -1, False
        )
        grad_items = grad_items.to(items.device, items.dtype)
    return grad_queries, grad_items, *[None] * (len(ctx.needs_input_grad) - 2)


def _tangent(
    ctx: Any, queries_tangent: torch.Tensor | None, items_tangent: torch.Tensor | None, *_: Any
) -> torch.Tensor:
    """The directional derivative of `values`, (B, k) float32; 0 where nothing was found."""
    queries, items, row_scale, positions = ctx.saved_tensors
    tangent = torch.zeros(positions.shape, device=queries.device)
    if queries_tangent is not None:
        picked = _rows_at(items, row_scale, positions, queries.device)
        tangent = tangent + torch.einsum("bd,bkd->bk", queries_tangent.float(), picked)
    if items_tangent is not None:
        moved = _rows_at(items_tangent, None, positions, queries.device)
        tangent = tangent + torch.einsum("bd,bkd->bk", queries.float(), moved)
    return tangent.masked_fill(positions < 0, 0)


class _Search(TransformableOp):
    """`grank::mips_topk` inside `torch.func` transforms and forward-mode differentiation."""

    op = torch.ops.grank.mips_topk.default
    setup_context = staticmethod(_setup_context)
    backward = staticmethod(_backward)

    @staticmethod
    def jvp(ctx: Any, *tangents: torch.Tensor | None) -> tuple[torch.Tensor, None]:
        """Tangents of values and positions."""
        return _tangent(ctx, *tangents), None


class _CertifiedSearch(TransformableOp):
    """`grank::mips_topk_certified` inside `torch.func` transforms and forward-mode differentiation."""

    op = torch.ops.grank.mips_topk_certified.default
    setup_context = staticmethod(_setup_context_certified)
    backward = staticmethod(_backward)

    @staticmethod
    def jvp(ctx: Any, *tangents: torch.Tensor | None) -> tuple[torch.Tensor, None, None]:
        """Tangents of values, positions and rescored."""
        return _tangent(ctx, *tangents), None, None


torch.library.impl("grank::mips_topk", "default", _run)
torch.library.register_fake("grank::mips_topk", _fake)
torch.library.register_autograd("grank::mips_topk", _backward, setup_context=_setup_context)
torch.library.impl("grank::mips_topk_certified", "default", _run_certified)
torch.library.register_fake("grank::mips_topk_certified", _fake_certified)
torch.library.register_autograd("grank::mips_topk_certified", _backward, setup_context=_setup_context_certified)


def _dispatched(problem: MipsTopkProblem, backend: str) -> tuple[torch.Tensor, torch.Tensor]:
    """`mips_topk` of a problem through torch's dispatcher."""
    values, positions = dispatch(torch.ops.grank.mips_topk.default, _Search, *problem, backend)
    return values, positions


def _dispatched_certified(
    problem: MipsTopkProblem, coarse: Coarse, backend: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`mips_topk_certified` of a problem through torch's dispatcher."""
    queries, items, _, *rest = problem
    values, positions, rescored = dispatch(
        torch.ops.grank.mips_topk_certified.default, _CertifiedSearch, queries, items, *coarse, *rest, backend
    )
    return values, positions, rescored
