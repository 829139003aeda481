"""The items that a softmax runs over: the whole corpus, or the targets of a joint batch as a sample of it."""

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from grank_kernels.recommender.models.losses import softmax_loss


class Corpus(NamedTuple):
    """The M items that a softmax runs over. Losses address an item by its column in the logits.

    Attributes:
        vectors: (M, d) float32.
        ids: (M,) int64, ascending: the item number of each column; None for all items, whose columns are their numbers.
        bias: (M,) float32, added to the logits of all items but the target: the logarithm of the number of items that a
            column represents; None for 0.
    """

    vectors: Tensor
    ids: Tensor | None = None
    bias: Tensor | None = None

    def columns(self, items: Tensor) -> Tensor:
        """The columns of item numbers, any shape; M for an item without a column and for -1."""
        M = len(self.vectors)
        if self.ids is None:
            return items.where(items >= 0, M)
        places = torch.searchsorted(self.ids, items).clamp(max=M - 1)
        return places.where(self.ids[places] == items, M)

    def items(self, columns: Tensor) -> Tensor:
        """The item numbers of columns in [0, M), any shape."""
        return columns if self.ids is None else self.ids[columns]

    def logits(self, queries: Tensor, targets: Tensor) -> Tensor:
        """Logits (..., M) of queries (..., d) whose targets are columns (...)."""
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
            seen: (n, S) columns left out of the softmax, padded with M; the target always stays in.
        """
        return softmax_loss(queries, self.vectors, targets, seen, self.bias)


def all_gather_ragged(ids: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """The ids of all ranks of a group, (sum of n,), where each rank has its own n; without a group the ids given."""
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
    """A mean over `count` entries, weighted so that its average over the ranks is the mean over all ranks' entries.

    Data-parallel training averages gradients over the ranks, whose batches have different numbers of targets.
    """
    if group is None:
        return mean
    total = mean.new_tensor(float(count))
    dist.all_reduce(total, group=group)
    return mean * (count * dist.get_world_size(group) / total)


def all_reduce_mean(x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """The mean over the ranks of tensors of equal shape, without a gradient."""
    if group is None:
        return x
    total = x.clone()
    dist.all_reduce(total, group=group)
    return total / dist.get_world_size(group)
