"""Targets and negatives of training windows, and the items seen before each position."""

import torch
from torch import Tensor
from torch.nn import functional as F

from grank_kernels.recommender.data.histories import Batch


def later_targets(window: Batch, horizon: int) -> Tensor:
    """For each item of a window except the last, one of the next `horizon` items, at random.

    Args:
        window: (B, W).
        horizon: 1 or more; 1 is the next item. Near the end of a window it shrinks to the items left.

    Returns:
        (B, W - 1) int64; -1 where no item follows.
    """
    moments = torch.arange(window.items.shape[1] - 1, device=window.items.device)
    left = (window.lengths.unsqueeze(1) - 1 - moments).clamp(1, horizon)
    return window.items.gather(1, moments + 1 + (torch.rand(left.shape, device=left.device) * left).long())


def draw_moments(window: Batch, number: int) -> Tensor:
    """Random positions of each window with a next item: (B, number) int64 columns. Windows have two items or more."""
    choice = torch.rand(len(window.items), number, device=window.items.device)
    return (choice * (window.lengths - 1).unsqueeze(1)).long()


def draw_candidates(targets: Tensor, logits: Tensor, barred: Tensor, number: int) -> Tensor:
    """Each target with negatives drawn from a softmax without replacement (Gumbel top-k).

    Args:
        targets: (R,) int64.
        logits: (R, N) float, logits of the softmax.
        barred: (R, S) int64, items that are not drawn; nor is the target.
        number: number of negatives.

    Returns:
        (R, 1 + number) int64, the target first, padded with -1 where fewer items can be drawn.
    """
    left = logits.scatter(1, barred, float("-inf")).scatter_(1, targets.unsqueeze(1), float("-inf"))
    noisy = left - torch.rand_like(left).log_().neg_().log_()  # plus Gumbel noise
    drawn = noisy.topk(min(number, logits.shape[1]))
    negatives = drawn.indices.where(drawn.values > float("-inf"), -1)
    return F.pad(torch.cat([targets.unsqueeze(1), negatives], 1), (0, number - negatives.shape[1]), value=-1)


def truncate(items: Tensor, stops: Tensor, padding: int | Tensor) -> Tensor:
    """The first `stops[i]` items of row i of (n, L), padded with `padding`."""
    return items.where(torch.arange(items.shape[1], device=items.device) < stops.unsqueeze(1), padding)


def seen_before(windows: Tensor, asked: Tensor, padding: int | Tensor) -> Tensor:
    """The items of a window before each target.

    Args:
        windows: (B, W).
        asked: (B, W - 1) bool: whether the item in `windows[:, 1:]` is a target; n entries are True.
        padding: value after the last item.

    Returns:
        (n, W).
    """
    rows, columns = asked.nonzero(as_tuple=True)
    return truncate(windows[rows], columns + 1, padding)
