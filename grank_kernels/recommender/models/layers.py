"""Layers shared by the models."""

from torch import Tensor, nn
from torch.nn import functional as F


def mlp(inputs: int, hidden: int, outputs: int) -> nn.Sequential:
    """Linear, GELU, linear."""
    return nn.Sequential(nn.Linear(inputs, hidden), nn.GELU(), nn.Linear(hidden, outputs))


def prefix_means(x: Tensor, counts: Tensor, visible: Tensor) -> Tensor:
    """Masked means over prefixes of histories.

    Args:
        x: (B, T, d).
        counts: (B, T) bool: the rows of x to average.
        visible: (B, M) int64 in [0, T]: lengths of the prefixes.

    Returns:
        (B, M, d): the mean of the counted rows among the first `visible` rows, 0 where there is none.
    """
    sums = F.pad((x * counts.unsqueeze(-1)).cumsum(1), (0, 0, 1, 0))
    numbers = F.pad(counts.cumsum(1), (1, 0)).gather(1, visible).clamp(min=1)
    return sums.gather(1, visible.unsqueeze(-1).expand(-1, -1, x.shape[2])) / numbers.unsqueeze(-1)
