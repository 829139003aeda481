"""What training windows ask at their moments: which item is wanted, among which others, and which are known by then."""

import torch
from torch import Tensor
from torch.nn import functional as F

from grank_kernels.recommender.data.histories import Batch


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


def draw_candidates(targets: Tensor, logits: Tensor, barred: Tensor, number: int) -> Tensor:
    """Each target with negatives drawn from a softmax, without repetition.

    Args:
        targets: (R,) int64.
        logits: (R, N) float, whose softmax is drawn from.
        barred: (R, S) int64, items that are not drawn; the target is not, either way.
        number: of negatives.

    Returns:
        (R, 1 + number) int64, the target first; -1 where the negatives run out.
    """
    left = logits.scatter(1, barred, float("-inf")).scatter_(1, targets.unsqueeze(1), float("-inf"))
    noisy = left - torch.rand_like(left).log_().neg_().log_()  # Gumbel's noise makes of topk a draw
    drawn = noisy.topk(min(number, logits.shape[1]))
    negatives = drawn.indices.where(drawn.values > float("-inf"), -1)
    return F.pad(torch.cat([targets.unsqueeze(1), negatives], 1), (0, number - negatives.shape[1]), value=-1)


def until(items: Tensor, stops: Tensor, padding: int | Tensor) -> Tensor:
    """The first `stops[i]` items of row i of (n, L), and `padding` behind them."""
    return items.where(torch.arange(items.shape[1], device=items.device) < stops.unsqueeze(1), padding)


def seen_before(windows: Tensor, asked: Tensor, padding: int | Tensor) -> Tensor:
    """What stands in a window before each item that is asked for.

    Args:
        windows: (B, W).
        asked: (B, W - 1) bool: whether `windows[:, 1:]` is asked for there; n times True.
        padding: of the rows.

    Returns:
        (n, W).
    """
    rows, columns = asked.nonzero(as_tuple=True)
    return until(windows[rows], columns + 1, padding)
