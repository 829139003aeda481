import pytest
import torch
from torch import Tensor
from torchmetrics.functional.retrieval import (
    retrieval_hit_rate,
    retrieval_normalized_dcg,
    retrieval_recall,
    retrieval_reciprocal_rank,
)

from grank_kernels.recommender.data import Batch, Cases, Histories
from grank_kernels.recommender.models import Recommender
from grank_kernels.recommender.training.evaluation import feedback_auc, metrics, recommend


class Fixed(Recommender):
    """Vectors that are given; a second stage that likes small ids."""

    def __init__(self, users: Tensor, items: Tensor) -> None:
        super().__init__()
        self.users, self.items, self.history, self.ranks = users, items, 3, True

    def item_vectors(self) -> Tensor:
        return self.items

    def user_vectors(self, batch: Batch) -> Tensor:
        return self.users[batch.items[:, 0]]

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        raise NotImplementedError

    def rank(self, batch: Batch, users: Tensor, candidates: Tensor, logits: Tensor) -> Tensor:
        return (-candidates.float()).masked_fill(candidates < 0, -torch.inf)


@pytest.mark.parametrize("most", [1, 6])
def test_metrics_agree_with_torchmetrics(most: int) -> None:
    generator = torch.Generator().manual_seed(most)
    B, N, ks = 40, 120, (1, 5, 10, 50, 120)
    recommended = torch.rand(B, N, generator=generator).argsort(1)
    targets = [torch.randperm(N, generator=generator)[: 1 + user % most].tolist() for user in range(B)]
    got = metrics(recommended, Histories.from_lists(targets), ks)
    scores = torch.arange(N, 0, -1).float() / N
    relevant = [torch.isin(recommended[user], torch.tensor(targets[user])) for user in range(B)]
    for k in ks:
        for name, oracle in (
            ("hr", retrieval_hit_rate),
            ("recall", retrieval_recall),
            ("ndcg", retrieval_normalized_dcg),
        ):
            want = torch.stack([oracle(scores, own, top_k=k) for own in relevant]).mean().item()
            assert got[f"{name}@{k}"] == pytest.approx(want, abs=1e-6)
    want = torch.stack([retrieval_reciprocal_rank(scores, own) for own in relevant]).mean().item()
    assert got["mrr"] == pytest.approx(want, abs=1e-6)


def test_metrics_by_hand() -> None:
    recommended = torch.tensor([[7, 1, 2], [1, 7, 2], [1, 2, 7], [-1, -1, -1]])
    got = metrics(recommended, Histories.from_lists([[7], [7], [7], [7]]), (2,))
    assert got["hr@2"] == got["recall@2"] == 0.5
    assert got["ndcg@2"] == pytest.approx((1 + 1 / torch.log2(torch.tensor(3.0)).item()) / 4)
    assert got["mrr"] == pytest.approx((1 + 1 / 2 + 1 / 3) / 4)


def test_metrics_refuse_what_has_no_answer() -> None:
    lists = torch.zeros(2, 5, dtype=torch.long)
    with pytest.raises(ValueError, match="ks must be at most the length of the lists, got 6 of 5"):
        metrics(lists, Histories.from_lists([[1], [2]]), (6,))
    with pytest.raises(ValueError, match="as many users, got 2 and 1"):
        metrics(lists, Histories.from_lists([[1]]), (1,))
    with pytest.raises(ValueError, match="at least one item for every user"):
        metrics(lists, Histories.from_lists([[1], []]), (1,))


def test_recommend_searches_the_whole_corpus_less_what_was_seen_and_ranks() -> None:
    items = torch.randn(30, 4)
    users = torch.randn(30, 4)
    seen = [[3, 4, 5, 6], [1], [2, 9]]
    cases = Cases(torch.arange(3), Histories.from_lists(seen), Histories.from_lists([[0]] * 3))
    found = recommend(Fixed(users, items), cases, 28, batch_size=2)
    assert found.ranked is not None
    for user, own in enumerate(seen):
        scores = items @ users[own[-3:][0]]  # `Fixed` reads three items and takes the first
        scores[own] = -torch.inf
        left = 30 - len(own)
        order = scores.argsort(descending=True)[: min(left, 28)]
        assert found.retrieved[user, : len(order)].tolist() == order.tolist()
        assert (found.retrieved[user, len(order) :] == -1).all()
        assert found.ranked[user, : len(order)].tolist() == sorted(order.tolist())
    assert recommend(Fixed(users, items), cases, 5, rank=False).ranked is None
    assert recommend(Fixed(users, items), cases.select(torch.arange(0)), 5).retrieved.shape == (0, 5)


def test_auc_by_hand_and_its_refusals() -> None:
    model = Fixed(torch.randn(9, 4), torch.randn(9, 4))
    histories = Histories.from_lists([[1], [2], [3], [4]])

    def cases(liked: list[bool]) -> Cases:
        targets = Histories.from_lists([[0], [5], [6], [8]], [[own] for own in liked])
        return Cases(torch.arange(4), histories, targets)

    assert feedback_auc(model, cases([True, False, True, False]), batch_size=3) == pytest.approx(3 / 4)
    with pytest.raises(ValueError, match="one kind only"):
        feedback_auc(model, cases([True] * 4))
    model.ranks = False
    with pytest.raises(ValueError, match="model must rank for an AUC"):
        feedback_auc(model, cases([True, False, True, False]))
