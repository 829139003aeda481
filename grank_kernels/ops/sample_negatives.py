"""The torch op `grank::sample_negatives`."""

from typing import Any

import torch

from grank_kernels.backends import BACKENDS
from grank_kernels.backends.problems import SampleNegativesProblem
from grank_kernels.ops.dispatch import is_plain
from grank_kernels.ops.requests import check_exclude_windows
from grank_kernels.ops.transforms import TransformableOp, dispatch, refused, save_nothing


def draw(problem: SampleNegativesProblem, backend: str) -> tuple[torch.Tensor, torch.Tensor]:
    """`ids` and `log_q` of validated arguments, by torch's dispatcher where a mode or a transform needs it."""
    if is_plain(*(x for x in problem if isinstance(x, torch.Tensor))):
        return _run(*problem, backend)
    ids, log_q = dispatch(torch.ops.grank.sample_negatives.default, _Draw, *problem, backend)
    return ids, log_q


torch.library.define(
    "grank::sample_negatives",
    "(Tensor users, Tensor items, SymInt m, Tensor? exclude_offsets, Tensor? exclude_ids, Tensor? exclude_windows, "
    "float scale, SymInt seed, str backend) -> (Tensor ids, Tensor log_q)",
    tags=torch.Tag.pt2_compliant_tag,
)


def _run(*operands: Any) -> tuple[torch.Tensor, torch.Tensor]:
    *fields, backend = operands
    problem = SampleNegativesProblem(*fields)
    check_exclude_windows(problem.exclude_offsets, problem.exclude_ids, problem.exclude_windows, len(problem.items))
    ids, log_q = BACKENDS[backend].sample_negatives(problem)
    return ids, log_q


def _fake(users: torch.Tensor, items: torch.Tensor, m: int, *_: Any) -> tuple[torch.Tensor, torch.Tensor]:
    shape = (users.shape[0], m)
    return users.new_empty(shape, dtype=torch.int64), users.new_empty(shape, dtype=torch.float32)


_no_derivative = refused("sample_negatives has no derivative; corpus_cross_entropy has a gradient")


class _Draw(TransformableOp):
    """`grank::sample_negatives` inside `torch.func` transforms."""

    op = torch.ops.grank.sample_negatives.default
    setup_context = staticmethod(save_nothing)
    backward = staticmethod(_no_derivative)
    jvp = staticmethod(_no_derivative)


torch.library.impl("grank::sample_negatives", "default", _run)
torch.library.register_fake("grank::sample_negatives", _fake)
