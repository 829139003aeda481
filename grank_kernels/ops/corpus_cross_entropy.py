"""The torch ops `grank::corpus_cross_entropy` and its gradient `grank::corpus_cross_entropy_backward`."""

from typing import Any

import torch
from torch.nn import functional as F

from grank_kernels.backends import BACKENDS
from grank_kernels.backends.problems import CorpusCrossEntropyProblem
from grank_kernels.ops.dispatch import is_plain
from grank_kernels.ops.requests import check_exclude_windows
from grank_kernels.ops.transforms import TransformableOp, dispatch, refused, save_nothing


def corpus_loss(problem: CorpusCrossEntropyProblem, backend: str) -> torch.Tensor:
    """Losses (R,) of validated arguments, by torch's dispatcher where autograd, a mode or a transform needs it."""
    if is_plain(*(x for x in problem if isinstance(x, torch.Tensor))):
        return _forward(problem, backend, pool=False)[0]
    loss, _, _ = dispatch(torch.ops.grank.corpus_cross_entropy.default, _Loss, *problem, backend)
    return loss  # type: ignore[no-any-return]


_OPERANDS = (
    "Tensor users, Tensor items, Tensor targets, Tensor? exclude_offsets, Tensor? exclude_ids, "
    "Tensor? exclude_windows, Tensor? bias, float scale, str backend"
)
torch.library.define(
    "grank::corpus_cross_entropy",
    f"({_OPERANDS}) -> (Tensor loss, Tensor normaliser, Tensor user_slope)",
    tags=torch.Tag.pt2_compliant_tag,
)
torch.library.define(
    "grank::corpus_cross_entropy_backward",
    f"(Tensor grad_loss, Tensor loss, Tensor normaliser, {_OPERANDS}) -> (Tensor grad_items, Tensor grad_bias)",
    tags=torch.Tag.pt2_compliant_tag,
)


def _forward(
    problem: CorpusCrossEntropyProblem, backend: str, pool: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Loss, normaliser and, with `pool`, the derivative of the loss in users, (R, d) float32.

    With p the target's probability, r the sum of the others and D = log(r / p): loss = log(1 + exp(D)), which has all
    its digits for p near 1.
    """
    users, items, targets = problem.users, problem.items, problem.targets
    R, N = len(users), len(items)
    if targets.is_cpu and R > 0:  # on a GPU reading them would synchronise
        low, high = (int(x) for x in targets.aminmax())
        if low < -1 or high >= N:
            raise ValueError(f"targets must lie in [-1, {N}), -1 for none, got {low if low < -1 else high}")
    check_exclude_windows(problem.exclude_offsets, problem.exclude_ids, problem.exclude_windows, N)
    at_target, peak, mass, pooled = BACKENDS[backend].corpus_cross_entropy(problem, pool)
    at_target = at_target.masked_fill(at_target == torch.inf, torch.nan)  # as torch's log_softmax
    none = mass == 0
    distance = torch.where(none, -torch.inf - at_target, peak + mass.log() - at_target)
    loss = F.softplus(distance)
    # mass 0: no other item has a probability, but a loss that is NaN makes the gradient NaN
    peak, log_sum = peak.masked_fill(none, 0), torch.where(none, loss, mass.log() + F.softplus(-distance))
    absent = targets < 0
    slope = users.new_empty(0, dtype=torch.float32)
    if pooled is not None:
        weight = (-log_sum).exp()[:, None]
        target_rows = items[targets.clamp(min=0)].float() if N else torch.zeros_like(pooled)
        slope = problem.scale * (pooled * weight + torch.expm1(-loss)[:, None] * target_rows)
        slope = slope.masked_fill(absent[:, None], 0)
    return loss.masked_fill(absent, 0), torch.stack([peak, log_sum]), slope


def _run(*operands: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    *fields, backend = operands
    return _forward(CorpusCrossEntropyProblem(*fields), backend, pool=True)


def _run_backward(
    grad_loss: torch.Tensor, loss: torch.Tensor, normaliser: torch.Tensor, *operands: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    *fields, backend = operands
    problem = CorpusCrossEntropyProblem(*fields)
    grad_loss = grad_loss.masked_fill(problem.targets < 0, 0)
    grad_items, grad_bias = BACKENDS[backend].corpus_cross_entropy_backward(
        problem, grad_loss, grad_loss * torch.expm1(-loss), normaliser
    )
    return grad_items, grad_bias


def _fake(*operands: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    users, R = operands[0], operands[0].shape[0]
    return tuple(users.new_empty(shape, dtype=torch.float32) for shape in ((R,), (2, R), users.shape))


def _fake_backward(
    grad_loss: torch.Tensor, loss: torch.Tensor, normaliser: torch.Tensor, users: Any, items: torch.Tensor, *_: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    return items.new_empty(items.shape), items.new_empty(items.shape[:1], dtype=torch.float32)


# ---- derivatives ----


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    *tensors, ctx.scale, ctx.backend = inputs
    loss, normaliser, slope = output
    ctx.mark_non_differentiable(normaliser, slope)
    ctx.save_for_backward(loss, normaliser, slope, *tensors)


def _backward(ctx: Any, grad_loss: torch.Tensor, *_: Any) -> tuple[torch.Tensor | None, ...]:
    loss, normaliser, slope, *tensors = ctx.saved_tensors
    users, bias = tensors[0], tensors[-1]
    grad_users = grad_items = grad_bias = None
    if ctx.needs_input_grad[0]:
        grad_users = (grad_loss[:, None] * slope).to(users.dtype)
    if ctx.needs_input_grad[1] or (bias is not None and ctx.needs_input_grad[6]):
        op = torch.ops.grank.corpus_cross_entropy_backward.default
        operands = (grad_loss, loss, normaliser, *tensors, ctx.scale, ctx.backend)
        grad_items, grad_bias = dispatch(op, _LossGradient, *operands)
    return grad_users, grad_items, None, None, None, None, None if bias is None else grad_bias, None, None


_no_second_derivative = refused("corpus_cross_entropy has no second derivative")
_no_tangent = refused(
    "corpus_cross_entropy has no forward-mode derivative (jvp, jacfwd): reverse mode (grad, vjp, jacrev) works"
)


class _Loss(TransformableOp):
    """`grank::corpus_cross_entropy` inside `torch.func` transforms."""

    op = torch.ops.grank.corpus_cross_entropy.default
    setup_context = staticmethod(_setup_context)
    backward = staticmethod(_backward)
    jvp = staticmethod(_no_tangent)


class _LossGradient(TransformableOp):
    """`grank::corpus_cross_entropy_backward` inside `torch.func` transforms."""

    op = torch.ops.grank.corpus_cross_entropy_backward.default
    setup_context = staticmethod(save_nothing)
    backward = staticmethod(_no_second_derivative)
    jvp = staticmethod(_no_second_derivative)


torch.library.impl("grank::corpus_cross_entropy", "default", _run)
torch.library.impl("grank::corpus_cross_entropy_backward", "default", _run_backward)
torch.library.register_fake("grank::corpus_cross_entropy", _fake)
torch.library.register_fake("grank::corpus_cross_entropy_backward", _fake_backward)
torch.library.register_autograd("grank::corpus_cross_entropy", _backward, setup_context=_setup_context)
torch.library.register_autograd("grank::corpus_cross_entropy_backward", _no_second_derivative)
