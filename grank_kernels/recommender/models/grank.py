"""GRank (arXiv 2510.15299): a Generator that retrieves and a Ranker that orders what it found."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from grank_kernels.recommender.data.histories import Batch
from grank_kernels.recommender.models.blocks import BLOCKS, Backbone, Memory
from grank_kernels.recommender.models.embedding_model import SOFTMAXES, EmbeddingModel
from grank_kernels.recommender.models.layers import mlp, prefix_means
from grank_kernels.recommender.models.ranker import Ranker
from grank_kernels.recommender.models.targets import draw_candidates, draw_moments, later_targets, until
from grank_kernels.recommender.settings import Settings, takes
from grank_kernels.score_candidates import score_candidates
from grank_kernels.table.item_table import ItemTable


@dataclass(frozen=True)
class GRankConfig(Settings):
    """Settings of a `GRank`. What the paper gives is named; everything else is ours, settled on validation users.

    Attributes:
        dim: width of item and user vectors (128 in the paper).
        backbone: blocks of the Generator: "transformer", "llama" or "hstu".
        blocks: how many (4 in the paper).
        heads: of each.
        short_history: items that the Generator reads (64 in the paper).
        long_history: items that the Ranker reads (up to 1000 in the paper).
        hidden: width of the heads that score candidates.
        dropout: of the Generator.
        ranker_dropout: of those heads' hidden layers.
        temperature: user and item vectors are normalised, and first-stage logits are their products over this.
        softmax: of the first stage, over the "corpus", or a "batch" as a sample of it; see `EmbeddingModel`.
        auxiliary: whether training has the target-aware branch. Without a Ranker it is the second stage too.
        ranker: whether there is a Ranker.
        auxiliary_weight: of L_SA, where L_NTP has 1.
        ranking_weight: of L_CA.
        moments: how many moments of each training window train the second stages.
        negatives: candidates from which they must tell each target.
        horizon: the target of a moment is one of this many items that follow it, at random. 1 is the next item; more
            fits an evaluation that asks for all that comes later.
    """

    dim: int = takes(64, least=1)
    backbone: str = takes("transformer", choices=tuple(BLOCKS))
    blocks: int = takes(2, least=1)
    heads: int = takes(2, least=1)
    short_history: int = takes(64, least=1)
    long_history: int = takes(128, least=1)
    hidden: int = takes(128, least=1)
    dropout: float = takes(0.2, least=0, below=1)
    ranker_dropout: float = takes(0.2, least=0, below=1)
    temperature: float = takes(0.05, above=0)
    softmax: str = takes("corpus", choices=SOFTMAXES)
    auxiliary: bool = True
    ranker: bool = True
    auxiliary_weight: float = takes(0.25, least=0)
    ranking_weight: float = takes(0.25, least=0)
    moments: int = takes(4, least=1)
    negatives: int = takes(32, least=1)
    horizon: int = takes(1, least=1)


class Auxiliary(nn.Module):
    """The target-aware branch: candidates join the Generator's blocks as tokens, and an MLP scores what comes out.

    The blocks are the Generator's own, so that learning to tell the target among these tokens shapes what the history
    is encoded to. The item's own vector beside the first MLP is ours.
    """

    def __init__(self, dim: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.inputs = mlp(dim, dim, dim)
        self.head = nn.Sequential(nn.Linear(dim, hidden), nn.ReLU(), nn.Dropout(dropout))
        self.out = nn.Linear(hidden, 1, bias=False)  # a constant would leave a softmax over candidates as it is
        nn.init.zeros_(self.out.weight)  # start from the first stage's order

    def forward(self, x: Tensor, visible: Tensor, backbone: Backbone, memories: list[Memory]) -> Tensor:
        """Scores (B, C) of candidates `x` (B, C, d), each of which sees `visible` (B, C) items of the history."""
        joined = backbone.join(x + self.inputs(x), visible, memories)
        scores: Tensor = self.out(self.head(joined))
        return scores.squeeze(-1)


class GRank(EmbeddingModel):
    """Retrieve, then rank, over one item table that every part shares (arXiv 2510.15299).

    **Generator**: causal self-attention over the short history, and a query token U behind it whose output is the user
    vector. U is an MLP of the mean of the history's items and the mean of the liked ones; the token's learned part is
    the MLP's bias. Training asks for every moment of a window in one pass, so each moment has a U of its own, and U
    sees the history up to its moment and itself.

    **Auxiliary branch**, in training: the target and its negatives join as further tokens. They see the history up to
    their moment and themselves, neither each other nor U; nothing sees them. The history is read before anything joins
    it, so the branch does not change a bit of the user vector and costs serving nothing.

    **Ranker**: single-head cross-attention from each candidate to the long history.

    A second stage's score is the first stage's logit, which `mips_topk` has returned anyway, plus the output of its
    MLP. The sum is ours: the paper scores with the MLP alone, and has four billion interactions to learn it from.
    """

    def __init__(self, num_items: int, config: GRankConfig) -> None:
        super().__init__(num_items, config.dim, softmax=config.softmax)
        self.config = config
        self.history = max(config.short_history, config.long_history if config.ranker else 0)
        self.ranks = config.auxiliary or config.ranker
        self.query_token = mlp(2 * config.dim, 2 * config.dim, config.dim)
        self.backbone = Backbone(
            config.backbone,
            dim=config.dim,
            blocks=config.blocks,
            heads=config.heads,
            dropout=config.dropout,
            length=config.short_history,
        )
        self.auxiliary = Auxiliary(config.dim, config.hidden, config.ranker_dropout) if config.auxiliary else None
        self.ranker: Ranker | None = None
        if config.ranker:
            self.ranker = Ranker(config.dim, config.long_history, config.hidden, config.ranker_dropout)

    def user_vectors(self, batch: Batch) -> Tensor:
        """(B, d) float32, of norm 1 / temperature: the queries for `mips_topk` over `item_vectors()`."""
        history = batch.newest(self.config.short_history)
        x, memories = self._read(history)
        return self._users(x, history, history.lengths.unsqueeze(1), memories).squeeze(1)

    def rank(self, batch: Batch, users: Tensor, candidates: Tensor, logits: Tensor) -> Tensor:
        """See `Recommender.rank`: logits plus outputs of the Ranker, or of the auxiliary branch where there is none."""
        if self.ranker is not None:
            read, known = (self.vectors_of(ids.clamp(min=0)) for ids in (batch.items, candidates))
            outputs = self.ranker(read, batch.lengths, users, known)
        elif self.auxiliary is not None:
            history = batch.newest(self.config.short_history)
            _, memories = self._read(history)
            visible = history.lengths.unsqueeze(1).expand_as(candidates)
            outputs = self.auxiliary(self._embed(candidates), visible, self.backbone, memories)
        else:
            return logits
        ranked: Tensor = (logits + outputs).masked_fill(candidates < 0, float("-inf"))
        return ranked

    @torch.no_grad()
    def rank_rows(self, table: ItemTable, batch: Batch, users: Tensor, candidates: Tensor, logits: Tensor) -> Tensor:
        """See `Recommender.rank_rows`: `rank` by the folded Ranker and `score_candidates`, over the table's rows."""
        if self.ranker is None:
            return self.rank(batch, users, candidates, logits)
        folded = self.ranker.fold(table.rows(batch.items.clamp(min=0)), batch.lengths, users)
        return logits + score_candidates(candidates, table, **folded._asdict())

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """The paper's L_NTP, L_SA and L_CA, weighted: the InfoNCE losses of the parts there are.

        The first stage's softmax runs over items not seen in the window, which is what retrieval searches. The paper
        takes the other targets of the batch as negatives (`softmax="batch"`); at a few thousand items the corpus costs
        no more than the attention does, and needs no logQ correction.

        The second stages' negatives are drawn from the first stage's own softmax, so they are the candidates to be met
        in serving. A score is `logit + output`, and after the logQ correction the output alone is left of it: the
        second stages learn how much likelier an item is than the first stage thought.
        """
        config = self.config
        window = batch.newest(config.short_history + 1)
        history, asked = Batch(window.items[:, :-1], window.feedback[:, :-1]), window.valid[:, 1:]
        wanted = later_targets(window, config.horizon)
        x, memories = self._read(history)
        visible = torch.arange(1, x.shape[1] + 1, device=x.device).expand(asked.shape)
        users = self._users(x, history, visible, memories)
        first, corpus = self.retrieval_loss(users[asked], wanted[asked], window.items, asked)
        losses = {"retrieval": first}
        if not self.ranks:
            return losses

        at = draw_moments(window, config.moments)
        rows = torch.arange(len(at), device=at.device).repeat_interleave(at.shape[1])
        stops, users, targets = (
            (at + 1).flatten(),
            users[rows, at.flatten()],
            corpus.columns(wanted.gather(1, at)).flatten(),
        )
        barred = corpus.columns(until(window.items[rows], stops, -1))
        barred = barred.where(barred < len(corpus.vectors), targets.unsqueeze(1))
        with torch.no_grad():
            drawn = draw_candidates(targets, corpus.logits(users, targets), barred, config.negatives)
        known = drawn.clamp(min=0)
        if self.auxiliary is not None:
            tokens = self._embed(corpus.items(known).view(len(at), -1))
            visible = stops.repeat_interleave(drawn.shape[1]).view(len(at), -1)
            outputs = self.auxiliary(tokens, visible, self.backbone, memories).view(drawn.shape)
            losses["auxiliary"] = self.joint_mean(config.auxiliary_weight * _infonce(outputs, drawn), len(drawn))
        if self.ranker is not None:
            stops = stops + (batch.lengths - window.lengths)[rows]  # in the batch, which reaches further back
            read, candidates = self.vectors_of(batch.items.clamp(min=0)), F.embedding(known, corpus.vectors)
            outputs = self.ranker(read, batch.lengths, users, candidates, (rows, stops))
            losses["ranking"] = self.joint_mean(config.ranking_weight * _infonce(outputs, drawn), len(drawn))
        return losses

    def _embed(self, ids: Tensor) -> Tensor:
        """(..., d), of anything where an id is negative."""
        stretch: float = self.config.dim**0.5
        return self.rows_of(ids.clamp(min=0)) * stretch

    def _read(self, history: Batch) -> tuple[Tensor, list[Memory]]:
        """The short history's embeddings, and its memory in each block."""
        x = self._embed(history.items)
        return x, self.backbone(x)[1]

    def _users(self, x: Tensor, history: Batch, visible: Tensor, memories: list[Memory]) -> Tensor:
        """User vectors (B, M, d) of the moments at which `visible` (B, M) items of the history have been seen."""
        pools = [prefix_means(x, which, visible) for which in (history.valid, history.feedback)]
        outputs = self.backbone.join(self.query_token(torch.cat(pools, -1)), visible, memories)
        users: Tensor = F.normalize(outputs, dim=-1) / self.config.temperature
        return users


def _infonce(outputs: Tensor, candidates: Tensor) -> Tensor:
    """Cross-entropy of the first candidate among its row's, (R, C); those with a negative id are none."""
    logits = outputs.masked_fill(candidates < 0, float("-inf"))
    return F.cross_entropy(logits, logits.new_zeros(len(logits), dtype=torch.int64))
