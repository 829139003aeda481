"""`candidate_cross_attention`: the public function. It validates its arguments and chooses the backend."""

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
    v: torch.Tensor | None = None,
    *,
    cu_seqlens_q: torch.Tensor | None = None,
    cu_seqlens_k: torch.Tensor | None = None,
    seqused_k: torch.Tensor | None = None,
    softmax_scale: float | None = None,
    bias_k: torch.Tensor | None = None,
    activation: str = "softmax",
    return_lse: bool = False,
    backend: str | None = None,
) -> torch.Tensor | tuple[torch.Tensor | None, torch.Tensor]:
    """Attention of every candidate to the history of its own user: no mask, no padding, no (C, L) matrix in memory.

    By user and head, for the user's candidates q (C, D) and history rows k and v (L, D):

        s   = softmax_scale * (q @ k.T) + bias_k
        out = softmax(s) @ v                      activation "softmax"
        out = silu(s) @ v / L                     activation "silu", as in HSTU
        lse = logsumexp(s)                        with `return_lse`

    Sums are float32. `out` and `lse` are differentiable once, in reverse mode, in q, k, v and bias_k; the gradient is
    deterministic. It works under `torch.func.grad`, `vjp`, `jacrev` and `vmap`.

    Every tensor may also be a NumPy array or an object with `__dlpack__`; the result is a tensor.

    Args:
        q: queries of the candidates, float32, float16 or bfloat16: (B, C, H, D); (C, H, D), shared by all users; or
            with `cu_seqlens_q` (total_q, H, D).
        k: (B, L, H, D), or with `cu_seqlens_k` (total_k, H, D); q's dtype.
        v: k's shape and dtype; None if only `lse` is wanted, which then costs half of the products.
        cu_seqlens_q: (B + 1,) int64 or int32, not decreasing, in [0, total_q]: user b has the rows
            `q[cu_seqlens_q[b]:cu_seqlens_q[b + 1]]`.
        cu_seqlens_k: the same for k and v.
        seqused_k: (B,) int64 or int32 in [0, L], only without `cu_seqlens_k`: user b has the first `seqused_k[b]` rows
            of k and v. None: all L.
        softmax_scale: None for `D ** -0.5`.
        bias_k: k's shape without D, float32, float16 or bfloat16, or None: added to every logit of a key. Under
            "softmax" -inf masks the key.
        activation: "softmax" or "silu".
        return_lse: whether to return `lse` too, for "softmax" only.
        backend: None for the first that can run, or a name in `show_config()`: a named backend runs or raises.

    Returns:
        `out`, of q's dtype, (B, C, H, D) or (total_q, H, D); with `return_lse` the pair `(out, lse)`, `lse` float32 of
        q's shape without D: the logarithm of the sum of `exp(s)` over the keys. Without v `out` is None. A user with
        an empty history, and rows of q outside all offsets, have `out = 0` and `lse = +inf`. Values in padding or in
        another user's rows, NaN included, affect neither `out` nor gradients.

    Raises:
        TypeError: an argument of the wrong type, or a tensor that is sparse, nested or a subclass with its own
            operations (DTensor, ...).
        ValueError: a wrong dtype, shape, device, offset, length or backend. On a GPU offsets and lengths are clamped
            to the rows instead, since reading them would synchronise.
        NotImplementedError: forward-mode or second derivatives.

    Source: GRank (arXiv 2510.15299), the Ranker; HSTU (arXiv 2402.17152) for "silu".
    """
    k = check_tensor("k", k, FLOATS, (4,) if cu_seqlens_k is None else (3,))
    dtypes, (H, D) = (k.dtype,), k.shape[-2:]
    if v is not None:
        v = check_operand("v", v, dtypes, "k's shape", tuple(k.shape))
    elif not return_lse:
        raise ValueError("v must be a tensor unless only lse is wanted (return_lse=True), got None")
    B = k.shape[0]
    if cu_seqlens_k is not None:
        cu_seqlens_k = check_tensor("cu_seqlens_k", cu_seqlens_k, INTEGERS, (1,))
        B = max(cu_seqlens_k.shape[0] - 1, 0)
        check_operand("cu_seqlens_k", cu_seqlens_k, INTEGERS, "(B + 1,)", (B + 1,))
    if cu_seqlens_q is not None:
        cu_seqlens_q = check_operand("cu_seqlens_q", cu_seqlens_q, INTEGERS, "(B + 1,)", (B + 1,))
        q = check_tensor("q", q, dtypes, (3,))
        check_operand("q", q, dtypes, "(total_q, H, D)", (q.shape[0], H, D))
    else:
        q = check_tensor("q", q, dtypes, (3, 4))
        if q.dim() == 3:
            q = q.expand(B, *q.shape)
        check_operand("q", q, dtypes, "(B, C, H, D)", (B, q.shape[1], H, D))
    if seqused_k is not None:
        seqused_k = check_operand("seqused_k", seqused_k, INTEGERS, "(B,)", (B,))
        if cu_seqlens_k is not None:
            raise ValueError("seqused_k must be None with cu_seqlens_k: it goes with k of (B, L, H, D)")
    if bias_k is not None:
        bias_k = check_operand("bias_k", bias_k, FLOATS, "k's shape without D", tuple(k.shape[:-1])).float()
    if softmax_scale is not None:
        check_number("softmax_scale", softmax_scale)
    check_choice("activation", activation, ACTIVATIONS)
    if return_lse and activation != "softmax":
        raise ValueError(f"return_lse must be False for activation {activation!r}, which has no lse, got {return_lse}")
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
    return (None if v is None else out, lse) if return_lse else out
