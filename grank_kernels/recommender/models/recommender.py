"""What every model of the package can be asked for."""

from abc import ABC, abstractmethod

import torch
import torch.distributed as dist
from torch import Tensor, nn

from grank_kernels.distributed.sharded_table import ShardedItemTable
from grank_kernels.recommender.data.histories import Batch, Histories
from grank_kernels.table.item_table import ItemTable


class Recommender(nn.Module, ABC):
    """A model that retrieves by inner product; some of them rank what was retrieved.

    Attributes:
        history: items of a history that the model reads.
        ranks: whether `rank` has anything to add to the retrieval's order.
        group: of the processes that train the model together, each with batches of its own; None for one alone. In a
            group `losses` is collective, and its averages over the ranks are the losses of their joint batch.
    """

    history: int
    ranks: bool = False
    group: dist.ProcessGroup | None = None

    def observe(self, histories: Histories) -> None:
        """Take what the model needs to know of the histories that it is to be trained on. Here: nothing."""

    @abstractmethod
    def item_vectors(self) -> Tensor:
        """(N, d) float32: the table to search."""

    def searchable(self) -> Tensor | ShardedItemTable:
        """The same as `items` of `mips_topk`, wherever it lies."""
        return self.item_vectors()

    @abstractmethod
    def user_vectors(self, batch: Batch) -> Tensor:
        """(B, d) float32: the queries, from histories of up to `history` items."""

    @abstractmethod
    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """Scalar losses by name, from training windows of up to `history + 1` items."""

    def objective(self, losses: dict[str, Tensor]) -> Tensor:
        """What training minimises, from what `losses` returned: their sum."""
        return sum(losses.values(), start=next(iter(losses.values())) * 0)

    def rank(self, batch: Batch, users: Tensor, candidates: Tensor, logits: Tensor) -> Tensor:
        """Second-stage scores of retrieved candidates.

        Args:
            batch: histories, of any length; the model reads what it can.
            users: (B, d) from `user_vectors`.
            candidates: (B, C) int64, the indices that `mips_topk` returned; -1 scores `-inf`.
            logits: (B, C) float32, the values that it returned.

        Returns:
            (B, C) float32. Here: the logits, the order of the retrieval.
        """
        return logits

    def rank_rows(self, table: ItemTable, batch: Batch, users: Tensor, candidates: Tensor, logits: Tensor) -> Tensor:
        """`rank` as it is served: items are the rows of the table that was searched, where the model can take them.

        Args:
            table: made of `item_vectors()`, perhaps with rows that were replaced since.
            batch: as for `rank`, and so are `users`, `candidates` and `logits`.
            users: (B, d).
            candidates: (B, C) int64.
            logits: (B, C) float32.

        Returns:
            (B, C) float32. Here: what `rank` returns, which knows the model's own items alone.
        """
        return self.rank(batch, users, candidates, logits)


def at_newest(outputs: Tensor, batch: Batch) -> Tensor:
    """The outputs (B, L, d) at the newest item of every history, (B, d); 0 of an empty one, which likes all alike."""
    lengths = batch.lengths
    rows = torch.arange(len(lengths), device=lengths.device)
    return outputs[rows, (lengths - 1).clamp(min=0)].masked_fill((lengths == 0).unsqueeze(1), 0.0)
