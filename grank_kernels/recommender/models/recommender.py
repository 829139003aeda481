"""`Recommender`: the interface of every model."""

from abc import ABC, abstractmethod
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from grank_kernels.distributed.sharded_table import ShardedItemTable
from grank_kernels.mips_topk import TopK, mips_topk
from grank_kernels.recommender.data.histories import Batch, Histories
from grank_kernels.table.item_table import ItemTable


class Recommender(nn.Module, ABC):
    """A model that retrieves by inner product; some models also rank the retrieved items.

    Attributes:
        history: number of newest history items that the model reads.
        ranks: whether the model has a second stage, i.e. `rank` changes the order of the retrieval.
        needs_history: whether `user_vectors` of an empty history is 0, so that all items score alike; see
            `with_fallback`.
        longest_window: number of items that a window for `losses` may have; None for a model that reads the newest
            items of a longer window.
        popularity: (N,) int32, number of training rows of each item, part of a checkpoint; 0 before `observe`, None for
            a model that does not count.
        group: process group of data-parallel training, in which every rank has its own batches; None without one. In a
            group `losses` is collective, and the mean of the ranks' losses is the loss of their joint batch.
    """

    history: int
    ranks: bool = False
    needs_history: bool = False
    longest_window: int | None = None
    popularity: Tensor | None
    group: dist.ProcessGroup | None = None

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("popularity", None)

    def observe(self, histories: Histories) -> None:
        """Store the statistics of the training histories that the model uses. Here: `popularity`, if there is one."""
        if self.popularity is not None:
            counts = torch.bincount(histories.items, minlength=len(self.popularity))
            self.popularity = counts.to(self.popularity)

    @abstractmethod
    def item_vectors(self) -> Tensor:
        """(N, d) float32: the item vectors, the table to search."""

    def searchable(self) -> Tensor | ShardedItemTable:
        """The item vectors as `items` of `mips_topk`: a tensor, or a table sharded among ranks."""
        return self.item_vectors()

    @abstractmethod
    def user_vectors(self, batch: Batch) -> Tensor:
        """(B, d) float32: the users' vectors, the queries, from histories of up to `history` items."""

    @abstractmethod
    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """Scalar losses by name, from training windows of up to `longest_window` items."""

    def objective(self, losses: dict[str, Tensor]) -> Tensor:
        """The scalar that training minimises, from the result of `losses`: their sum."""
        return sum(losses.values(), start=next(iter(losses.values())) * 0)

    def rank(self, batch: Batch, users: Tensor, candidates: Tensor, logits: Tensor) -> Tensor:
        """Second-stage scores of retrieved candidates.

        Args:
            batch: histories of any length; the model reads the newest items.
            users: (B, d) from `user_vectors`.
            candidates: (B, C) int64, indices from `mips_topk`; -1 scores `-inf`.
            logits: (B, C) float32, values from `mips_topk`.

        Returns:
            (B, C) float32. Here: the logits, i.e. the order of the retrieval.
        """
        return logits

    def with_fallback(
        self, found: TopK, lengths: Tensor, *, exclude: Any = None, allow: Tensor | None = None
    ) -> tuple[TopK, Tensor]:
        """Retrieved items, with the most popular items for users with an empty history.

        Changes nothing for a model that does not `needs_history`.

        Args:
            found: (B, k) values and indices that `mips_topk` returned.
            lengths: (B,) int64, the length of each user's whole history.
            exclude: items not to return, as for `mips_topk`.
            allow: items that may be returned, as for `mips_topk`.

        Returns:
            The lists, and a (B,) bool mask of the users with the most popular items. Their values are numbers of
            training rows; equal ones are ordered by item number; padded with `-inf` and -1.
        """
        empty = lengths == 0 if self.needs_history else torch.zeros_like(lengths, dtype=torch.bool)
        if self.popularity is None or not bool(empty.any()):
            return found, torch.zeros_like(empty)
        values, indices = found
        counts = self.popularity.to(values.device, torch.float32).unsqueeze(1)
        popular = mips_topk(counts.new_ones(len(values), 1), counts, values.shape[1], exclude=exclude, allow=allow)
        replaced = empty.to(values.device).unsqueeze(1)
        return TopK(popular.values.where(replaced, values), popular.indices.where(replaced, indices)), empty

    def rank_rows(self, table: ItemTable, batch: Batch, users: Tensor, candidates: Tensor, logits: Tensor) -> Tensor:
        """`rank` for serving: with the rows of the searched table as item vectors, in a model that can use them.

        Args:
            table: table of `item_vectors()`, in which rows may have been replaced.
            batch: as for `rank`.
            users: (B, d), as for `rank`.
            candidates: (B, C) int64, as for `rank`.
            logits: (B, C) float32, as for `rank`.

        Returns:
            (B, C) float32. Here: the result of `rank`, with the model's own item vectors.
        """
        return self.rank(batch, users, candidates, logits)


def newest_outputs(outputs: Tensor, batch: Batch) -> Tensor:
    """The outputs (B, L, d) at the newest item of every history, (B, d); 0 for an empty history."""
    lengths = batch.lengths
    rows = torch.arange(len(lengths), device=lengths.device)
    return outputs[rows, (lengths - 1).clamp(min=0)].masked_fill((lengths == 0).unsqueeze(1), 0.0)
