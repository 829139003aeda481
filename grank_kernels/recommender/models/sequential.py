"""SASRec and HSTU: next-item prediction at every position of a history in one pass."""

from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional as F

from grank_kernels.recommender.data.histories import Batch
from grank_kernels.recommender.models.blocks import BLOCKS, Backbone
from grank_kernels.recommender.models.embedding_model import SOFTMAXES, EmbeddingModel
from grank_kernels.recommender.models.recommender import newest_outputs
from grank_kernels.recommender.settings import Settings, takes


@dataclass(frozen=True)
class SequentialConfig(Settings):
    """Settings of a `Sequential` model.

    Attributes:
        backbone: "transformer" is SASRec (arXiv 1808.09781), "hstu" is HSTU (arXiv 2402.17152); or "llama".
        dim: width of item and user vectors.
        blocks: number of attention blocks.
        heads: number of heads of each block.
        history: number of newest items that the model reads.
        dropout: dropout rate of the blocks' inputs and outputs.
        temperature: logits are inner products of normalised user and item vectors over this.
        softmax: "corpus" for all items, "batch" for a sample of them; see `EmbeddingModel`.
    """

    backbone: str = takes("transformer", choices=tuple(BLOCKS))
    dim: int = takes(64, least=1)
    blocks: int = takes(2, least=1)
    heads: int = takes(1, least=1)
    history: int = takes(200, least=1)
    dropout: float = takes(0.2, least=0, below=1)
    temperature: float = takes(0.05, above=0)
    softmax: str = takes("corpus", choices=SOFTMAXES)


class Sequential(EmbeddingModel):
    """A causal backbone over item vectors whose output at each item is a query for the next item.

    The papers draw negatives; here the softmax runs over the whole corpus (or a sample of it), without the items that
    the user has met before, which retrieval excludes too.
    """

    needs_history = True

    def __init__(self, num_items: int, config: SequentialConfig) -> None:
        super().__init__(num_items, config.dim, softmax=config.softmax)
        self.config = config
        self.history = config.history
        self.longest_window = config.history + 1
        self.backbone = Backbone(
            config.backbone,
            dim=config.dim,
            blocks=config.blocks,
            heads=config.heads,
            dropout=config.dropout,
            length=config.history,
        )

    def user_vectors(self, batch: Batch) -> Tensor:
        """(B, d) float32 of norm 1 / temperature, 0 for an empty history; see `Recommender.user_vectors`."""
        return self._queries(newest_outputs(self._outputs(batch.items), batch))

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """Cross-entropy of every item of the windows except the first, given the items before it."""
        asked = batch.valid[:, 1:]
        queries = self._queries(self._outputs(batch.items[:, :-1])[asked])
        loss, _ = self.retrieval_loss(queries, batch.items[:, 1:][asked], batch.items, asked)
        return {"retrieval": loss}

    def _outputs(self, items: Tensor) -> Tensor:
        x = self.lookup(items.clamp(min=0)) * self.config.dim**0.5
        outputs: Tensor = self.backbone(x)[0]
        return outputs

    def _queries(self, outputs: Tensor) -> Tensor:
        return F.normalize(outputs, dim=-1) / self.config.temperature
