"""Metrics over the full corpus: `mips_topk` searches every item outside the user's history, none is sampled."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from grank_kernels.distributed.sharded_table import ShardedItemTable
from grank_kernels.mips_topk import TopK, mips_topk
from grank_kernels.recommender.data import Batch, Cases, Histories
from grank_kernels.recommender.models.recommender import Recommender

DEPTH = 2500
"""Length of the lists that MRR is computed from, as in HSTU's published evaluation."""


# ---- metrics of given lists ----


def metrics(recommended: Tensor, targets: Histories, ks: Sequence[int]) -> dict[str, float]:
    """HR@k, Recall@k, NDCG@k and MRR, means over the users.

    With G the set of a user's targets: HR@k is whether any of G is among the first k; Recall@k the share of G that is;
    NDCG@k the sum of `1 / log2(1 + rank)` over G in the first k, ranks from 1, over the largest such sum, which has
    `min(|G|, k)` terms; MRR is 1 over the rank of the first of G, 0 if it is not in the list. A target that occurs
    twice counts once. With one target a user HR and Recall are equal.

    Args:
        recommended: (B, K) int64, best item first, no item twice, padded with -1.
        targets: B lists of items, one item or more each.
        ks: cuts, each in [1, K].

    Returns:
        `{"hr@10": ..., "recall@10": ..., "ndcg@10": ..., ..., "mrr": ...}`; NaN for B = 0.

    Raises:
        ValueError: a k outside [1, K], an item twice in a list, a user without a target, or different numbers of lists
            and users.
    """
    B, K = recommended.shape
    if not ks or min(ks) < 1 or max(ks) > K:
        raise ValueError(f"ks must be one or more cuts from 1 to {K}, the length of the lists, got {list(ks)}")
    if len(targets) != B:
        raise ValueError(f"recommended and targets must have as many users, got {B} and {len(targets)}")
    if B and int(targets.lengths.min()) < 1:
        raise ValueError("targets must have at least one item for every user, got none for some")
    parts = []
    for rows in torch.split(torch.arange(B), 4096):
        ordered = recommended[rows].sort(1).values
        if bool(((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)).any()):
            raise ValueError("recommended must not have an item twice in a list")
        parts.append(metrics_of_users(recommended[rows], targets.select(rows), ks))
    return {name: torch.cat([part[name] for part in parts]).mean().item() for name in parts[0]}


def metrics_of_users(recommended: Tensor, targets: Histories, ks: Sequence[int]) -> dict[str, Tensor]:
    """`metrics` of each of B users, (B,) float64 each, without the checks. Temporaries take several times the lists."""
    B, K = recommended.shape
    width = 1 + max((int(x.max()) for x in (recommended, targets.items) if x.numel()), default=0)
    wanted = torch.unique(targets.users * width + targets.items)
    counts = torch.bincount(wanted // width, minlength=B)
    rows = torch.arange(B).unsqueeze(1)
    hits = torch.isin(recommended + rows * width, wanted) & (recommended >= 0)
    gains = torch.log2(torch.arange(2, K + 2).double()).reciprocal()
    ideal = gains.cumsum(0)
    found = hits.double()
    values = {}
    for k in ks:
        first = found[:, :k]
        values[f"hr@{k}"] = first.amax(1)
        values[f"recall@{k}"] = first.sum(1) / counts
        values[f"ndcg@{k}"] = (first * gains[:k]).sum(1) / ideal[counts.clamp(max=k) - 1]
    values["mrr"] = (found / torch.arange(1, K + 1)).amax(1)
    return values


class MeanMetrics:
    """Means over users and their standard errors, accumulated batch by batch in constant memory.

    Attributes:
        users: number of users so far.
    """

    def __init__(self) -> None:
        self.users = 0
        self._sums: dict[str, float] = {}
        self._squares: dict[str, float] = {}

    def add(self, values: Mapping[str, Tensor]) -> None:
        """Add a batch of users, (B,) float64 for each metric, as `metrics_of_users` returns them."""
        self.users += len(next(iter(values.values())))
        for name, x in values.items():
            self._sums[name] = self._sums.get(name, 0.0) + float(x.sum())
            self._squares[name] = self._squares.get(name, 0.0) + float(x.square().sum())

    def means(self) -> dict[str, float]:
        """The mean of every metric."""
        return {name: total / self.users for name, total in self._sums.items()}

    def standard_errors(self) -> dict[str, float | None]:
        """The standard error of every mean, `sample deviation / sqrt(users)`; None for fewer than two users."""
        n = self.users
        if n < 2:
            return dict.fromkeys(self._sums)
        variances = {name: self._squares[name] / n - mean**2 for name, mean in self.means().items()}
        return {name: (max(variance, 0.0) / (n - 1)) ** 0.5 for name, variance in variances.items()}


# ---- lists of a model ----


@dataclass(frozen=True)
class Recommendations:
    """Items for B users, best first; -1 where the corpus has no more items.

    Attributes:
        retrieved: (B, k) int64, ordered by inner product.
        ranked: (B, k) int64, the same items ordered by the second stage; None for a model without one.
    """

    retrieved: Tensor
    ranked: Tensor | None


@torch.no_grad()
def recommend(
    model: Recommender,
    cases: Cases,
    k: int,
    *,
    rank: bool = True,
    batch_size: int = 256,
    allow: Tensor | None = None,
) -> Recommendations:
    """Retrieve the k best items of the full corpus outside each user's history, and rank them if the model can.

    Users without a history get the most popular items if the model `needs_history`; the second stage leaves these.

    Args:
        model: in evaluation mode.
        cases: cases to recommend for; B = `len(cases)` lists of k items are held in memory.
        k: length of the lists.
        rank: run the second stage.
        batch_size: number of users at a time.
        allow: (N,) bool: items that may be recommended; None for all.
    """
    retrieved, ranked = [], []
    for part in _retrieved(model, model.searchable(), cases, k, batch_size, allow):
        retrieved.append(part.found.indices)
        if rank and model.ranks:
            ranked.append(_ranked(model, part, k))
    empty = torch.empty(0, k, dtype=torch.int64)
    return Recommendations(torch.cat(retrieved or [empty]), torch.cat(ranked) if ranked else None)


@torch.no_grad()
def evaluate_model(
    model: Recommender,
    cases: Cases,
    ks: Sequence[int],
    *,
    k1: Sequence[int] = (),
    depth: int = DEPTH,
    batch_size: int = 256,
    allow: Tensor | None = None,
    each: Callable[[dict[str, MeanMetrics]], None] | None = None,
) -> dict[str, MeanMetrics]:
    """Metrics of a model in one pass over the cases; memory does not grow with their number.

    Args:
        model: in evaluation mode.
        cases: one case or more.
        ks: cuts; one above the number of items takes the whole list.
        k1: numbers of retrieved items that the second stage ranks; without effect on a model that does not rank.
        depth: length of the retrieved lists; at most the number of items and at least the largest k count.
        batch_size: number of users at a time.
        allow: (N,) bool: items that may be recommended; None for all.
        each: called after every batch with the sums so far.

    Returns:
        `{"retrieved": ..., "ranked_<k1>": ...}`, where a ranked list has only the cuts of at most k1.

    Raises:
        ValueError: there are no cases, or no cuts.
    """
    if not len(cases) or not ks:
        raise ValueError(f"cases and ks must not be empty, got {len(cases)} cases and {len(ks)} cuts")
    if not model.ranks:
        k1 = ()
    cuts = {f"ranked_{count}": [k for k in ks if k <= count] for count in k1}
    sums = {name: MeanMetrics() for name in ("retrieved", *cuts)}
    items = model.searchable()
    depth = max([min(depth, len(items)), *ks])
    for part in _retrieved(model, items, cases, max([depth, *k1]), batch_size, allow):
        targets = cases.targets.select(part.rows)
        sums["retrieved"].add(metrics_of_users(part.found.indices[:, :depth], targets, ks))
        for count in k1:
            name = f"ranked_{count}"
            sums[name].add(metrics_of_users(_ranked(model, part, count), targets, cuts[name]))
        if each is not None:
            each(sums)
    return sums


class _Part(NamedTuple):
    """A batch of cases after retrieval.

    Attributes:
        rows: (B,) int64, numbers of the cases.
        batch: their padded histories.
        users: (B, d) user vectors.
        found: (B, k) retrieved items.
        popular: (B,) bool: `found` has the most popular items, since the history is empty.
    """

    rows: Tensor
    batch: Batch
    users: Tensor
    found: TopK
    popular: Tensor


def _retrieved(
    model: Recommender,
    items: Tensor | ShardedItemTable,
    cases: Cases,
    k: int,
    batch_size: int,
    allow: Tensor | None = None,
) -> Iterator[_Part]:
    """The k best items of the cases, batch by batch."""
    for rows in torch.split(torch.arange(len(cases)), batch_size):
        histories = cases.histories.select(rows)
        batch = histories.pad(model.history)
        users = model.user_vectors(batch)
        found = mips_topk(users, items, k, exclude=(histories.offsets, histories.items), allow=allow)
        yield _Part(rows, batch, users, *model.with_fallback(found, histories.lengths, allow=allow))


def _ranked(model: Recommender, part: _Part, k1: int) -> Tensor:
    """The best k1 retrieved items (B, k1) in the order of the second stage; equal scores keep the retrieval's order."""
    values, indices = part.found.values[:, :k1], part.found.indices[:, :k1]
    scores = model.rank(part.batch, part.users, indices, values)
    scores = values.where(part.popular.unsqueeze(1), scores)
    return indices.gather(1, scores.argsort(dim=1, descending=True, stable=True))


@torch.inference_mode()
def feedback_auc(model: Recommender, cases: Cases, *, batch_size: int = 256) -> float:
    """AUC of the second stage's scores of the targets, for their feedback, over all users.

    UniGRF's ranking metric (arXiv 2504.16454, section 4.1). Holds one score for each target.

    Raises:
        ImportError: torchmetrics is not installed.
        ValueError: the model does not rank, or all targets have the same feedback.
    """
    from torchmetrics.functional.classification import binary_auroc  # exact, ties included

    if not model.ranks:
        raise ValueError("model must rank for an AUC, got one that only retrieves")
    feedback = cases.targets.feedback
    if len(feedback) == 0 or bool(feedback.all()) or not bool(feedback.any()):
        raise ValueError("cases must hold targets of positive and of negative feedback for an AUC, got one kind only")
    scores = []
    for rows in torch.split(torch.arange(len(cases)), batch_size):
        part = cases.select(rows)
        batch, targets = part.histories.pad(model.history), part.targets.pad()
        users = model.user_vectors(batch)
        found = model.rank(batch, users, targets.items, torch.zeros(targets.items.shape))
        scores.append(found[targets.valid])
    return float(binary_auroc(torch.cat(scores), feedback.long()))
