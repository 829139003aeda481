"""GRank (arXiv 2510.15299): a Generator that retrieves items and a Ranker that orders them."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from grank_kernels.recommender.data.histories import Batch
from grank_kernels.recommender.models.blocks import BLOCKS, Backbone, KVCache
from grank_kernels.recommender.models.corpus import Corpus
from grank_kernels.recommender.models.embedding_model import SOFTMAXES, EmbeddingModel
from grank_kernels.recommender.models.layers import mlp, prefix_means
from grank_kernels.recommender.models.ranker import Ranker
from grank_kernels.recommender.models.targets import draw_candidates, draw_moments, later_targets, truncate
from grank_kernels.recommender.settings import Settings, takes
from grank_kernels.score_candidates import score_candidates
from grank_kernels.table.item_table import ItemTable


@dataclass(frozen=True)
class GRankConfig(Settings):
    """Settings of a `GRank`. Values from the paper are marked; the others are ours, chosen on validation users.

    Attributes:
        dim: width of item and user vectors (paper: 128).
        backbone: blocks of the Generator: "transformer", "llama" or "hstu".
        blocks: number of blocks (paper: 4).
        heads: number of heads of each block.
        short_history: number of newest items that the Generator reads (paper: 64).
        long_history: number of newest items that the Ranker reads (paper: up to 1000).
        hidden: width of the hidden layer of the heads that score candidates.
        dropout: dropout rate of the Generator.
        ranker_dropout: dropout rate of the hidden layers of those heads.
        temperature: first-stage logits are inner products of normalised user and item vectors over this.
        softmax: of the first stage: "corpus" for all items, "batch" for a sample of them; see `EmbeddingModel`.
        auxiliary: train with the target-aware branch. Without a Ranker it is the second stage.
        ranker: train a Ranker.
        auxiliary_weight: weight of L_SA; L_NTP has weight 1.
        ranking_weight: weight of L_CA.
        moments: number of positions of each training window that train the second stages.
        negatives: number of negatives for each target of the second stages.
        horizon: a target is drawn from this many next items. 1 is the next item; more suits an evaluation whose targets
            are all later items.
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


class _Drawn(NamedTuple):
    """What R positions of the training windows give the second stages.

    Attributes:
        rows: (R,) int64, the window of each position.
        stops: (R,) int64, number of items of the window up to the position.
        users: (R, d), the user vectors there.
        candidates: (R, 1 + negatives) int64 columns of the corpus, the target first, padded with -1.
    """

    rows: Tensor
    stops: Tensor
    users: Tensor
    candidates: Tensor


class Auxiliary(nn.Module):
    """The target-aware branch: candidates attend to the history in the Generator's blocks, an MLP scores the outputs.

    The blocks are the Generator's own, so learning to tell the target from the negatives also trains how the history is
    encoded. Adding the item's vector to the first MLP's output is ours.
    """

    def __init__(self, dim: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.inputs = mlp(dim, dim, dim)
        self.head = nn.Sequential(nn.Linear(dim, hidden), nn.ReLU(), nn.Dropout(dropout))
        self.out = nn.Linear(hidden, 1, bias=False)  # a bias does not change a softmax over candidates
        nn.init.zeros_(self.out.weight)  # at first the order is the first stage's

    def forward(self, x: Tensor, visible: Tensor, backbone: Backbone, caches: list[KVCache]) -> Tensor:
        """Scores (B, C) of candidates `x` (B, C, d), each attending to the first `visible` (B, C) history items."""
        joined = backbone.join(x + self.inputs(x), visible, caches)
        scores: Tensor = self.out(self.head(joined))
        return scores.squeeze(-1)


class GRank(EmbeddingModel):
    """Retrieval, then ranking, with one item table shared by all parts (arXiv 2510.15299).

    **Generator**: causal self-attention over the short history, and a query token U after it whose output is the user
    vector. U is an MLP of the mean of the history's items and the mean of the liked items; the token's learned part is
    the MLP's bias. Training predicts after every position of a window in one pass, so each position has a U of its own,
    which attends to the history up to the position and to itself.

    **Auxiliary branch**, in training: the target and its negatives are further tokens. They attend to the history up to
    their position and to themselves, neither to each other nor to U; nothing attends to them. The history is read
    before, so the branch does not change a bit of the user vector and adds nothing to the cost of serving.

    **Ranker**: single-head cross-attention from each candidate to the long history.

    A second stage's score is the first stage's logit, which `mips_topk` has already returned, plus the output of its
    MLP. The sum is ours: the paper scores with the MLP alone, which it trains on four billion interactions.
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
        """(B, d) float32 of norm 1 / temperature: the queries for `mips_topk` over `item_vectors()`."""
        history = batch.newest(self.config.short_history)
        x, caches = self._read(history)
        return self._users(x, history, history.lengths.unsqueeze(1), caches).squeeze(1)

    def rank(self, batch: Batch, users: Tensor, candidates: Tensor, logits: Tensor) -> Tensor:
        """See `Recommender.rank`: logits plus the Ranker's outputs, or the auxiliary branch's without a Ranker."""
        if self.ranker is not None:
            read, known = (self.vectors_of(ids.clamp(min=0)) for ids in (batch.items, candidates))
            outputs = self.ranker(read, batch.lengths, users, known)
        elif self.auxiliary is not None:
            history = batch.newest(self.config.short_history)
            _, caches = self._read(history)
            visible = history.lengths.unsqueeze(1).expand_as(candidates)
            outputs = self.auxiliary(self._embed(candidates), visible, self.backbone, caches)
        else:
            return logits
        ranked: Tensor = (logits + outputs).masked_fill(candidates < 0, float("-inf"))
        return ranked

    @torch.no_grad()
    def rank_rows(self, table: ItemTable, batch: Batch, users: Tensor, candidates: Tensor, logits: Tensor) -> Tensor:
        """See `Recommender.rank_rows`: the folded Ranker's scores by `score_candidates`, over the table's rows."""
        if self.ranker is None:
            return self.rank(batch, users, candidates, logits)
        folded = self.ranker.fold(table.rows(batch.items.clamp(min=0)), batch.lengths, users)
        return logits + score_candidates(candidates, table, **folded._asdict())

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """The InfoNCE losses L_NTP, L_SA and L_CA of the paper, weighted: "retrieval", "auxiliary" and "ranking".

        The first stage's softmax runs over the items not seen in the window, as retrieval does. The paper takes the
        other targets of the batch as negatives (`softmax="batch"`); for a few thousand items the whole corpus costs no
        more than the attention, and needs no logQ correction.

        The second stages' negatives are drawn from the first stage's softmax, so they are distributed as the candidates
        in serving. A score is `logit + output`, and the logQ correction subtracts the logit: the second stages learn
        how much likelier an item is than the first stage's estimate.
        """
        config = self.config
        window = batch.newest(config.short_history + 1)
        history, asked = Batch(window.items[:, :-1], window.feedback[:, :-1]), window.valid[:, 1:]
        wanted = later_targets(window, config.horizon)
        x, caches = self._read(history)
        visible = torch.arange(1, x.shape[1] + 1, device=x.device).expand(asked.shape)
        users = self._users(x, history, visible, caches)
        first, corpus = self.retrieval_loss(users[asked], wanted[asked], window.items, asked)
        losses = {"retrieval": first}
        if not self.ranks:
            return losses

        drawn = self._draw(window, users, wanted, corpus)
        if self.auxiliary is not None:
            outputs = self._auxiliary_outputs(self.auxiliary, drawn, corpus, caches)
            loss = config.auxiliary_weight * _infonce(outputs, drawn.candidates)
            losses["auxiliary"] = self.joint_mean(loss, len(drawn.candidates))
        if self.ranker is not None:
            read = self.vectors_of(batch.items.clamp(min=0))
            stops = drawn.stops + (batch.lengths - window.lengths)[drawn.rows]  # in the batch, which has older items
            candidates = F.embedding(drawn.candidates.clamp(min=0), corpus.vectors)
            outputs = self.ranker(read, batch.lengths, drawn.users, candidates, (drawn.rows, stops))
            loss = config.ranking_weight * _infonce(outputs, drawn.candidates)
            losses["ranking"] = self.joint_mean(loss, len(drawn.candidates))
        return losses

    def _draw(self, window: Batch, users: Tensor, wanted: Tensor, corpus: Corpus) -> _Drawn:
        """Positions of the windows, and for each the target and negatives from the first stage's softmax."""
        at = draw_moments(window, self.config.moments)
        rows = torch.arange(len(at), device=at.device).repeat_interleave(at.shape[1])
        stops, of_moments = (at + 1).flatten(), users[rows, at.flatten()]
        targets = corpus.columns(wanted.gather(1, at)).flatten()
        seen = corpus.columns(truncate(window.items[rows], stops, -1))
        seen = seen.where(seen < len(corpus.vectors), targets.unsqueeze(1))
        with torch.no_grad():
            logits = corpus.logits(of_moments, targets)
            candidates = draw_candidates(targets, logits, seen, self.config.negatives)
        return _Drawn(rows, stops, of_moments, candidates)

    def _auxiliary_outputs(self, branch: Auxiliary, drawn: _Drawn, corpus: Corpus, caches: list[KVCache]) -> Tensor:
        """The auxiliary branch's outputs (R, C) for the drawn candidates."""
        windows = len(caches[0].keys)
        tokens = self._embed(corpus.items(drawn.candidates.clamp(min=0)).view(windows, -1))
        visible = drawn.stops.repeat_interleave(drawn.candidates.shape[1]).view(windows, -1)
        outputs: Tensor = branch(tokens, visible, self.backbone, caches).view(drawn.candidates.shape)
        return outputs

    def _embed(self, ids: Tensor) -> Tensor:
        """Scaled embeddings (..., d) of item numbers (...); arbitrary where a number is negative."""
        scale: float = self.config.dim**0.5
        return self.lookup(ids.clamp(min=0)) * scale

    def _read(self, history: Batch) -> tuple[Tensor, list[KVCache]]:
        """The short history's embeddings (B, T, d), and its cache in each block."""
        x = self._embed(history.items)
        return x, self.backbone(x)[1]

    def _users(self, x: Tensor, history: Batch, visible: Tensor, caches: list[KVCache]) -> Tensor:
        """User vectors (B, M, d) after the first `visible` (B, M) items of the history."""
        pools = [prefix_means(x, which, visible) for which in (history.valid, history.feedback)]
        outputs = self.backbone.join(self.query_token(torch.cat(pools, -1)), visible, caches)
        users: Tensor = F.normalize(outputs, dim=-1) / self.config.temperature
        return users


def _infonce(outputs: Tensor, candidates: Tensor) -> Tensor:
    """Cross-entropy of the first candidate of each row, (R, C); a candidate of -1 is left out."""
    logits = outputs.masked_fill(candidates < 0, float("-inf"))
    return F.cross_entropy(logits, logits.new_zeros(len(logits), dtype=torch.int64))
