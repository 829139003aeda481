"""`EmbeddingModel`: base class of models with an embedding table and a softmax over all items or a sample."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from grank_kernels.distributed.sharded_table import ShardedItemTable
from grank_kernels.recommender.data.histories import Histories
from grank_kernels.recommender.models.corpus import Corpus, all_gather_ragged, joint_mean
from grank_kernels.recommender.models.recommender import Recommender
from grank_kernels.recommender.models.sharding import is_sharded, lookup
from grank_kernels.recommender.models.targets import seen_before
from grank_kernels.table.item_table import ItemTable

SOFTMAXES = ("corpus", "batch")


class EmbeddingModel(Recommender):
    """A recommender whose item vectors are each computed from one row of an embedding table.

    Attributes:
        items: (N, d) float32, the embedding table; a `DTensor` when it is sharded among ranks.
        softmax: items that the retrieval's softmax runs over. "corpus": all items. "batch": the targets of all ranks'
            batches as a sample of the corpus (see `corpus`), which needs a call of `observe` first.
    """

    log_share: Tensor | None

    def __init__(self, num_items: int, dim: int, *, std: float = 0.02, softmax: str = "corpus") -> None:
        super().__init__()
        self.items = nn.Parameter(std * torch.randn(num_items, dim))
        self.softmax = softmax
        self.register_buffer("log_share", None, persistent=False)
        self.popularity = torch.zeros(num_items, dtype=torch.int32)

    def observe(self, histories: Histories) -> None:
        """Store `popularity` and, for a sampled softmax, the share of each item in the training rows."""
        super().observe(histories)
        if self.softmax == "batch":
            counts = torch.bincount(histories.items, minlength=len(self.items)).clamp(min=1)
            self.log_share = (counts / counts.sum()).log().to(self.items.device)

    def item_vectors(self) -> Tensor:
        """(N, d) float32 of norm 1: the table to search. A sharded model gathers all rows."""
        return self._vectors(self.items.full_tensor() if is_sharded(self.items) else self.items)

    def searchable(self) -> Tensor | ShardedItemTable:
        """`item_vectors()`, or a table sharded among the ranks in which each rank searches for its own queries."""
        if not is_sharded(self.items):
            return self.item_vectors()
        local = ItemTable.from_rows(self._vectors(self.items.to_local()))
        return ShardedItemTable(local, group=self.group, scatter_queries=True)

    def corpus(self, targets: Tensor) -> Corpus:
        """The items that a softmax runs over for targets (n,) int64 of this rank; collective in a group.

        "batch" takes each distinct target of all ranks once, with the logQ correction (arXiv 2510.15299): of n targets,
        an item that occurs c times and has the share q of the training rows represents `c / (n q)` items, so that the
        sum over the columns is an unbiased estimate of the sum over the corpus. A query's own target is not drawn and
        represents itself alone (arXiv 2507.09331).
        """
        if self.softmax == "corpus":
            return Corpus(self.item_vectors())
        if self.log_share is None:
            raise RuntimeError(
                'a model with softmax="batch" must observe its training histories first: call .observe()'
            )
        targets = all_gather_ragged(targets, self.group)
        ids, counts = torch.unique(targets, return_counts=True)
        return Corpus(self.vectors_of(ids), ids, (counts / len(targets)).log() - self.log_share[ids])

    def retrieval_loss(self, queries: Tensor, targets: Tensor, windows: Tensor, asked: Tensor) -> tuple[Tensor, Corpus]:
        """Mean cross-entropy of the targets, and the corpus of its softmax, from which items seen before are left out.

        Args:
            queries: (n, d) float32, one for each True of `asked`.
            targets: (n,) int64 item numbers.
            windows: (B, W) int64 item numbers, padded with -1.
            asked: (B, W - 1) bool: whether the position predicts a target; n entries are True.
        """
        corpus = self.corpus(targets)
        seen = seen_before(corpus.columns(windows), asked, len(corpus.vectors))
        loss = corpus.loss(queries, corpus.columns(targets), seen)
        return self.joint_mean(loss, len(targets)), corpus

    def vectors_of(self, ids: Tensor) -> Tensor:
        """Rows (..., d) of `item_vectors()` for item numbers (...) in [0, N)."""
        return self._vectors(self.lookup(ids))

    def lookup(self, ids: Tensor) -> Tensor:
        """Rows (..., d) of `items` for item numbers (...) in [0, N)."""
        return lookup(self.items, ids)

    def joint_mean(self, mean: Tensor, count: int) -> Tensor:
        """A mean over `count` entries, weighted so that its average over the ranks is the mean over all entries."""
        return joint_mean(mean, count, self.group)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Weights that were saved without `popularity`, as in earlier versions, leave it as it is."""
        state_dict.setdefault(f"{prefix}popularity", self.popularity)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _vectors(self, rows: Tensor) -> Tensor:
        """Item vectors (..., d) from rows (..., d) of `items`."""
        return F.normalize(rows, dim=-1)
