"""The torch op `grank::score_candidates`."""

from typing import Any

import torch

from grank_kernels.backends import BACKENDS
from grank_kernels.backends.problems import ScoreCandidatesProblem
from grank_kernels.common.checks import check_offsets
from grank_kernels.ops.dispatch import is_plain
from grank_kernels.ops.transforms import TransformableOp, dispatch, refused, save_nothing


def score(problem: ScoreCandidatesProblem, backend: str) -> torch.Tensor:
    """Scores (B, C) of validated arguments, by torch's dispatcher where a mode or a transform needs it."""
    if is_plain(*(x for x in problem if isinstance(x, torch.Tensor))):
        return _run(*problem, backend)
    scores: torch.Tensor = dispatch(torch.ops.grank.score_candidates.default, _Scores, *problem, backend)
    return scores


torch.library.define(
    "grank::score_candidates",
    "(Tensor candidate_ids, Tensor items, Tensor? row_scale, Tensor keys, Tensor? values, Tensor cu_seqlens, "
    "Tensor? user_hidden, Tensor? item_weight, Tensor? out_weight, float out_bias, float? softmax_scale, "
    "str activation, Tensor? bias_k, float lse_weight, float lse_floor, str backend) -> Tensor",
    tags=torch.Tag.pt2_compliant_tag,
)


def _run(*operands: Any) -> torch.Tensor:
    *fields, backend = operands
    problem = ScoreCandidatesProblem(*fields)
    ids, N = problem.candidate_ids, len(problem.items)
    check_offsets("cu_seqlens", problem.cu_seqlens, len(problem.keys))
    if ids.is_cpu and ids.numel() > 0:  # on a GPU reading them would synchronise
        most = int(ids.max())
        if most >= N:
            raise ValueError(f"candidate_ids must be below {N}, negative for none, got {most}")
    scores: torch.Tensor = BACKENDS[backend].score_candidates(problem)
    return scores


def _fake(candidate_ids: torch.Tensor, *_: Any) -> torch.Tensor:
    return candidate_ids.new_empty(candidate_ids.shape, dtype=torch.float32)


_no_derivative = refused("score_candidates has no derivative; candidate_cross_attention has a gradient")


class _Scores(TransformableOp):
    """`grank::score_candidates` inside `torch.func` transforms."""

    op = torch.ops.grank.score_candidates.default
    setup_context = staticmethod(save_nothing)
    backward = staticmethod(_no_derivative)
    jvp = staticmethod(_no_derivative)


torch.library.impl("grank::score_candidates", "default", _run)
torch.library.register_fake("grank::score_candidates", _fake)
