"""What a training window asks at each of its moments: which item is wanted, and which are known by then."""

import torch
from torch import Tensor

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


def until(items: Tensor, stops: Tensor) -> Tensor:
    """The first `stops[i]` items of row i of (n, L), -1 behind them."""
    return items.where(torch.arange(items.shape[1], device=items.device) < stops.unsqueeze(1), -1)
