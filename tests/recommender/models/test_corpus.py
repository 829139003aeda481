"""The items of the retrieval's softmax: all items, or a batch's targets as a sample of them."""

import pytest
import torch
from torch.nn import functional as F

from grank_kernels.recommender.data import Histories
from grank_kernels.recommender.models import Sequential, SequentialConfig
from grank_kernels.recommender.models.corpus import Corpus
from grank_kernels.recommender.models.targets import seen_before

N = 12


def model(softmax: str) -> Sequential:
    torch.manual_seed(1)
    return Sequential(N, SequentialConfig(dim=8, history=6, dropout=0.0, softmax=softmax))


def test_columns_and_back() -> None:
    vectors = torch.randn(3, 4)
    sample = Corpus(vectors, torch.tensor([2, 5, 9]), torch.zeros(3))
    assert sample.columns(torch.tensor([[5, 0, 9], [-1, 11, 2]])).tolist() == [[1, 3, 2], [3, 3, 0]]
    assert sample.items(torch.tensor([2, 0])).tolist() == [9, 2]
    whole = Corpus(vectors)
    assert whole.columns(torch.tensor([2, -1])).tolist() == [2, 3]
    assert whole.items(torch.tensor([2, 0])).tolist() == [2, 0]


def test_loss_leaves_out_what_was_seen_before_and_nothing_else() -> None:
    items, queries = torch.randn(N, 4), torch.randn(4, 4)
    windows = torch.tensor([[3, 5, 7, 5], [2, 4, -1, -1]])
    asked = windows[:, 1:] >= 0
    expected = []
    for query, past, target in zip(queries, ([3], [3, 5], [3, 5, 7], [2]), (5, 7, 5, 4), strict=True):
        logits = items @ query
        keep = [item for item in range(N) if item not in past or item == target]
        expected.append(-F.log_softmax(logits[keep], 0)[keep.index(target)])
    whole = Corpus(items)
    seen = seen_before(whole.columns(windows), asked, N)
    got = whole.loss(queries, windows[:, 1:][asked], seen)
    torch.testing.assert_close(got, torch.stack(expected).mean())


def test_what_a_batch_asks_for_stands_for_the_corpus() -> None:
    """Over batches, the sum over a batch's columns but the target has the sum over the corpus for its mean."""
    trained = model("batch")
    shares = torch.rand(N).add(0.2)
    trained.observe(Histories.from_lists([[item] * int(1000 * share) for item, share in enumerate(shares)]))
    query, target, rounds = torch.randn(8), 3, 4000
    others = torch.arange(N) != target
    exact = (trained.item_vectors() @ query).exp()[others].sum()
    assert trained.log_share is not None
    drawn = torch.multinomial(trained.log_share.exp(), 40 * rounds, replacement=True).view(rounds, 40)
    sums = []
    with torch.no_grad():
        for targets in drawn:
            corpus = trained.corpus(targets)
            assert corpus.ids is not None
            assert corpus.ids.tolist() == sorted(set(targets.tolist()))
            assert corpus.bias is not None
            sums.append(((corpus.vectors @ query + corpus.bias).exp() * (corpus.ids != target)).sum())
    found = torch.stack(sums)
    assert abs(found.mean() - exact) < 5 * found.std() / rounds**0.5


def test_a_target_stands_for_itself_alone() -> None:
    corpus = Corpus(torch.randn(3, 4), torch.tensor([2, 5, 9]), torch.randn(3))
    queries, targets = torch.randn(2, 4), torch.tensor([0, 2])
    logits = queries @ corpus.vectors.T
    assert corpus.bias is not None
    expected = logits + corpus.bias * torch.tensor([[0, 1, 1], [1, 1, 0]])
    torch.testing.assert_close(corpus.logits(queries, targets), expected)
    none = torch.full((2, 1), 3)
    torch.testing.assert_close(corpus.loss(queries, targets, none), F.cross_entropy(expected, targets))


def test_a_batch_of_every_item_learns_as_the_corpus_does() -> None:
    """Each item asked for as often as it is in training: every column stands for one item."""
    sample, whole = model("batch"), model("corpus")
    windows = Histories.from_lists([[0, *range(6)], [0, *range(6, N)]]).pad()
    sample.observe(Histories.from_lists([list(range(N))]))
    for each in (sample, whole):
        each.eval().losses(windows)["retrieval"].backward()
    assert sample.items.grad is not None
    assert whole.items.grad is not None
    torch.testing.assert_close(sample.items.grad, whole.items.grad)


def test_a_sample_needs_the_shares() -> None:
    with pytest.raises(RuntimeError, match="must observe its training histories"):
        model("batch").corpus(torch.tensor([1]))
