"""`candidate_cross_attention`: the public function validates its arguments and chooses the backend."""

import torch

from grank_kernels.backends.problems import CandidateCrossAttentionProblem
from grank_kernels.common.checks import (
    FLOATS,
    INTEGERS,
    check_choice,
    check_device,
    check_number,
    check_operand,
    check_tensor,
)
from grank_kernels.ops.candidate_cross_attention import attend
from grank_kernels.ops.dispatch import choose

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
    out, lse = attend(problem, chosen)
    return (out, lse) if return_lse else out
