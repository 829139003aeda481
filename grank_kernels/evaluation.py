"""HR@k and NDCG@k over the full corpus, retrieved by `mips_topk` less what each user has seen."""

from typing import NamedTuple

import torch
from torch import Tensor

from grank_kernels import mips_topk
from grank_kernels.data import Cases, last_items
from grank_kernels.models import GRank


class Metrics(NamedTuple):
    """Means over the users asked.

    Attributes:
        hr: HR@k, the share of users whose held-out item is among the first k.
        ndcg: NDCG@k, `1 / log2(1 + rank)` of the held-out item, ranks from 1; 0 behind rank k.
    """

    hr: float
    ndcg: float


class Recommendations(NamedTuple):
    """Items for B users, best first; -1 where the corpus has no more to offer.

    Attributes:
        first: (B, k1) int64, as the first stage retrieved them.
        second: (B, k1) int64, the same items as the Ranker orders them.
    """

    first: Tensor
    second: Tensor


def hit_and_ndcg(recommended: Tensor, targets: Tensor, k: int) -> Metrics:
    """HR@k and NDCG@k of one target a user, `recommended` (B, >= k) and `targets` (B,) int64."""
    hits = recommended[:, :k] == targets.unsqueeze(1)
    gains = torch.log2(torch.arange(2, hits.shape[1] + 2, device=hits.device)).reciprocal()
    return Metrics(hits.any(1).float().mean().item(), (hits * gains).sum(1).mean().item())


@torch.inference_mode()
def recommend(model: GRank, cases: Cases, k1: int) -> Recommendations:
    """Retrieve the k1 best items of the full corpus that a user has not seen, and re-rank them.

    The whole corpus competes, nothing is sampled.
    """
    length = max(model.generator.history, model.ranker.history)
    history = last_items(cases.items, cases.offsets[:-1], cases.offsets[1:], length)
    users = model.user_vectors(history)
    logits, candidates = mips_topk(users, model.items, k1, exclude=(cases.offsets, cases.items))
    order = model.rank(history, users, candidates, logits).argsort(dim=1, descending=True, stable=True)
    return Recommendations(candidates, candidates.gather(1, order))


def most_popular(cases: Cases, train_items: Tensor, num_items: int, k: int) -> Tensor:
    """The k items with the most training interactions that a user has not seen, (B, k) int64.

    Also an inner-product search: every item is its count, every user the number one.
    """
    counts = torch.bincount(train_items, minlength=num_items).float().unsqueeze(1)
    ones = torch.ones(len(cases.targets), 1)
    return mips_topk(ones, counts, k, exclude=(cases.offsets, cases.items)).indices
