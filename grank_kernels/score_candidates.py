"""`score_candidates`: the public function validates its arguments and chooses the backend."""

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
_TENSORS = ("candidate_ids", "items", "keys", "values", "cu_seqlens", "user_hidden", "item_weight", "out_weight")


def score_candidates(
    candidate_ids: torch.Tensor,
    items: "torch.Tensor | ItemTable",
    keys: torch.Tensor,
    values: torch.Tensor,
    *,
    cu_seqlens: torch.Tensor,
    user_hidden: torch.Tensor,
    item_weight: torch.Tensor,
    out_weight: torch.Tensor,
    out_bias: float = 0.0,
    softmax_scale: float | None = None,
    activation: str = "relu",
    backend: str | None = None,
) -> torch.Tensor:
    """Scores candidates by single-head cross-attention to their user's history and an MLP: ids in, scores out.

    For user b and candidate c, with `e = items[candidate_ids[b, c]]` and the user's rows
    `K = keys[cu_seqlens[b]:cu_seqlens[b + 1]]` and V of `values`:

        a      = softmax(softmax_scale * (e @ K.T))
        hidden = a @ V + e @ item_weight + user_hidden[b]
        score  = out_weight @ act(hidden) + out_bias

    That is GRank's Ranker after the query projection was moved into K and the head's first layer into V, which
    `models.Ranker.fold` does once a request. Nothing of size C x d or C x L is written to memory. Scores are
    accumulated in float32. There is no gradient: this is for serving, `candidate_cross_attention` for training.

    Args:
        candidate_ids: (B, C) int64 or int32, what `mips_topk` returned: rows of `items`, or ids of a table that has ids
            of its own. Negative: the score is -inf. Ids may repeat.
        items: (N, d) float32, float16 or bfloat16, or an `ItemTable`, int8 included.
        keys: (T, d) float32, float16 or bfloat16; values and the operands of the head are of the same dtype.
        values: (T, h).
        cu_seqlens: (B + 1,) int64 or int32, not decreasing, in [0, T]: where each user's rows of keys and values begin,
            and the last user's end. Without any, `a @ V` is 0.
        user_hidden: (B, h), the user's share of the hidden layer, biases included.
        item_weight: (d, h), the candidate's share.
        out_weight: (h,).
        out_bias: a number.
        softmax_scale: None for `d ** -0.5`.
        activation: "relu", "silu" or "gelu" (with erf).
        backend: None for the first that can run, or a name out of `show_config()`: a named backend runs or raises.

    Returns:
        (B, C) float32. What lies in rows that a user does not have, NaN included, does not show in the user's scores.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: a dtype, shape, device, id, offset or backend that does not fit, or an argument that wants a
            gradient; the message names the argument. On a GPU ids and offsets are not looked at, since that would cost
            a synchronisation: an id that is not in `items` scores -inf, offsets are clamped to [0, T].

    Source: GRank (arXiv 2510.15299), the Ranker.
    """
    check_tensor("candidate_ids", candidate_ids, INTEGERS, (2,))
    version = version_of(items)
    rows, row_scale, ids, _ = version.operands()
    check_tensor("values", values, FLOATS, (2,))
    B, d, (T, h), dtypes = candidate_ids.shape[0], rows.shape[1], values.shape, (values.dtype,)
    check_operand("keys", keys, dtypes, "(T, d)", (T, d))
    check_operand("cu_seqlens", cu_seqlens, INTEGERS, "(B + 1,)", (B + 1,))
    check_operand("user_hidden", user_hidden, dtypes, "(B, h)", (B, h))
    check_operand("item_weight", item_weight, dtypes, "(d, h)", (d, h))
    check_operand("out_weight", out_weight, dtypes, "(h,)", (h,))
    check_number("out_bias", out_bias)
    if softmax_scale is not None:
        check_number("softmax_scale", softmax_scale)
    check_choice("activation", activation, ACTIVATIONS)
    tensors = (candidate_ids, rows, keys, values, cu_seqlens, user_hidden, item_weight, out_weight)
    learns = torch.is_grad_enabled()
    for name, x in zip(_TENSORS, tensors, strict=True):
        check_device(name, x, "items", rows.device)
        if learns and x.requires_grad:
            raise ValueError(
                f"score_candidates has no gradient, and {name} would get none: call it under torch.no_grad(); "
                "candidate_cross_attention is for training"
            )
    positions = candidate_ids if ids is None else _positions(candidate_ids, version)
    name = choose("score_candidates", backend, rows, keys, values)
    problem = ScoreCandidatesProblem(
        positions.long(), rows, row_scale, keys, values, cu_seqlens.long(), user_hidden, item_weight, out_weight,
        out_bias, softmax_scale, activation,
    )  # fmt: skip
    return score(problem, name)


def _positions(candidate_ids: torch.Tensor, version: Version) -> torch.Tensor:
    """Of a table's own ids; those that it does not hold become `version.size`, out of range for the op too."""
    positions = version.find(candidate_ids)
    if candidate_ids.is_cpu and is_plain(candidate_ids):  # while the id is at hand
        unknown = (positions == version.size) & (candidate_ids >= 0)
        if bool(unknown.any()):
            raise ValueError(f"candidate_ids: {int(candidate_ids[unknown][0])} is not in the table")
    return positions.where(candidate_ids >= 0, -1)
