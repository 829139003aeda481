"""UniGRF (arXiv 2504.16454): retrieval and ranking in one generative model."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from grank_kernels.recommender.data.histories import Batch
from grank_kernels.recommender.models.blocks import BLOCKS, Backbone, Memory
from grank_kernels.recommender.models.corpus import Corpus, average
from grank_kernels.recommender.models.embedding_model import SOFTMAXES, EmbeddingModel
from grank_kernels.recommender.models.recommender import at_newest
from grank_kernels.recommender.models.targets import until
from grank_kernels.recommender.settings import Settings, takes


@dataclass(frozen=True)
class UniGRFConfig(Settings):
    """Settings of UniGRF. The paper publishes none of its values; these are ours.

    Attributes:
        backbone: "hstu" or "llama", the paper's two.
        dim: width of item and user vectors.
        blocks: attention blocks.
        heads: heads of each.
        history: items that the model reads, two tokens each.
        dropout: of inputs and outputs of blocks.
        temperature: user and item vectors are normalised, and logits are their products over this.
        softmax: of retrieval, over the "corpus", or a "batch" as a sample of it; see `EmbeddingModel`.
        retrieval: train the next item.
        ranking: train the feedback.
        enhancer: train retrieval on what ranking thinks of its candidates (section 3.3).
        weighter: weigh the two tasks by how fast they converge (section 3.4).
        ranking_weight: of ranking's loss, where retrieval's has 1; the weighter, which follows ratios, does not see it.
        enhancer_after: steps before the enhancer begins; until then ranking has little to say.
        enhancer_moments: moments of each window that it looks at.
        enhancer_pool: the best candidates of retrieval that ranking judges at each moment.
        hard_negatives: how many of them, by the gap between the two scores, become hard negatives (the paper's m).
        hard_weight: how many times each of these counts in the softmax.
        favourite: from which ranking score on a candidate becomes an extra positive (the paper's alpha).
        favourite_weight: how much of the label all extra positives share; the rest stays with the target.
        enhancer_weight: of the loss at these moments, where the loss over all moments has 1.
        weighter_interval: steps over which losses are averaged before two averages are compared.
        weighter_temperature: 1 follows the ratio of the losses closely, a large one weighs the tasks alike.
    """

    backbone: str = takes("hstu", choices=tuple(BLOCKS))
    dim: int = takes(64, least=1)
    blocks: int = takes(2, least=1)
    heads: int = takes(1, least=1)
    history: int = takes(200, least=1)
    dropout: float = takes(0.2, least=0, below=1)
    temperature: float = takes(0.05, above=0)
    softmax: str = takes("corpus", choices=SOFTMAXES)
    retrieval: bool = True
    ranking: bool = True
    enhancer: bool = True
    weighter: bool = True
    ranking_weight: float = takes(1.0, above=0)
    enhancer_after: int = takes(1000, least=0)
    enhancer_moments: int = takes(4, least=1)
    enhancer_pool: int = takes(32, least=1)
    hard_negatives: int = takes(8, least=0)
    hard_weight: float = takes(4.0, above=0)
    favourite: float = takes(0.9, least=0, most=1)
    favourite_weight: float = takes(0.1, least=0, below=1)
    enhancer_weight: float = takes(0.2, least=0)
    weighter_interval: int = takes(100, least=1)
    weighter_temperature: float = takes(1.0, above=0)


class UniGRF(EmbeddingModel):
    """One backbone over the tokens `i1, b1, ..., in, bn` of items and feedback (section 3.2).

    The output at an item is the expected feedback on it: ranking, binary cross-entropy. The output at a feedback is a
    query for the next item: retrieval, softmax over the corpus. Serving ranks candidates by feeding each as the next
    item token, all of them in one pass, as the side stream of the blocks.

    A feedback token is the sum of a vector of the feedback and of the item's, so that its output knows the item without
    an attention step; the paper's is not described further.
    """

    needs_history = True

    def __init__(self, num_items: int, config: UniGRFConfig) -> None:
        super().__init__(num_items, config.dim, softmax=config.softmax)
        if not (config.retrieval or config.ranking):
            raise ValueError("retrieval or ranking must be True, got False for both")
        if config.enhancer and not (config.retrieval and config.ranking):
            raise ValueError("enhancer needs both retrieval and ranking, got one of them switched off")
        self.config = config
        self.history = config.history
        self.longest_window = config.history + 1
        self.ranks = config.ranking
        self.feedback = nn.Parameter(0.02 * torch.randn(2, config.dim))
        self.backbone = Backbone(
            config.backbone,
            dim=config.dim,
            blocks=config.blocks,
            heads=config.heads,
            dropout=config.dropout,
            length=2 * (config.history + 1),
        )
        self.score = nn.Sequential(nn.Linear(config.dim, config.dim), nn.GELU(), nn.Linear(config.dim, 1))
        self.weighter = _Weighter(2, config.weighter_interval, config.weighter_temperature)
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self.steps: Tensor

    def user_vectors(self, batch: Batch) -> Tensor:
        """(B, d) float32: the queries, from up to `history` items; of norm 1 / temperature, 0 for an empty history."""
        return self._queries(at_newest(self._read(batch)[0][:, 1::2], batch))

    def rank(self, batch: Batch, users: Tensor, candidates: Tensor, logits: Tensor) -> Tensor:
        """Logits of positive feedback, (B, C); see `Recommender.rank`. Neither `users` nor `logits` is used."""
        visible = (2 * batch.lengths).unsqueeze(1).expand(candidates.shape)
        _, memories = self._read(batch)
        liked = self._feedback_logits(candidates.clamp(min=0), visible, memories)
        return liked.masked_fill(candidates < 0, -torch.inf)

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """Cross-entropy of the next item at every feedback; of the feedback at every item, binary and weighted."""
        outputs, memories = self._read(batch)
        losses = {}
        if self.config.retrieval:
            asked, queries = batch.valid[:, 1:], self._queries(outputs[:, 1:-1:2])
            losses["retrieval"], corpus = self.retrieval_loss(
                queries[asked], batch.items[:, 1:][asked], batch.items, asked
            )
            if self.config.enhancer and self.training:
                self.steps += 1
                if self.steps > self.config.enhancer_after:
                    enhanced = self.config.enhancer_weight * self._enhanced(batch, queries, corpus, memories)
                    losses["enhanced"] = self.joint_mean(enhanced, len(batch.items))
        if self.config.ranking:
            at_items = self.score(outputs[:, ::2][batch.valid]).squeeze(-1)
            loss = F.binary_cross_entropy_with_logits(at_items, batch.feedback[batch.valid].float())
            losses["ranking"] = self.joint_mean(self.config.ranking_weight * loss, len(at_items))
        return losses

    def objective(self, losses: dict[str, Tensor]) -> Tensor:
        """The tasks' losses under the weights of the weighter (section 3.4), or their sum."""
        if not (self.config.weighter and self.config.retrieval and self.config.ranking):
            return super().objective(losses)
        retrieval = losses["retrieval"] + losses.get("enhanced", 0.0)
        own = torch.stack([retrieval, losses["ranking"]])
        weighed: Tensor = self.weighter(own, average(own.detach(), self.group))
        return weighed

    def _read(self, batch: Batch) -> tuple[Tensor, list[Memory]]:
        """The output at every token (B, 2 L, d), and the tokens' memory in each block."""
        read: tuple[Tensor, list[Memory]] = self.backbone(self._tokens(batch))
        return read

    def _tokens(self, batch: Batch) -> Tensor:
        """(B, 2 L, d): item, feedback, item, feedback, ..."""
        items = self._item_tokens(batch.items.clamp(min=0))
        feedback = items + F.embedding(batch.feedback.long(), self.feedback) * self.config.dim**0.5
        tokens: Tensor = torch.stack([items, feedback], 2).flatten(1, 2)
        return tokens

    def _item_tokens(self, items: Tensor) -> Tensor:
        tokens: Tensor = self.rows_of(items) * self.config.dim**0.5
        return tokens

    def _queries(self, outputs: Tensor) -> Tensor:
        return F.normalize(outputs, dim=-1) / self.config.temperature

    def _feedback_logits(self, candidates: Tensor, visible: Tensor, memories: list[Memory]) -> Tensor:
        """Logits of positive feedback on candidates (B, C), each behind the first `visible` (B, C) tokens."""
        outputs = self.backbone.join(self._item_tokens(candidates), visible, memories)
        logits: Tensor = self.score(outputs).squeeze(-1)
        return logits

    def _enhanced(self, batch: Batch, queries: Tensor, corpus: Corpus, memories: list[Memory]) -> Tensor:
        """The ranking-driven enhancer (section 3.3): retrieval learns from what ranking thinks of its candidates.

        At some moments of every window, ranking judges the items that retrieval would return. Those it is sure of
        become extra positives, which share a part of the label. Among the others, those with the largest gap between
        the two scores, min-max normalised in the pool, become hard negatives, liked by retrieval and disliked by
        ranking. In the paper they join the drawn negatives; where the softmax runs over the corpus all items are
        negatives already, so they count several times. Ranking judges by the pass that training makes anyway, dropout
        included: a second one without would take as long again.
        """
        config, M, columns = self.config, len(corpus.vectors), corpus.columns(batch.items)
        B, moments = len(batch.items), config.enhancer_moments
        asked = batch.lengths - 1  # moments with a next item; windows have at least two items
        at = (torch.rand(B, moments, device=asked.device) * asked.unsqueeze(1)).long()
        target = columns.gather(1, at + 1)
        query = queries.gather(1, at.unsqueeze(-1).expand(-1, -1, queries.shape[-1]))
        past = until(columns.repeat_interleave(moments, 0), (at + 1).flatten(), M).view(B, moments, -1)
        seen = torch.zeros(B, moments, M + 1, dtype=torch.bool, device=at.device)
        seen = seen.scatter(2, past, True)[..., :M].scatter(2, target.unsqueeze(-1), False)
        logits = corpus.logits(query, target).masked_fill(seen, -torch.inf)
        with torch.no_grad():
            others = logits.scatter(2, target.unsqueeze(-1), -torch.inf)
            others = others if corpus.bias is None else others - corpus.bias  # as retrieval will score them
            scores, pool = others.topk(min(config.enhancer_pool, M))
            visible = (2 * (at + 1)).unsqueeze(-1).expand(pool.shape)
            candidates = corpus.items(pool.flatten(1))
            liked = self._feedback_logits(candidates, visible.flatten(1), memories).sigmoid().view(pool.shape)
            scores = scores.where(scores > -torch.inf, 0.0)  # of a corpus that ran out
            low, high = scores.amin(-1, keepdim=True), scores.amax(-1, keepdim=True)
            favourite = (liked > config.favourite) & others.gather(2, pool).isfinite()
            gap = ((scores - low) / (high - low + 1e-6) - liked).masked_fill(favourite, -torch.inf)
            hard = pool.gather(2, gap.topk(min(config.hard_negatives, pool.shape[2])).indices)
            extra = torch.zeros_like(logits).scatter(2, hard, math.log(config.hard_weight))
            extra.scatter_(2, pool, extra.gather(2, pool).masked_fill(favourite, 0.0))
            share = config.favourite_weight * favourite.to(logits.dtype) / favourite.sum(-1, keepdim=True).clamp(min=1)
            label = torch.zeros_like(logits).scatter(2, pool, share)
            label.scatter_(2, target.unsqueeze(-1), 1 - share.sum(-1, keepdim=True))
        negative = (logits + extra).logsumexp(-1, keepdim=True) - logits
        return (label * negative.masked_fill(seen, 0.0)).sum(-1).mean()


class _Weighter(nn.Module):
    """UniGRF's gradient-guided adaptive weighter (section 3.4): the task that converges more slowly weighs more.

    Weights are `n softmax(r / T)` with r the ratio of each task's mean loss over the last interval to the one before,
    as in dynamic weight averaging (arXiv 1803.10704), whose form we take since the paper's is not published. They carry
    no gradient, are 1 until two intervals have passed, and are part of a checkpoint.
    """

    def __init__(self, tasks: int, interval: int, temperature: float) -> None:
        super().__init__()
        self.interval, self.temperature = interval, temperature
        for name in ("weights", "total", "previous"):
            self.register_buffer(name, torch.ones(tasks) if name == "weights" else torch.zeros(tasks))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))
        self.weights: Tensor
        self.total: Tensor
        self.previous: Tensor
        self.count: Tensor

    def forward(self, losses: Tensor, observed: Tensor) -> Tensor:
        """The weighed sum of losses (tasks,); what is observed are those of all ranks together."""
        if self.training:
            self._observe(observed)
        return (self.weights * losses).sum()

    def _observe(self, losses: Tensor) -> None:
        self.total += losses
        self.count += 1
        if self.count < self.interval:
            return
        mean = self.total / self.count
        if bool((self.previous > 0).all()):
            self.weights = len(losses) * (mean / self.previous / self.temperature).softmax(0)
        self.previous, self.total = mean, torch.zeros_like(mean)
        self.count = torch.zeros_like(self.count)
