"""DSSM's dual tower (Huang et al., CIKM 2013): a baseline that ignores the order of the history."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from grank_kernels.recommender.data.histories import Batch
from grank_kernels.recommender.models.embedding_model import SOFTMAXES, EmbeddingModel
from grank_kernels.recommender.models.layers import mlp, prefix_means
from grank_kernels.recommender.models.targets import later_targets
from grank_kernels.recommender.settings import Settings, takes


@dataclass(frozen=True)
class DualTowerConfig(Settings):
    """Settings of a `DualTower`.

    Attributes:
        dim: width of item and user vectors.
        hidden: width of the hidden layer of each tower.
        history: number of newest items that the user tower reads.
        dropout: dropout rate of the user tower's inputs.
        temperature: logits are inner products of normalised user and item vectors over this.
        softmax: "corpus" for all items, "batch" for a sample of them; see `EmbeddingModel`.
        horizon: a target is drawn from this many next items; 1 is the next item.
    """

    dim: int = takes(64, least=1)
    hidden: int = takes(256, least=1)
    history: int = takes(256, least=1)
    dropout: float = takes(0.2, least=0, below=1)
    temperature: float = takes(0.05, above=0)
    softmax: str = takes("corpus", choices=SOFTMAXES)
    horizon: int = takes(1, least=1)


class DualTower(EmbeddingModel):
    """An MLP for users and an MLP for items, combined by an inner product only.

    The user tower reads the mean of the history's items, the mean of the liked items and the newest item. DSSM draws
    negatives; here the softmax runs over the whole corpus, as for the models that it is compared with.
    """

    def __init__(self, num_items: int, config: DualTowerConfig) -> None:
        super().__init__(num_items, config.dim, std=1.0, softmax=config.softmax)
        self.config = config
        self.history = config.history
        self.user_tower = mlp(3 * config.dim, config.hidden, config.dim)
        self.item_tower = mlp(config.dim, config.hidden, config.dim)
        self.dropout = nn.Dropout(config.dropout)

    def user_vectors(self, batch: Batch) -> Tensor:
        """(B, d) float32 of norm 1 / temperature: the queries for `mips_topk` over `item_vectors()`."""
        history = batch.newest(self.history)
        return self._users(history, history.lengths.unsqueeze(1)).squeeze(1)

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """Cross-entropy of an item after each position of the windows, over all items not seen before it."""
        window = batch.newest(self.history + 1)
        history, asked = Batch(window.items[:, :-1], window.feedback[:, :-1]), window.valid[:, 1:]
        visible = torch.arange(1, asked.shape[1] + 1, device=asked.device).expand(asked.shape)
        users = self._users(history, visible)[asked]
        targets = later_targets(window, self.config.horizon)[asked]
        loss, _ = self.retrieval_loss(users, targets, window.items, asked)
        return {"retrieval": loss}

    def _vectors(self, rows: Tensor) -> Tensor:
        return F.normalize(self.item_tower(rows), dim=-1)

    def _users(self, history: Batch, visible: Tensor) -> Tensor:
        """User vectors (B, M, d) after the first `visible` (B, M) items of the history."""
        x = self.lookup(history.items.clamp(min=0))
        pools = [prefix_means(x, which, visible) for which in (history.valid, history.feedback)]
        newest = F.pad(x, (0, 0, 1, 0)).gather(1, visible.unsqueeze(-1).expand(-1, -1, x.shape[2]))
        users = self.user_tower(self.dropout(torch.cat([*pools, newest], -1)))
        return F.normalize(users, dim=-1) / self.config.temperature
