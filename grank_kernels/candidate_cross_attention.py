"""`candidate_cross_attention`: the public function, its checks, the choice of a backend, and the torch ops.

`grank::candidate_cross_attention` and `grank::candidate_cross_attention_backward`, which is its gradient.
"""

from typing import Any

import torch

from grank_kernels.backends import BACKENDS
from grank_kernels.backends.problems import CandidateCrossAttentionProblem
from grank_kernels.common.checks import (
    FLOATS,
    INTEGERS,
    check_choice,
    check_device,
    check_number,
    check_offsets,
    check_operand,
    check_tensor,
)
from grank_kernels.ops.dispatch import choose, is_plain

ACTIVATIONS = ("softmax", "silu")


def candidate_cross_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    cu_seqlens_q: torch.Tensor | None = None,
    cu_seqlens_k: torch.Tensor | None = None,
    seqused_k: torch.Tensor | None = None,
    softmax_scale: float | None = None,
    bias_k: torch.Tensor | None = None,
    activation: str = "softmax",
    return_lse: bool = False,
    backend: str | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Every candidate attends to its own user's history and to nothing else: attention without a mask, and no padding.

    By user and head, with the user's C candidates q and the L rows of history k and v:

        s   = softmax_scale * (q @ k.T) + bias_k
        out = softmax(s) @ v                      activation "softmax"
        out = silu(s) @ v / L                     activation "silu", as in HSTU

    No (C, L) matrix is made but by the reference backend. Sums are float32. Differentiable in q, k, v and bias_k; the
    gradient is deterministic, and a second one is not offered.

    Args:
        q: the candidates' queries, float32, float16 or bfloat16: (B, C, H, D), C for every user; or (C, H, D), the same
            for all users; or with `cu_seqlens_q` (total_q, H, D), as many for each user as it says.
        k: (B, L, H, D), or with `cu_seqlens_k` (total_k, H, D); q's dtype.
        v: k's shape and dtype.
        cu_seqlens_q: (B + 1,) int64 or int32, not decreasing, in [0, total_q]: where each user's rows of q begin, and
            the last user's end.
        cu_seqlens_k: the same for k and v.
        seqused_k: (B,) int64 or int32 in [0, L], only without `cu_seqlens_k`: how many of a user's rows count: the
            first ones. None: all.
        softmax_scale: None for `D ** -0.5`.
        bias_k: k's shape without D, any float dtype that q may have, or None: added to every logit of a key. Under
            "softmax" a key with -inf takes no part.
        activation: "softmax" or "silu".
        return_lse: whether to return `lse` too, for "softmax" only. It takes no part in gradients.
        backend: None for the first that can run, or a name out of `show_config()`: a named backend runs or raises.

    Returns:
        `out`, of q's dtype, (B, C, H, D) or (total_q, H, D); with `return_lse` the pair `(out, lse)`, lse float32, of
        out's shape without D: the logarithm of the sum of `exp(s)` over the keys. A user without history has
        `out = 0` and `lse = +inf`, and so have rows of q that belong to no user. What lies in padding or in another
        user's rows, NaN included, never shows, neither in `out` nor in gradients.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: a dtype, shape, device, offset, length or backend that does not fit; the message names the argument.
            On a GPU offsets and lengths are not looked at, since that would cost a synchronisation; they are clamped
            to the rows there are.

    Source: GRank (arXiv 2510.15299), the Ranker; HSTU (arXiv 2402.17152) for "silu".
    """
    check_tensor("k", k, FLOATS, (4,) if cu_seqlens_k is None else (3,))
    dtypes, (H, D) = (k.dtype,), k.shape[-2:]
    check_operand("v", v, dtypes, "k's shape", tuple(k.shape))
    if cu_seqlens_k is None:
        B = k.shape[0]
    else:
        check_tensor("cu_seqlens_k", cu_seqlens_k, INTEGERS, (1,))
        B = max(cu_seqlens_k.shape[0] - 1, 0)
        check_operand("cu_seqlens_k", cu_seqlens_k, INTEGERS, "(B + 1,)", (B + 1,))
    if cu_seqlens_q is not None:
        check_operand("cu_seqlens_q", cu_seqlens_q, INTEGERS, "(B + 1,)", (B + 1,))
        check_tensor("q", q, dtypes, (3,))
        check_operand("q", q, dtypes, "(total_q, H, D)", (q.shape[0], H, D))
    else:
        check_tensor("q", q, dtypes, (3, 4))
        if q.dim() == 3:
            q = q.expand(B, *q.shape)
        check_operand("q", q, dtypes, "(B, C, H, D)", (B, q.shape[1], H, D))
    if seqused_k is not None:
        check_operand("seqused_k", seqused_k, INTEGERS, "(B,)", (B,))
        if cu_seqlens_k is not None:
            raise ValueError("seqused_k goes with k (B, L, H, D); with cu_seqlens_k it takes None")
    if bias_k is not None:
        check_operand("bias_k", bias_k, FLOATS, "k's shape without D", tuple(k.shape[:-1]))
        bias_k = bias_k.float()
    if softmax_scale is not None:
        check_number("softmax_scale", softmax_scale)
    check_choice("activation", activation, ACTIVATIONS)
    if return_lse and activation != "softmax":
        raise ValueError(f"return_lse goes with activation 'softmax', got {activation!r}, which has no lse")
    others = {
        "k": k, "v": v, "cu_seqlens_q": cu_seqlens_q, "cu_seqlens_k": cu_seqlens_k, "seqused_k": seqused_k,
        "bias_k": bias_k,
    }  # fmt: skip
    for name, x in others.items():
        check_device(name, x, "q", q.device)
    cu_seqlens_q, cu_seqlens_k, seqused_k = (
        None if x is None else x.long() for x in (cu_seqlens_q, cu_seqlens_k, seqused_k)
    )
    chosen = choose("candidate_cross_attention", backend, q, k, v)
    problem = CandidateCrossAttentionProblem(
        q, k, v, cu_seqlens_q, cu_seqlens_k, seqused_k, softmax_scale, bias_k, activation
    )
    plain = is_plain(*(x for x in problem if isinstance(x, torch.Tensor)))
    out, lse = (_run if plain else torch.ops.grank.candidate_cross_attention.default)(*problem, chosen)
    return (out, lse) if return_lse else out


# ---- the torch ops ----

_OPERANDS = (
    "Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, Tensor? seqused_k, float? softmax_scale, Tensor? bias_k, "
    "str activation, str backend"
)
torch.library.define(
    "grank::candidate_cross_attention",
    f"(Tensor q, Tensor k, Tensor v, {_OPERANDS}) -> (Tensor out, Tensor lse)",
    tags=torch.Tag.pt2_compliant_tag,
)
torch.library.define(
    "grank::candidate_cross_attention_backward",
    f"(Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, {_OPERANDS}) -> "
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
            raise ValueError(f"seqused_k: {int(wrong[0])} is out of range; it takes 0 to L = {L}")
    out, lse = BACKENDS[backend].candidate_cross_attention(problem)
    return out, lse


def _run_backward(
    grad_out: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor, *operands: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    lse, *fields, backend = operands
    problem = CandidateCrossAttentionProblem(q, k, v, *fields)
    grad_q, grad_k, grad_v, grad_bias = BACKENDS[backend].candidate_cross_attention_backward(
        grad_out, problem, out, lse
    )
    return grad_q, grad_k, grad_v, q.new_empty(0) if grad_bias is None else grad_bias


def _fake(q: torch.Tensor, *operands: Any) -> tuple[torch.Tensor, torch.Tensor]:
    activation = operands[-2]
    lse_shape = q.shape[:-1] if activation == "softmax" else (0,)
    return q.new_empty(q.shape), q.new_empty(lse_shape, dtype=torch.float32)


def _fake_backward(
    grad_out: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *operands: Any
) -> tuple[torch.Tensor, ...]:
    bias_k = operands[-3]
    grad_bias = q.new_empty(0) if bias_k is None else bias_k.new_empty(bias_k.shape)
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), grad_bias


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    q, k, v, cu_seqlens_q, cu_seqlens_k, seqused_k, ctx.softmax_scale, bias_k, ctx.activation, ctx.backend = inputs
    out, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.save_for_backward(q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, seqused_k, bias_k)


def _backward(ctx: Any, grad_out: torch.Tensor, _: Any) -> tuple[torch.Tensor | None, ...]:
    *saved, bias_k = ctx.saved_tensors
    grad_q, grad_k, grad_v, grad_bias = torch.ops.grank.candidate_cross_attention_backward.default(
        grad_out, *saved, ctx.softmax_scale, bias_k, ctx.activation, ctx.backend
    )
    return grad_q, grad_k, grad_v, None, None, None, None, None if bias_k is None else grad_bias, None, None


def _backward_of_backward(ctx: Any, *grads: torch.Tensor) -> None:
    raise NotImplementedError("candidate_cross_attention has no second derivative")


torch.library.impl("grank::candidate_cross_attention", "default", _run)
torch.library.impl("grank::candidate_cross_attention_backward", "default", _run_backward)
torch.library.register_fake("grank::candidate_cross_attention", _fake)
torch.library.register_fake("grank::candidate_cross_attention_backward", _fake_backward)
torch.library.register_autograd("grank::candidate_cross_attention", _backward, setup_context=_setup_context)
torch.library.register_autograd("grank::candidate_cross_attention_backward", _backward_of_backward)
