import weakref
from typing import Any

import pytest
import torch
from torch import Tensor
from torchmetrics.functional.retrieval import (
    retrieval_hit_rate,
    retrieval_normalized_dcg,
    retrieval_recall,
    retrieval_reciprocal_rank,
)

from grank_kernels.mips_topk import TopK, mips_topk
from grank_kernels.recommender.data import Batch, Cases, Histories
from grank_kernels.recommender.models import Recommender
from grank_kernels.recommender.training import evaluation
from grank_kernels.recommender.training.evaluation import (
    MeanMetrics,
    evaluate_model,
    feedback_auc,
    metrics,
    recommend,
)


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


def test_targets_are_a_set() -> None:
    recommended = torch.tensor([[7, 1, 2, 3], [9, 1, 7, 2]])
    once, again = Histories.from_lists([[7, 1], [7]]), Histories.from_lists([[7, 1, 7, 1, 1], [7, 7]])
    assert metrics(recommended, again, (1, 2, 4)) == metrics(recommended, once, (1, 2, 4))
    perfect = metrics(recommended[:1], Histories.from_lists([[1, 7, 1]]), (2, 4))
    assert perfect == {f"{name}@{k}": 1.0 for k in (2, 4) for name in ("hr", "recall", "ndcg")} | {"mrr": 1.0}


@pytest.mark.parametrize(
    ("lists", "targets", "ks", "message"),
    [
        (
            [[0, 1], [0, 1]],
            [[1], [2]],
            (1, 3),
            r"ks must be .* cuts from 1 to 2, the length of the lists, got \[1, 3\]",
        ),
        ([[0, 1], [0, 1]], [[1], [2]], (0,), r"ks must be .* got \[0\]"),
        ([[0, 1], [0, 1]], [[1], [2]], (), r"ks must be .* got \[\]"),
        ([[0, 1], [0, 1]], [[1]], (1,), "as many users, got 2 and 1"),
        ([[0, 1], [0, 1]], [[1], []], (1,), "at least one item for every user"),
        ([[0, 1], [3, 3]], [[1], [3]], (1,), "recommended must not have an item twice in a list"),
    ],
)
def test_metrics_refuse_what_does_not_fit(
    lists: list[list[int]], targets: list[list[int]], ks: tuple[int, ...], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        metrics(torch.tensor(lists), Histories.from_lists(targets), ks)


def test_means_and_standard_errors_do_not_depend_on_the_batches() -> None:
    values = torch.rand(1000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    sums = MeanMetrics()
    for part in values.split([1, 400, 599]):
        sums.add({"mrr": part})
    assert sums.users == 1000
    assert sums.means()["mrr"] == pytest.approx(values.mean().item(), rel=1e-12)
    assert sums.standard_errors()["mrr"] == pytest.approx(values.std().item() / 1000**0.5, rel=1e-9)


def test_one_user_has_no_standard_error() -> None:
    sums = MeanMetrics()
    sums.add({"mrr": torch.tensor([0.5], dtype=torch.float64)})
    assert sums.means() == {"mrr": 0.5}
    assert sums.standard_errors() == {"mrr": None}


def random_cases(users: int, items: int) -> Cases:
    lengths = torch.randint(1, 6, (users,)).tolist()
    seen = [torch.randperm(items)[:length].tolist() for length in lengths]
    return Cases(
        torch.arange(users), Histories.from_lists(seen), Histories.from_lists([[u % items] for u in range(users)])
    )


@pytest.mark.parametrize("items", [7, 60])
@pytest.mark.parametrize("batch_size", [3, 64])
def test_one_pass_has_the_metrics_of_all_lists(items: int, batch_size: int) -> None:
    torch.manual_seed(0)
    model, cases = Fixed(torch.randn(items, 4), torch.randn(items, 4)), random_cases(40, items)
    got = evaluate_model(model, cases, (1, 5, 10), k1=(5, 20), batch_size=batch_size)
    assert set(got) == {"retrieved", "ranked_5", "ranked_20"}
    lists = recommend(model, cases, max(items, 10))
    assert got["retrieved"].means() == pytest.approx(metrics(lists.retrieved, cases.targets, (1, 5, 10)), rel=1e-12)
    for k1, ks in ((5, (1, 5)), (20, (1, 5, 10))):
        ranked = recommend(model, cases, k1).ranked
        assert ranked is not None
        assert got[f"ranked_{k1}"].means() == pytest.approx(metrics(ranked, cases.targets, ks), rel=1e-12)
    model.ranks = False
    assert set(evaluate_model(model, cases, (1,), k1=(5,))) == {"retrieved"}
    with pytest.raises(ValueError, match="cases and ks must not be empty, got 0 cases and 1 cuts"):
        evaluate_model(model, cases.select(torch.arange(0)), (1,))


def test_an_evaluation_holds_the_lists_of_one_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    alive: list[weakref.ref[Tensor]] = []

    def search(*arguments: Any, **options: Any) -> TopK:
        assert sum(lists() is not None for lists in alive) <= 1  # those of the batch before are held until the next
        found = mips_topk(*arguments, **options)
        alive.append(weakref.ref(found.indices))
        return found

    monkeypatch.setattr(evaluation, "mips_topk", search)
    evaluate_model(Fixed(torch.randn(30, 4), torch.randn(30, 4)), random_cases(50, 30), (1, 10), batch_size=2)
    assert len(alive) == 25


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
