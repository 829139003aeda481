"""The arguments of a backend's function: one type an op, its fields in the order of the op's schema.

Shapes, dtypes and devices are validated; strides are arbitrary. On the CPU ids, offsets and lengths are validated too;
on a GPU, where reading them would synchronise, they may hold anything.
"""

import math
from typing import NamedTuple

import torch


class MipsTopkProblem(NamedTuple):
    """The arguments of `mips_topk`.

    Attributes:
        queries: (B, d) float32, float16 or bfloat16.
        items: (N, d), the rows: float32, float16, bfloat16 or int8.
        row_scale: (N,) float32, the scales of int8 rows; else None.
        ids: (N,) int64, which order equal scores and are those of `exclude_ids`; None: positions are the ids.
        k: 1 or more.
        exclude_offsets: (B + 1,) int64, or None: query b must not be given
            `exclude_ids[exclude_offsets[b] : exclude_offsets[b + 1]]`.
        exclude_ids: (E,) int64, -1 for none; or None.
        allow: (N,) or (B, N) bool, the eligible rows; None: all.
    """

    queries: torch.Tensor
    items: torch.Tensor
    row_scale: torch.Tensor | None
    ids: torch.Tensor | None
    k: int
    exclude_offsets: torch.Tensor | None = None
    exclude_ids: torch.Tensor | None = None
    allow: torch.Tensor | None = None


class ScoreCandidatesProblem(NamedTuple):
    """The arguments of `score_candidates`.

    Attributes:
        candidate_ids: (B, C) int64, positions in `items`, not ids. A negative one scores -inf and reads no row; on a
            GPU so does one of N or more.
        items: (N, d) float32, float16, bfloat16 or int8.
        row_scale: (N,) float32, the scales of int8 rows; else None.
        keys: (T, d) float32, float16 or bfloat16; the following tensors have the same dtype, `items` may have another.
        values: (T, h); None without a head, and then `user_hidden`, `item_weight` and `out_weight` too.
        cu_seqlens: (B + 1,) int64, not decreasing: user b has the rows from `cu_seqlens[b]` to `cu_seqlens[b + 1]`; on
            a GPU clamped to [0, T]. Rows outside belong to no user. With an empty history the attention term of the
            hidden layer is 0.
        user_hidden: (B, h).
        item_weight: (d, h).
        out_weight: (h,).
        out_bias: added to every score.
        softmax_scale: of the logits; None: `d ** -0.5`.
        activation: "relu", "silu" or "gelu".
        bias_k: (T,) float32, added to every logit of a key; or None.
        lse_weight: weight of the log-sum-exp term; 0: there is none, whatever the logits.
        lse_floor: below infinity: a further logit of the log-sum-exp of every candidate, but not of the attention.
    """

    candidate_ids: torch.Tensor
    items: torch.Tensor
    row_scale: torch.Tensor | None
    keys: torch.Tensor
    values: torch.Tensor | None
    cu_seqlens: torch.Tensor
    user_hidden: torch.Tensor | None
    item_weight: torch.Tensor | None
    out_weight: torch.Tensor | None
    out_bias: float = 0.0
    softmax_scale: float | None = None
    activation: str = "relu"
    bias_k: torch.Tensor | None = None
    lse_weight: float = 0.0
    lse_floor: float = -math.inf

    @property
    def head(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor] | None:
        """values, user_hidden, item_weight and out_weight: all of them or none."""
        given = (self.values, self.user_hidden, self.item_weight, self.out_weight)
        return None if any(x is None for x in given) else given  # type: ignore[return-value]

    @property
    def scale(self) -> float:
        """The scale of the logits."""
        return _scale(self.softmax_scale, self.items)


class CandidateCrossAttentionProblem(NamedTuple):
    """The arguments of `candidate_cross_attention` and of its gradient.

    Attributes:
        q: (B, C, H, D), expanded (`stride(0) == 0`) if all users share the queries; or with `cu_seqlens_q`
            (total_q, H, D). float32, float16 or bfloat16, k and v the same.
        k: (B, L, H, D), or with `cu_seqlens_k` (total_k, H, D).
        v: like k; None if only `lse` is wanted, for "softmax" only.
        cu_seqlens_q: (B + 1,) int64, not decreasing, or None: user b has the rows `[cu[b], cu[b + 1])`; on a GPU
            clamped to the rows there are.
        cu_seqlens_k: the same for k and v.
        seqused_k: (B,) int64, only without `cu_seqlens_k`: user b has the first `seqused_k[b]` keys; None: all.
        softmax_scale: of the products, for both activations; None: `D ** -0.5`.
        bias_k: k's shape without D, float32, or None.
        activation: "softmax" or "silu".
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor | None
    cu_seqlens_q: torch.Tensor | None = None
    cu_seqlens_k: torch.Tensor | None = None
    seqused_k: torch.Tensor | None = None
    softmax_scale: float | None = None
    bias_k: torch.Tensor | None = None
    activation: str = "softmax"

    @property
    def scale(self) -> float:
        """The scale of the products."""
        return _scale(self.softmax_scale, self.q)


class CorpusCrossEntropyProblem(NamedTuple):
    """What `corpus_cross_entropy` and its gradient are of.

    Attributes:
        users: (R, d) float32, float16 or bfloat16.
        items: (N, d), users' dtype.
        targets: (R,) int64 in [-1, N); -1: the row has no target, loss 0 and no gradient.
        exclude_offsets: (W + 1,) int64, not decreasing, or None: list w holds
            `exclude_ids[exclude_offsets[w] : exclude_offsets[w + 1]]`.
        exclude_ids: (E,) int64 in [-1, N), -1 for none; or None.
        exclude_windows: (R,) int64 in [0, W), the list that each row excludes; None: row r excludes list r.
        bias: (N,) float32, added to the logits; or None.
        scale: factor of the inner products.
    """

    users: torch.Tensor
    items: torch.Tensor
    targets: torch.Tensor
    exclude_offsets: torch.Tensor | None = None
    exclude_ids: torch.Tensor | None = None
    exclude_windows: torch.Tensor | None = None
    bias: torch.Tensor | None = None
    scale: float = 1.0


class SoftmaxSums(NamedTuple):
    """Sums over the eligible items other than the target, `x` being the logits.

    The target is kept apart because its probability is near 1 once a model has learnt: `1 - p` then has no digits left.

    Attributes:
        at_target: (R,) float32, the target's logit.
        peak: (R,) float32, near the largest of the other logits; -inf where there is none.
        mass: (R,) float32, the sum of `exp(x - peak)`.
        pooled: (R, d) float32, the sum of `exp(x - peak) * item`, or None where no gradient was asked for.

    Rows without a target may hold anything.
    """

    at_target: torch.Tensor
    peak: torch.Tensor
    mass: torch.Tensor
    pooled: torch.Tensor | None


class SampleNegativesProblem(NamedTuple):
    """What `sample_negatives` draws.

    Attributes:
        users: (R, d) float32, float16 or bfloat16.
        items: (N, d), users' dtype.
        m: number of items a row, 1 or more.
        exclude_offsets: as in `CorpusCrossEntropyProblem`.
        exclude_ids: likewise.
        exclude_windows: likewise.
        scale: factor of the inner products.
        seed: in [0, 2^63).
    """

    users: torch.Tensor
    items: torch.Tensor
    m: int
    exclude_offsets: torch.Tensor | None
    exclude_ids: torch.Tensor | None
    exclude_windows: torch.Tensor | None
    scale: float
    seed: int


def _scale(softmax_scale: float | None, rows: torch.Tensor) -> float:
    """The given scale, or `D ** -0.5`; 1 for D = 0, where every product is 0."""
    return float(max(rows.shape[-1], 1) ** -0.5) if softmax_scale is None else float(softmax_scale)
