"""SASRec and HSTU: the next item from a history, one pass for every moment of it."""

from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional as F

from grank_kernels.recommender.data.histories import Batch
from grank_kernels.recommender.models.blocks import BLOCKS, Backbone
from grank_kernels.recommender.models.embedding_model import SOFTMAXES, EmbeddingModel
from grank_kernels.recommender.models.recommender import at_newest
from grank_kernels.recommender.settings import Settings, takes


@dataclass(frozen=True)
class SequentialConfig(Settings):
    """Settings of a `Sequential` model.

    Attributes:
        backbone: "transformer" is SASRec (arXiv 1808.09781), "hstu" is HSTU (arXiv 2402.17152), "llama" a Llama block.
        dim: width of item and user vectors.
        blocks: attention blocks.
        heads: heads of each.
        history: items that the model reads.
        dropout: of inputs and outputs of blocks.
        temperature: user and item vectors are normalised, and logits are their products over this.
        softmax: over the "corpus", or a "batch" as a sample of it; see `EmbeddingModel`.
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
    """A causal backbone over item vectors whose output at each item is a query for the item after it.

    Trained on the softmax over the whole corpus where it is small enough, where the papers draw negatives, less the
    items that the user has seen by then, which are never asked for.
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
        """(B, d) float32: the queries, from up to `history` items; of norm 1 / temperature, 0 for an empty history."""
        return self._queries(at_newest(self._outputs(batch.items), batch))

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """Cross-entropy of every item of the windows but the first, given those before it."""
        asked = batch.valid[:, 1:]
        queries = self._queries(self._outputs(batch.items[:, :-1])[asked])
        loss, _ = self.retrieval_loss(queries, batch.items[:, 1:][asked], batch.items, asked)
        return {"retrieval": loss}

    def _outputs(self, items: Tensor) -> Tensor:
        x = self.rows_of(items.clamp(min=0)) * self.config.dim**0.5
        outputs: Tensor = self.backbone(x)[0]
        return outputs

    def _queries(self, outputs: Tensor) -> Tensor:
        return F.normalize(outputs, dim=-1) / self.config.temperature
