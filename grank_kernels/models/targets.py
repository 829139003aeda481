"""What training windows ask at their moments: which item is wanted, among which others, and which are known by then."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from grank_kernels.data.histories import Batch


def later_targets(window: Batch, horizon: int) -> Tensor:
    """For each item of a window but the last, one of the `horizon` items that follow it, at random.

    Args:
        window: (B, W).
        horizon: 1 or more; 1 is the next item. Where fewer follow, one of those.

    Returns:
        (B, W - 1) int64; -1 where nothing follows.
    """
    moments = torch.arange(window.items.shape[1] - 1, device=window.items.device)
    left = (window.lengths.unsqueeze(1) - 1 - moments).clamp(1, horizon)
    return window.items.gather(1, moments + 1 + (torch.rand(left.shape, device=left.device) * left).long())


def draw_moments(window: Batch, number: int) -> Tensor:
    """Some moments of each window: (B, number) int64 columns, at random, behind each of which there is an item.

    Windows have at least two items.
    """
    choice = torch.rand(len(window.items), number, device=window.items.device)
    return (choice * (window.lengths - 1).unsqueeze(1)).long()


class Candidates(NamedTuple):
    """What a second stage must tell apart.

    Attributes:
        ids: (R, 1 + K) int64, the target first.
        log_frequency: (R, 1 + K), the logarithm of how often an item is drawn; inf for an id that is no alternative.
    """

    ids: Tensor
    log_frequency: Tensor


def draw_candidates(targets: Tensor, pool: Tensor, seen: Tensor, number: int) -> Candidates:
    """Each target with `number` negatives, drawn from the targets of the batch.

    Args:
        targets: (R,) int64.
        pool: (n,) int64, all targets of the batch.
        seen: (R, S) int64, items that are no alternative to the target of their row, padded with -1.
        number: of negatives.
    """
    drawn = pool[torch.randint(len(pool), (len(targets), number), device=pool.device)]
    ids = torch.cat([targets.unsqueeze(1), drawn], 1)
    frequency = torch.bincount(pool)[ids] / len(pool)
    barred = (drawn == targets.unsqueeze(1)) | (drawn.unsqueeze(2) == seen.unsqueeze(1)).any(2)
    return Candidates(ids, frequency.log().masked_fill(F.pad(barred, (1, 0)), float("inf")))


def until(items: Tensor, stops: Tensor, padding: int | Tensor) -> Tensor:
    """The first `stops[i]` items of row i of (n, L), and `padding` behind them."""
    return items.where(torch.arange(items.shape[1], device=items.device) < stops.unsqueeze(1), padding)
