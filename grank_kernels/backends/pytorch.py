"""Batched PyTorch on any device: chunks of items, no loop over users, no synchronisation with the host."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch.nn import functional as F

from grank_kernels.backends.noise import gumbel, item_keys, row_keys
from grank_kernels.backends.problems import CorpusCrossEntropyProblem, SampleNegativesProblem, SoftmaxSums
from grank_kernels.backends.reference import in_full

_CHUNK_LOGITS = 1 << 20  # of a chunk: 4 MiB of float32; at most six such matrices live at a time


def unavailable() -> str | None:
    """Why no op of this backend can run here."""
    return None


class _Chunk(NamedTuple):
    """Some items and their logits: those of excluded items are -inf."""

    start: int
    items: torch.Tensor  # (n, d) float32
    logits: torch.Tensor  # (R, n) float32


def _chunks(
    users: torch.Tensor,
    items: torch.Tensor,
    bias: torch.Tensor | None,
    scale: float,
    exclude: tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None],
) -> Iterator[_Chunk]:
    offsets, ids, windows = exclude
    lists = 0 if offsets is None else len(offsets) - 1
    step = max(1, _CHUNK_LOGITS // max(len(users), lists, 1))
    users = users.float()
    if offsets is not None and ids is not None:
        entries = torch.arange(len(ids), device=ids.device)
        list_of = torch.searchsorted(offsets.contiguous(), entries, right=True) - 1  # -1 or `lists`: of no list
        used = (list_of >= 0) & (list_of < lists)
        list_of = list_of.clamp(0, max(lists - 1, 0))
    for start in range(0, len(items), step):
        rows = items[start : start + step].float()
        logits = scale * (users @ rows.T)
        if bias is not None:
            logits += bias[start : start + step]
        if offsets is not None and ids is not None and lists > 0:
            inside = used & (ids >= start) & (ids < start + len(rows))
            excluded = torch.zeros(lists, len(rows) + 1, dtype=torch.bool, device=ids.device)
            excluded[list_of, (ids - start).where(inside, len(rows))] = True  # the last column is for ids elsewhere
            by_row = excluded[:, :-1] if windows is None else excluded[windows.clamp(0, lists - 1), :-1]
            logits.masked_fill_(by_row, -torch.inf)
        yield _Chunk(start, rows, logits)


def corpus_cross_entropy_unsupported(users: torch.Tensor, items: torch.Tensor) -> str | None:
    """Why `corpus_cross_entropy` cannot run for these tensors."""
    return None


def _loss_chunks(problem: CorpusCrossEntropyProblem) -> Iterator[tuple[_Chunk, torch.Tensor, torch.Tensor]]:
    """Chunks without the targets' logits, each row's column of its target in [0, n), and whether it is there."""
    users, items, targets, *exclude, bias, scale = problem
    present = (targets >= 0)[:, None]
    for chunk in _chunks(users.masked_fill(~present, 0), items, bias, scale, (exclude[0], exclude[1], exclude[2])):
        column = targets[:, None] - chunk.start
        here = (column >= 0) & (column < len(chunk.items))
        yield chunk, column.clamp(0, len(chunk.items) - 1), here


@in_full
def corpus_cross_entropy(problem: CorpusCrossEntropyProblem, pool: bool) -> SoftmaxSums:
    """The sums of an online softmax over chunks of items."""
    users, items, targets, bias, scale = problem.users, problem.items, problem.targets, problem.bias, problem.scale
    at = targets.clamp(0, max(len(items) - 1, 0))
    rows = items[at].float() if len(items) else users.float()
    at_target = scale * (users.float() * rows).sum(1)
    if bias is not None and len(items):
        at_target += bias[at]
    peak = torch.full_like(at_target, -torch.inf)
    mass = torch.zeros_like(at_target)
    pooled = torch.zeros(users.shape, dtype=torch.float32, device=users.device) if pool else None
    for (_, rows, logits), column, here in _loss_chunks(problem):
        logits.scatter_(1, column, logits.gather(1, column).masked_fill(here, -torch.inf))
        highest = torch.maximum(peak, logits.amax(1))
        base = highest.masked_fill(highest == -torch.inf, 0)
        weights = logits.sub_(base[:, None]).exp_()
        down = (peak - base).exp()
        mass = mass * down + weights.sum(1)
        if pooled is not None:
            pooled = torch.addmm(pooled * down[:, None], weights, rows)
        peak = highest
    return SoftmaxSums(at_target, peak, mass, pooled)


@in_full
def corpus_cross_entropy_backward(
    problem: CorpusCrossEntropyProblem, slope: torch.Tensor, target_slope: torch.Tensor, normaliser: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of items and bias, chunk by chunk of items: every row is summed once."""
    users, items, targets = problem.users, problem.items, problem.targets
    present = (targets >= 0)[:, None]
    rows = users.float().masked_fill(~present, 0)
    grad_items = torch.empty(items.shape, dtype=items.dtype, device=items.device)
    grad_bias = torch.empty(len(items), dtype=torch.float32, device=items.device)
    peak, log_sum = normaliser[:, :, None]
    for (start, chunk, logits), column, here in _loss_chunks(problem):
        gone = logits == -torch.inf
        steep = logits.sub_(peak).sub_(log_sum).exp_().mul_(slope[:, None]).masked_fill_(gone | ~present, 0)
        steep.scatter_(1, column, steep.gather(1, column).where(~here, target_slope[:, None]))
        stop = start + len(chunk)
        grad_items[start:stop] = (problem.scale * (steep.T @ rows)).to(items.dtype)
        grad_bias[start:stop] = steep.sum(0)
    return grad_items, grad_bias


def sample_negatives_unsupported(users: torch.Tensor, items: torch.Tensor) -> str | None:
    """Why `sample_negatives` cannot run for these tensors."""
    return None


@in_full
def sample_negatives(problem: SampleNegativesProblem) -> tuple[torch.Tensor, torch.Tensor]:
    """`ids` (R, m) int64 and `log_q` (R, m) float32: the m largest logits with noise, merged chunk by chunk."""
    users, items, m, *exclude, scale, seed = problem
    R, device = len(users), users.device
    rows, columns = row_keys(seed, R, device), item_keys(len(items), device)
    noisy = torch.empty(R, 0, dtype=torch.float64, device=device)
    logits = torch.empty(R, 0, dtype=torch.float32, device=device)
    ids = torch.empty(R, 0, dtype=torch.int64, device=device)
    total = torch.full((R,), -torch.inf, device=device)
    for chunk in _chunks(users, items, None, scale, (exclude[0], exclude[1], exclude[2])):
        stop = chunk.start + len(chunk.items)
        total = torch.logaddexp(total, chunk.logits.logsumexp(1))
        drawn = chunk.logits + gumbel(rows[:, None], columns[chunk.start : stop])
        best = drawn.nan_to_num(-torch.inf, torch.inf, -torch.inf).topk(min(m, stop - chunk.start))
        noisy = torch.cat([noisy, best.values], 1)
        logits = torch.cat([logits, chunk.logits.gather(1, best.indices)], 1)
        ids = torch.cat([ids, best.indices + chunk.start], 1)
        noisy, kept = noisy.topk(min(m, noisy.shape[1]))
        logits, ids = logits.gather(1, kept), ids.gather(1, kept)
    none = noisy == -torch.inf
    log_q = (logits - total[:, None]).masked_fill(none, -torch.inf)
    missing = (0, m - ids.shape[1])
    return F.pad(ids.masked_fill(none, -1), missing, value=-1), F.pad(log_q, missing, value=-torch.inf)
