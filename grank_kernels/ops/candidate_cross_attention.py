"""The torch ops `grank::candidate_cross_attention` and its gradient `grank::candidate_cross_attention_backward`."""

from typing import Any

import torch

from grank_kernels.backends import BACKENDS
from grank_kernels.backends.problems import CandidateCrossAttentionProblem
from grank_kernels.common.checks import check_offsets
from grank_kernels.ops.dispatch import is_plain
from grank_kernels.ops.transforms import TransformableOp, dispatch, refused, save_nothing


def attend(problem: CandidateCrossAttentionProblem, backend: str) -> tuple[torch.Tensor, torch.Tensor]:
    """`out` and `lse` of validated arguments, by torch's dispatcher where autograd, a mode or a transform needs it."""
    if is_plain(*(x for x in problem if isinstance(x, torch.Tensor))):
        return _run(*problem, backend)
    out, lse = dispatch(torch.ops.grank.candidate_cross_attention.default, _Attention, *problem, backend)
    return out, lse


_OPERANDS = (
    "Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, Tensor? seqused_k, float? softmax_scale, Tensor? bias_k, "
    "str activation, str backend"
)
torch.library.define(
    "grank::candidate_cross_attention",
    f"(Tensor q, Tensor k, Tensor? v, {_OPERANDS}) -> (Tensor out, Tensor lse)",
    tags=torch.Tag.pt2_compliant_tag,
)
torch.library.define(
    "grank::candidate_cross_attention_backward",
    f"(Tensor? grad_out, Tensor? grad_lse, Tensor q, Tensor k, Tensor? v, Tensor out, Tensor lse, {_OPERANDS}) -> "
    "(Tensor grad_q, Tensor grad_k, Tensor grad_v, Tensor grad_bias_k)",
    tags=torch.Tag.pt2_compliant_tag,
)


def _run(*operands: Any) -> tuple[torch.Tensor, torch.Tensor]:
    *fields, backend = operands
    problem = CandidateCrossAttentionProblem(*fields)
    if problem.cu_seqlens_q is not None:
        check_offsets("cu_seqlens_q", problem.cu_seqlens_q, len(problem.q))
    if problem.cu_seqlens_k is not None:
        check_offsets("cu_seqlens_k", problem.cu_seqlens_k, len(problem.k))
    if problem.seqused_k is not None and problem.seqused_k.is_cpu:
        used, L = problem.seqused_k, problem.k.shape[1]
        wrong = used[(used < 0) | (used > L)]
        if len(wrong):
            raise ValueError(f"seqused_k must lie in [0, L] = [0, {L}], got {int(wrong[0])}")
    out, lse = BACKENDS[backend].candidate_cross_attention(problem)
    return out, lse


def _run_backward(
    grad_out: torch.Tensor | None,
    grad_lse: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor | None,
    out: torch.Tensor,
    lse: torch.Tensor,
    *operands: Any,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    *fields, backend = operands
    problem = CandidateCrossAttentionProblem(q, k, v, *fields)
    if grad_lse is not None:  # lse is +inf where there is no weight, and 0 times infinity is NaN
        grad_lse = grad_lse.masked_fill(lse == torch.inf, 0.0)
    grads = BACKENDS[backend].candidate_cross_attention_backward(grad_out, grad_lse, problem, out, lse)
    grad_q, grad_k, grad_v, grad_bias = (q.new_empty(0) if x is None else x for x in grads)
    return grad_q, grad_k, grad_v, grad_bias


def _fake(*operands: Any) -> tuple[torch.Tensor, torch.Tensor]:
    *fields, _ = operands
    problem = CandidateCrossAttentionProblem(*fields)
    q = problem.q
    out_shape = (0,) if problem.v is None else q.shape
    lse_shape = q.shape[:-1] if problem.activation == "softmax" else (0,)
    return q.new_empty(out_shape), q.new_empty(lse_shape, dtype=torch.float32)


def _fake_backward(
    grad_out: torch.Tensor | None,
    grad_lse: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor | None,
    out: torch.Tensor,
    lse: torch.Tensor,
    *operands: Any,
) -> tuple[torch.Tensor, ...]:
    *fields, _ = operands
    bias_k = CandidateCrossAttentionProblem(q, k, v, *fields).bias_k
    return tuple(q.new_empty(0) if x is None else x.new_empty(x.shape) for x in (q, k, v, bias_k))


# ---- derivatives ----


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    q, k, v, cu_seqlens_q, cu_seqlens_k, seqused_k, ctx.softmax_scale, bias_k, ctx.activation, ctx.backend = inputs
    out, lse = output
    ctx.mark_non_differentiable(*([lse] if ctx.activation != "softmax" else []), *([out] if v is None else []))
    ctx.set_materialize_grads(False)  # of a result without a gradient: None, and its part of the work is left out
    ctx.save_for_backward(q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, seqused_k, bias_k)


def _backward(
    ctx: Any, grad_out: torch.Tensor | None, grad_lse: torch.Tensor | None
) -> tuple[torch.Tensor | None, ...]:
    if grad_out is None and grad_lse is None:
        return (None,) * 10
    q, k, v, *saved, bias_k = ctx.saved_tensors
    if v is None or grad_out is None:
        v = grad_out = None
    if ctx.activation != "softmax":
        grad_lse = None
    operands = (grad_out, grad_lse, q, k, v, *saved, ctx.softmax_scale, bias_k, ctx.activation, ctx.backend)
    op = torch.ops.grank.candidate_cross_attention_backward.default
    grad_q, grad_k, grad_v, grad_bias = dispatch(op, _AttentionGradient, *operands)
    grad_v, grad_bias = None if v is None else grad_v, None if bias_k is None else grad_bias
    return grad_q, grad_k, grad_v, None, None, None, None, grad_bias, None, None


_no_second_derivative = refused("candidate_cross_attention has no second derivative")
_no_tangent = refused(
    "candidate_cross_attention has no forward-mode derivative (jvp, jacfwd): reverse mode (grad, vjp, jacrev) works"
)


class _Attention(TransformableOp):
    """`grank::candidate_cross_attention` inside `torch.func` transforms."""

    op = torch.ops.grank.candidate_cross_attention.default
    setup_context = staticmethod(_setup_context)
    backward = staticmethod(_backward)
    jvp = staticmethod(_no_tangent)


class _AttentionGradient(TransformableOp):
    """`grank::candidate_cross_attention_backward` inside `torch.func` transforms."""

    op = torch.ops.grank.candidate_cross_attention_backward.default
    setup_context = staticmethod(save_nothing)
    backward = staticmethod(_no_second_derivative)
    jvp = staticmethod(_no_second_derivative)


torch.library.impl("grank::candidate_cross_attention", "default", _run)
torch.library.impl("grank::candidate_cross_attention_backward", "default", _run_backward)
torch.library.register_fake("grank::candidate_cross_attention", _fake)
torch.library.register_fake("grank::candidate_cross_attention_backward", _fake_backward)
torch.library.register_autograd("grank::candidate_cross_attention", _backward, setup_context=_setup_context)
torch.library.register_autograd("grank::candidate_cross_attention_backward", _no_second_derivative)
