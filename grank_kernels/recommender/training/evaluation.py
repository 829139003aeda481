"""Metrics over the full corpus, retrieved by `mips_topk` less what each user has seen; nothing is sampled."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from grank_kernels import mips_topk
from grank_kernels.recommender.data import Cases, Histories
from grank_kernels.recommender.models.recommender import Recommender

DEPTH = 2500
"""Places of a list that count for MRR, as in HSTU's published evaluation."""


def metrics(recommended: Tensor, targets: Histories, ks: Sequence[int]) -> dict[str, float]:
    """HR@k, Recall@k, NDCG@k and MRR, means over the users.

    With G the targets of a user: HR@k is whether any of G is among the first k; Recall@k the share of G that is; NDCG@k
    the sum of `1 / log2(1 + rank)` over G in the first k, ranks from 1, over the largest such sum, which has `min(|G|,
    k)` terms; MRR is 1 over the rank of the first of G, 0 if it is not in the list. With one target a user HR and
    Recall are the same.

    Args:
        recommended: (B, K) int64, best first, -1 behind the last.
        targets: of B users, at least one each.
        ks: the cuts, each at most K.

    Returns:
        `{"hr@10": ..., "recall@10": ..., "ndcg@10": ..., ..., "mrr": ...}`.

    Raises:
        ValueError: a k above K, a user without a target, or lists and targets of different numbers of users.
    """
    B, K = recommended.shape
    if max(ks) > K:
        raise ValueError(f"ks must be at most the length of the lists, got {max(ks)} of {K}")
    if len(targets) != B:
        raise ValueError(f"recommended and targets must have as many users, got {B} and {len(targets)}")
    counts = targets.lengths
    if B and int(counts.min()) < 1:
        raise ValueError("targets must have at least one item for every user, got none for some")
    parts = [
        metrics_of_users(recommended[rows], targets.select(rows), ks) for rows in torch.split(torch.arange(B), 4096)
    ]
    return {name: torch.cat([part[name] for part in parts]).mean().item() for name in parts[0]}


def metrics_of_users(recommended: Tensor, targets: Histories, ks: Sequence[int]) -> dict[str, Tensor]:
    """`metrics` of each of B users, (B,) float64 each: its temporaries are several times the size of the lists."""
    B, K = recommended.shape
    counts = targets.lengths
    width = 1 + max(int(recommended.max()) if recommended.numel() else 0, int(targets.items.max()) if B else 0)
    rows = torch.arange(B).unsqueeze(1)
    hits = torch.isin(recommended + rows * width, targets.items + targets.users * width) & (recommended >= 0)
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


@dataclass(frozen=True)
class Recommendations:
    """Items for B users, best first; -1 where the corpus has no more to offer.

    Attributes:
        retrieved: (B, k) int64, in the order of the inner products.
        ranked: (B, k) int64, the same items as the second stage orders them; None for a model without one.
    """

    retrieved: Tensor
    ranked: Tensor | None


@torch.no_grad()
def recommend(model: Recommender, cases: Cases, k: int, *, rank: bool = True, batch_size: int = 256) -> Recommendations:
    """Retrieve the k best items of the full corpus that each user has not seen, and re-rank them if the model can.

    Args:
        model: in evaluation mode.
        cases: whom to recommend to.
        k: length of the lists.
        rank: run the second stage.
        batch_size: users at a time.
    """
    items = model.searchable()
    retrieved, ranked = [], []
    for rows in torch.split(torch.arange(len(cases)), batch_size):
        histories = cases.histories.select(rows)
        batch = histories.pad(model.history)
        users = model.user_vectors(batch)
        logits, found = mips_topk(users, items, k, exclude=(histories.offsets, histories.items))
        retrieved.append(found)
        if rank and model.ranks:
            scores = model.rank(batch, users, found, logits)
            ranked.append(found.gather(1, scores.argsort(dim=1, descending=True, stable=True)))
    empty = torch.empty(0, k, dtype=torch.int64)
    return Recommendations(torch.cat(retrieved or [empty]), torch.cat(ranked) if ranked else None)


@torch.inference_mode()
def feedback_auc(model: Recommender, cases: Cases, *, batch_size: int = 256) -> float:
    """AUC of the second stage's scores of the targets themselves, for the feedback they got, over all users.

    UniGRF's ranking metric (arXiv 2504.16454, section 4.1).

    Raises:
        ValueError: the model does not rank, or all targets got the same feedback.
    """
    if not model.ranks:
        raise ValueError("model must rank for an AUC, got one that only retrieves")
    feedback = cases.targets.feedback
    if len(feedback) == 0 or bool(feedback.all()) or not bool(feedback.any()):
        raise ValueError("cases must hold targets of positive and of negative feedback for an AUC, got one kind only")
    from torchmetrics.functional.classification import binary_auroc  # ties as the field counts them

    scores = []
    for rows in torch.split(torch.arange(len(cases)), batch_size):
        part = cases.select(rows)
        batch, targets = part.histories.pad(model.history), part.targets.pad()
        users = model.user_vectors(batch)
        found = model.rank(batch, users, targets.items, torch.zeros(targets.items.shape))
        scores.append(found[targets.valid])
    return float(binary_auroc(torch.cat(scores), feedback.long()))
