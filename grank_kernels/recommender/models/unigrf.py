"""UniGRF (arXiv 2504.16454): retrieval and ranking in one generative model."""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from grank_kernels.recommender.data.histories import Batch
from grank_kernels.recommender.models.blocks import BLOCKS, Backbone, KVCache
from grank_kernels.recommender.models.corpus import Corpus, all_reduce_mean
from grank_kernels.recommender.models.embedding_model import SOFTMAXES, EmbeddingModel
from grank_kernels.recommender.models.recommender import newest_outputs
from grank_kernels.recommender.models.targets import truncate
from grank_kernels.recommender.settings import Settings, takes


@dataclass(frozen=True)
class UniGRFConfig(Settings):
    """Settings of a `UniGRF`. The paper publishes none of its values; these are ours.

    Attributes:
        backbone: "hstu" or "llama", the paper's two, or "transformer".
        dim: width of item and user vectors.
        blocks: number of attention blocks.
        heads: number of heads of each block.
        history: number of newest items that the model reads, two tokens each.
        dropout: dropout rate of the blocks' inputs and outputs.
        temperature: logits are inner products of normalised user and item vectors over this.
        softmax: of retrieval: "corpus" for all items, "batch" for a sample of them; see `EmbeddingModel`.
        retrieval: train the prediction of the next item.
        ranking: train the prediction of the feedback.
        enhancer: train retrieval on the ranking's scores of its candidates (section 3.3).
        weighter: weight the two tasks by their rates of convergence (section 3.4).
        ranking_weight: weight of the ranking's loss; retrieval's is 1. The weighter compares ratios and is unaffected.
        enhancer_after: number of steps before the enhancer starts; an untrained ranking carries no information.
        enhancer_moments: number of positions of each window that the enhancer uses.
        enhancer_pool: number of retrieval's best candidates that ranking scores at each position.
        hard_negatives: number of them that become hard negatives, by the gap between the two scores (the paper's m).
        hard_weight: factor by which a hard negative counts in the softmax.
        favourite: ranking score above which a candidate becomes an extra positive (the paper's alpha).
        favourite_weight: share of the label that all extra positives split; the target keeps the rest.
        enhancer_weight: weight of the enhancer's loss; the loss over all positions has weight 1.
        weighter_interval: number of steps in each mean of losses that the weighter compares.
        weighter_temperature: 1 follows the ratio of the losses closely; a large value weights the tasks equally.
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


class _Moments(NamedTuple):
    """Drawn positions of B training windows, K of each, which the enhancer trains; M is the number of columns.

    Attributes:
        at: (B, K) int64, the item before each position.
        target: (B, K) int64, the column of the item after it.
        logits: (B, K, M), retrieval's logits, `-inf` where `seen`.
        seen: (B, K, M) bool, columns of the items up to the position, except the target.
    """

    at: Tensor
    target: Tensor
    logits: Tensor
    seen: Tensor


class _Pool(NamedTuple):
    """Retrieval's best P candidates at each position, all (B, K, P).

    Attributes:
        columns: int64.
        exists: bool, False where the corpus has fewer than P candidates.
        scores: retrieval's scores, 0 where none exists.
        liked: ranking's probability of positive feedback.
    """

    columns: Tensor
    exists: Tensor
    scores: Tensor
    liked: Tensor


class UniGRF(EmbeddingModel):
    """One backbone over the tokens `i1, b1, ..., in, bn` of items and feedback (section 3.2).

    The output at an item predicts the feedback on it: ranking, binary cross-entropy. The output at a feedback is a
    query for the next item: retrieval, softmax over the corpus. In serving every candidate is ranked as the next item
    token, all of them in one pass through the blocks' path for candidates.

    A feedback token is the sum of a vector of the feedback and the item's vector, so that its output knows the item
    without an attention step; the paper does not describe its token further.
    """

    needs_history = True

    def __init__(self, num_items: int, config: UniGRFConfig) -> None:
        super().__init__(num_items, config.dim, softmax=config.softmax)
        if not (config.retrieval or config.ranking):
            raise ValueError("retrieval or ranking must be True, got False for both")
        if config.enhancer and not (config.retrieval and config.ranking):
            raise ValueError("enhancer needs both retrieval and ranking, got False for one of them")
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
        """(B, d) float32 of norm 1 / temperature, 0 for an empty history; see `Recommender.user_vectors`."""
        return self._queries(newest_outputs(self._read(batch)[0][:, 1::2], batch))

    def rank(self, batch: Batch, users: Tensor, candidates: Tensor, logits: Tensor) -> Tensor:
        """See `Recommender.rank`: logits of positive feedback, which do not depend on `users` and `logits`."""
        visible = (2 * batch.lengths).unsqueeze(1).expand(candidates.shape)
        _, caches = self._read(batch)
        liked = self._feedback_logits(candidates.clamp(min=0), visible, caches)
        return liked.masked_fill(candidates < 0, -torch.inf)

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """Cross-entropy of the next item at every feedback, and binary cross-entropy of the feedback at every item.

        Keys: "retrieval" and "ranking"; in training, after `enhancer_after` steps, also "enhanced".
        """
        outputs, caches = self._read(batch)
        losses = {}
        if self.config.retrieval:
            asked, queries = batch.valid[:, 1:], self._queries(outputs[:, 1:-1:2])
            losses["retrieval"], corpus = self.retrieval_loss(
                queries[asked], batch.items[:, 1:][asked], batch.items, asked
            )
            if self.config.enhancer and self.training:
                self.steps += 1
                if self.steps > self.config.enhancer_after:
                    enhanced = self.config.enhancer_weight * self._enhanced(batch, queries, corpus, caches)
                    losses["enhanced"] = self.joint_mean(enhanced, len(batch.items))
        if self.config.ranking:
            at_items = self.score(outputs[:, ::2][batch.valid]).squeeze(-1)
            loss = F.binary_cross_entropy_with_logits(at_items, batch.feedback[batch.valid].float())
            losses["ranking"] = self.joint_mean(self.config.ranking_weight * loss, len(at_items))
        return losses

    def objective(self, losses: dict[str, Tensor]) -> Tensor:
        """The sum of the tasks' losses, weighted by the weighter (section 3.4) if there is one."""
        if not (self.config.weighter and self.config.retrieval and self.config.ranking):
            return super().objective(losses)
        retrieval = losses["retrieval"] + losses.get("enhanced", 0.0)
        own = torch.stack([retrieval, losses["ranking"]])
        weighed: Tensor = self.weighter(own, all_reduce_mean(own.detach(), self.group))
        return weighed

    def _read(self, batch: Batch) -> tuple[Tensor, list[KVCache]]:
        """The output at every token (B, 2 L, d), and the tokens' cache in each block."""
        read: tuple[Tensor, list[KVCache]] = self.backbone(self._tokens(batch))
        return read

    def _tokens(self, batch: Batch) -> Tensor:
        """(B, 2 L, d): item, feedback, item, feedback, ..."""
        items = self._item_tokens(batch.items.clamp(min=0))
        feedback = items + F.embedding(batch.feedback.long(), self.feedback) * self.config.dim**0.5
        tokens: Tensor = torch.stack([items, feedback], 2).flatten(1, 2)
        return tokens

    def _item_tokens(self, items: Tensor) -> Tensor:
        tokens: Tensor = self.lookup(items) * self.config.dim**0.5
        return tokens

    def _queries(self, outputs: Tensor) -> Tensor:
        return F.normalize(outputs, dim=-1) / self.config.temperature

    def _feedback_logits(self, candidates: Tensor, visible: Tensor, caches: list[KVCache]) -> Tensor:
        """Logits (B, C) of positive feedback on candidates (B, C), each after the first `visible` (B, C) tokens."""
        outputs = self.backbone.join(self._item_tokens(candidates), visible, caches)
        logits: Tensor = self.score(outputs).squeeze(-1)
        return logits

    def _enhanced(self, batch: Batch, queries: Tensor, corpus: Corpus, caches: list[KVCache]) -> Tensor:
        """The loss of the ranking-driven enhancer (section 3.3): retrieval learns from ranking's scores.

        At some positions of every window, ranking scores the items that retrieval would return. Those above `favourite`
        become extra positives, which share a part of the label. The others with the largest gap between the two scores,
        min-max normalised in the pool, become hard negatives: liked by retrieval, disliked by ranking. In the paper
        they join the drawn negatives; with a softmax over the corpus all items are negatives already, so hard ones
        count `hard_weight` times. Ranking scores with dropout, from the caches of the training pass: a second pass
        without dropout would double the time.
        """
        moments = self._moments(batch, queries, corpus)
        with torch.no_grad():
            pool = self._pool(moments, corpus, caches)
            favourite = (pool.liked > self.config.favourite) & pool.exists
            boost = self._hard_negatives(moments.logits, pool, favourite)
            label = self._label(moments, pool, favourite)
        negative = (moments.logits + boost).logsumexp(-1, keepdim=True) - moments.logits
        return (label * negative.masked_fill(moments.seen, 0.0)).sum(-1).mean()

    def _moments(self, batch: Batch, queries: Tensor, corpus: Corpus) -> _Moments:
        """Random positions of every window, with retrieval's logits there."""
        M, columns = len(corpus.vectors), corpus.columns(batch.items)
        B, K = len(batch.items), self.config.enhancer_moments
        asked = batch.lengths - 1  # positions with a next item; windows have at least two items
        at = (torch.rand(B, K, device=asked.device) * asked.unsqueeze(1)).long()
        target = columns.gather(1, at + 1)
        query = queries.gather(1, at.unsqueeze(-1).expand(-1, -1, queries.shape[-1]))
        past = truncate(columns.repeat_interleave(K, 0), (at + 1).flatten(), M).view(B, K, -1)
        seen = torch.zeros(B, K, M + 1, dtype=torch.bool, device=at.device)
        seen = seen.scatter(2, past, True)[..., :M].scatter(2, target.unsqueeze(-1), False)
        return _Moments(at, target, corpus.logits(query, target).masked_fill(seen, -torch.inf), seen)

    def _pool(self, moments: _Moments, corpus: Corpus, caches: list[KVCache]) -> _Pool:
        """Retrieval's best candidates other than the target, and ranking's scores of them."""
        others = moments.logits.scatter(2, moments.target.unsqueeze(-1), -torch.inf)
        others = others if corpus.bias is None else others - corpus.bias  # as retrieval scores them in serving
        scores, columns = others.topk(min(self.config.enhancer_pool, len(corpus.vectors)))
        visible = (2 * (moments.at + 1)).unsqueeze(-1).expand(columns.shape)
        candidates = corpus.items(columns.flatten(1))
        liked = self._feedback_logits(candidates, visible.flatten(1), caches).sigmoid().view(columns.shape)
        exists = others.gather(2, columns).isfinite()
        return _Pool(columns, exists, scores.where(scores > -torch.inf, 0.0), liked)

    def _hard_negatives(self, logits: Tensor, pool: _Pool, favourite: Tensor) -> Tensor:
        """What is added to the logits (B, K, M): `log(hard_weight)` at hard negatives, else 0."""
        low, high = pool.scores.amin(-1, keepdim=True), pool.scores.amax(-1, keepdim=True)
        gap = ((pool.scores - low) / (high - low + 1e-6) - pool.liked).masked_fill(favourite, -torch.inf)
        hard = pool.columns.gather(2, gap.topk(min(self.config.hard_negatives, gap.shape[2])).indices)
        boost = torch.zeros_like(logits).scatter(2, hard, math.log(self.config.hard_weight))
        return boost.scatter_(2, pool.columns, boost.gather(2, pool.columns).masked_fill(favourite, 0.0))

    def _label(self, moments: _Moments, pool: _Pool, favourite: Tensor) -> Tensor:
        """The label (B, K, M), which sums to 1: extra positives share `favourite_weight`, the target has the rest."""
        number = favourite.sum(-1, keepdim=True).clamp(min=1)
        share = self.config.favourite_weight * favourite.to(moments.logits.dtype) / number
        label = torch.zeros_like(moments.logits).scatter(2, pool.columns, share)
        return label.scatter_(2, moments.target.unsqueeze(-1), 1 - share.sum(-1, keepdim=True))


class _Weighter(nn.Module):
    """UniGRF's gradient-guided adaptive weighter (section 3.4): the task that converges more slowly weighs more.

    Weights are `n softmax(r / T)`, where r is the ratio of each task's mean loss over the last interval to the interval
    before. The paper does not publish its formula; this one is dynamic weight averaging's (arXiv 1803.10704). Weights
    carry no gradient, are 1 until two intervals have passed, and are part of a checkpoint.
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
        """The weighted sum of losses (tasks,); `observed` are their means over the ranks, which set the weights."""
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
