"""`score_candidates`: the public function. It validates its arguments and chooses the backend."""

import math

import torch

from grank_kernels.backends.problems import ScoreCandidatesProblem
from grank_kernels.common.checks import (
    FLOATS,
    INTEGERS,
    check_choice,
    check_device,
    check_number,
    check_operand,
    check_tensor,
)
from grank_kernels.ops.dispatch import choose, is_plain
from grank_kernels.ops.requests import version_of
from grank_kernels.ops.score_candidates import score
from grank_kernels.table.item_table import ItemTable
from grank_kernels.table.versions import Version

ACTIVATIONS = ("relu", "silu", "gelu")
_TENSORS = (
    "candidate_ids", "items", "keys", "values", "cu_seqlens", "user_hidden", "item_weight", "out_weight", "bias_k",
)  # fmt: skip


def score_candidates(
    candidate_ids: torch.Tensor,
    items: "torch.Tensor | ItemTable",
    keys: torch.Tensor,
    values: torch.Tensor | None = None,
    *,
    cu_seqlens: torch.Tensor,
    user_hidden: torch.Tensor | None = None,
    item_weight: torch.Tensor | None = None,
    out_weight: torch.Tensor | None = None,
    out_bias: float = 0.0,
    softmax_scale: float | None = None,
    activation: str = "relu",
    bias_k: torch.Tensor | None = None,
    lse_weight: float = 0.0,
    lse_floor: float = -math.inf,
    backend: str | None = None,
) -> torch.Tensor:
    """Scores of candidates from single-head cross-attention to their user's history and an MLP: ids in, scores out.

    For user b and candidate c, with `e = items[candidate_ids[b, c]]` and the user's rows
    `K = keys[cu_seqlens[b]:cu_seqlens[b + 1]]`, V of `values` and bias of `bias_k`:

        s      = softmax_scale * (e @ K.T) + bias
        hidden = softmax(s) @ V + e @ item_weight + user_hidden[b]
        score  = out_weight @ act(hidden) + out_bias + lse_weight * log(exp(lse_floor) + sum(exp(s)))

    The head is `values`, `user_hidden`, `item_weight` and `out_weight`. Without it the score is the rest of the sum,
    which costs half of the products with the history or less.

    With a head and without the last term this is GRank's Ranker with the query projection folded into K and the
    head's first layer into V, once a request (`models.Ranker.fold`). Nothing of size C x d or C x L is written to
    memory. Sums are float32. There is no gradient: this op serves, `candidate_cross_attention` trains.

    Every tensor may also be a NumPy array or an object with `__dlpack__`; the result is a tensor.

    Args:
        candidate_ids: (B, C) int64 or int32, as `mips_topk` returns them: rows of `items`, or ids of a table with ids
            of its own. A negative id scores -inf. Ids may repeat.
        items: (N, d) float32, float16 or bfloat16, or an `ItemTable`, int8 included.
        keys: (T, d) float32, float16 or bfloat16; the following tensors have the same dtype.
        values: (T, h), or None without a head.
        cu_seqlens: (B + 1,) int64 or int32, not decreasing, in [0, T]: user b has the rows from `cu_seqlens[b]` to
            `cu_seqlens[b + 1]` of keys, values and bias_k. With an empty history `softmax(s) @ V` is 0, and the
            log-sum-exp is `lse_floor`.
        user_hidden: (B, h), the user's term of the hidden layer, biases included; None without a head.
        item_weight: (d, h), the weight of the candidate's term; None without a head.
        out_weight: (h,), or None without a head.
        out_bias: a number.
        softmax_scale: None for `d ** -0.5`.
        activation: "relu", "silu" or "gelu" (with erf).
        bias_k: (T,) float32, float16 or bfloat16, or None: added to every logit of a key. -inf masks the key.
        lse_weight: a number. 0 leaves the last term out; without a head it must not be 0.
        lse_floor: a number below infinity. -inf, the default, gives users with an empty history a last term of
            `lse_weight * -inf`; a finite one bounds the term of candidates that no key is near to.
        backend: None for the first that can run, or a name in `show_config()`: a named backend runs or raises.

    Returns:
        (B, C) float32. Values in other users' rows, NaN included, do not affect a user's scores.

    Raises:
        TypeError: an argument of the wrong type, or a tensor that is sparse, nested or a subclass with its own
            operations (DTensor, ...).
        ValueError: a wrong dtype, shape, device, id, offset or backend, or an argument that requires a gradient. On a
            GPU, where reading ids and offsets would synchronise, an unknown id scores -inf and offsets are clamped.
        NotImplementedError: forward-mode derivatives.

    Source: GRank (arXiv 2510.15299), the Ranker.
    """
    candidate_ids = check_tensor("candidate_ids", candidate_ids, INTEGERS, (2,))
    version = version_of(items)
    rows, row_scale, ids, _ = version.operands()
    check_number("lse_weight", lse_weight)
    check_number("lse_floor", lse_floor)
    if not lse_floor < math.inf:
        raise ValueError(f"lse_floor must be below infinity, got {lse_floor}")
    B, d = candidate_ids.shape[0], rows.shape[1]
    if values is None and user_hidden is None and item_weight is None and out_weight is None:
        if lse_weight == 0:
            raise ValueError("lse_weight must not be 0 without values, user_hidden, item_weight and out_weight, got 0")
        keys = check_tensor("keys", keys, FLOATS, (2,))
        T = keys.shape[0]
        keys = check_operand("keys", keys, FLOATS, "(T, d)", (T, d))
    else:
        values = check_tensor("values", values, FLOATS, (2,))
        (T, h), dtypes = values.shape, (values.dtype,)
        keys = check_operand("keys", keys, dtypes, "(T, d)", (T, d))
        user_hidden = check_operand("user_hidden", user_hidden, dtypes, "(B, h)", (B, h))
        item_weight = check_operand("item_weight", item_weight, dtypes, "(d, h)", (d, h))
        out_weight = check_operand("out_weight", out_weight, dtypes, "(h,)", (h,))
    cu_seqlens = check_operand("cu_seqlens", cu_seqlens, INTEGERS, "(B + 1,)", (B + 1,))
    if bias_k is not None:
        bias_k = check_operand("bias_k", bias_k, FLOATS, "(T,)", (T,)).float()
    check_number("out_bias", out_bias)
    if softmax_scale is not None:
        check_number("softmax_scale", softmax_scale)
    check_choice("activation", activation, ACTIVATIONS)
    tensors = (candidate_ids, rows, keys, values, cu_seqlens, user_hidden, item_weight, out_weight, bias_k)
    learns = torch.is_grad_enabled()
    for name, x in zip(_TENSORS, tensors, strict=True):
        check_device(name, x, "items", rows.device)
        if learns and x is not None and x.requires_grad:
            raise ValueError(
                f"{name} must not require a gradient, which score_candidates does not have: call it under "
                "torch.no_grad(); candidate_cross_attention has a gradient"
            )
    positions = candidate_ids if ids is None else _positions(candidate_ids, version)
    name = choose("score_candidates", backend, rows, keys, values)
    problem = ScoreCandidatesProblem(
        positions.long(), rows, row_scale, keys, values, cu_seqlens.long(), user_hidden, item_weight, out_weight,
        out_bias, softmax_scale, activation, bias_k, lse_weight, lse_floor,
    )  # fmt: skip
    return score(problem, name)


def _positions(candidate_ids: torch.Tensor, version: Version) -> torch.Tensor:
    """Positions of a table's own ids; `version.size`, which is out of range, for ids that the table does not hold."""
    positions = version.find(candidate_ids)
    if candidate_ids.is_cpu and is_plain(candidate_ids):  # here the message can name the id
        unknown = (positions == version.size) & (candidate_ids >= 0)
        if bool(unknown.any()):
            raise ValueError(f"candidate_ids must be in the table, got {int(candidate_ids[unknown][0])}")
    return positions.where(candidate_ids >= 0, -1)
