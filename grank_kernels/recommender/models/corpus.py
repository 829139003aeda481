"""What a retrieval's softmax runs over: every item, or those that the batches of all ranks ask for."""

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from grank_kernels.recommender.models.losses import softmax_loss


class Corpus(NamedTuple):
    """The M items of a softmax, which models speak of by their columns in its logits.

    Attributes:
        vectors: (M, d) float32.
        ids: (M,) int64, ascending: the item number of each column; None where they are the same.
        bias: (M,) float32, added to the logits of all but the target: the logarithm of how many items a column stands
            for; None for 0.
    """

    vectors: Tensor
    ids: Tensor | None = None
    bias: Tensor | None = None

    def columns(self, items: Tensor) -> Tensor:
        """Columns of item numbers, any shape; M for items that have none, and for -1."""
        M = len(self.vectors)
        if self.ids is None:
            return items.where(items >= 0, M)
        places = torch.searchsorted(self.ids, items).clamp(max=M - 1)
        return places.where(self.ids[places] == items, M)

    def items(self, columns: Tensor) -> Tensor:
        """Item numbers of columns in [0, M), any shape."""
        return columns if self.ids is None else self.ids[columns]

    def logits(self, queries: Tensor, targets: Tensor) -> Tensor:
        """(..., M) of queries (..., d), each of which asks for a column, (...)."""
        logits = queries @ self.vectors.T
        if self.bias is None:
            return logits
        targets = targets.unsqueeze(-1)
        return (logits + self.bias).scatter(-1, targets, logits.gather(-1, targets))

    def loss(self, queries: Tensor, targets: Tensor, seen: Tensor) -> Tensor:
        """Mean cross-entropy of the targets.

        Args:
            queries: (n, d) float32.
            targets: (n,) columns.
            seen: (n, S) columns that are no alternative to the target; M for none.
        """
        return softmax_loss(queries, self.vectors, targets, seen, self.bias)


def gathered(ids: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """The ids (n,) of all ranks of a group, each with an n of its own; without a group those of this process."""
    if group is None:
        return ids
    size = dist.get_world_size(group)
    lengths = [ids.new_empty(1) for _ in range(size)]
    dist.all_gather(lengths, ids.new_tensor([len(ids)]), group=group)
    counts = [int(length) for length in lengths]
    parts = [ids.new_empty(max(counts)) for _ in range(size)]
    dist.all_gather(parts, F.pad(ids, (0, max(counts) - len(ids))), group=group)
    return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])


def joint_mean(mean: Tensor, count: int, group: dist.ProcessGroup | None) -> Tensor:
    """A mean over `count` entries so weighed that its average over the ranks of a group is the mean over all entries.

    Data-parallel training averages gradients over the ranks, whose batches ask for different numbers of items.
    """
    if group is None:
        return mean
    total = mean.new_tensor(float(count))
    dist.all_reduce(total, group=group)
    return mean * (count * dist.get_world_size(group) / total)


def average(x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """The mean of the ranks' tensors, of one shape; without a gradient."""
    if group is None:
        return x
    total = x.clone()
    dist.all_reduce(total, group=group)
    return total / dist.get_world_size(group)
