"""What training windows ask."""

import torch

from grank_kernels.data import Histories
from grank_kernels.models.targets import draw_candidates, draw_moments, later_targets, until


def test_later_targets_are_among_the_next_items() -> None:
    batch = Histories.from_lists([[10, 11, 12, 13, 14], [20, 21], [25]]).pad()
    assert later_targets(batch, 1).tolist() == [[11, 12, 13, 14], [21, -1, -1, -1], [-1, -1, -1, -1]]
    drawn = torch.stack([later_targets(batch, 3) for _ in range(200)])
    for moment, wanted in enumerate(({11, 12, 13}, {12, 13, 14}, {13, 14}, {14})):
        assert set(drawn[:, 0, moment].tolist()) == wanted
    assert set(drawn[:, 1, 0].tolist()) == {21}
    assert set(drawn[:, 1:, 1:].flatten().tolist()) == {-1}


def test_moments_have_an_item_behind_them() -> None:
    drawn = draw_moments(Histories.from_lists([[5, 6, 7, 8], [9, 10]]).pad(), 200)
    assert drawn.shape == (2, 200)
    assert set(drawn[0].tolist()) == {0, 1, 2}
    assert set(drawn[1].tolist()) == {0}


def test_until_pads_behind() -> None:
    items = torch.tensor([[5, 6, 7], [8, 9, -1]])
    assert until(items, torch.tensor([2, 0]), 99).tolist() == [[5, 6, 99], [99, 99, 99]]
    assert until(items, torch.tensor([1, 2]), torch.tensor([[7], [3]])).tolist() == [[5, 7, 7], [8, 9, 3]]


def test_candidates_are_the_target_and_others_of_the_batch() -> None:
    pool = torch.tensor([1, 1, 1, 2, 3, 3, 4, 5])
    seen = torch.tensor([[4, -1], [-1, -1], [5, 2]])
    ids, log_frequency = draw_candidates(torch.tensor([1, 2, 3]), pool, seen, 4000)
    assert ids[:, 0].tolist() == [1, 2, 3]
    counts = torch.stack([torch.bincount(row, minlength=6) for row in ids[:, 1:]]) / 4000
    expected = torch.bincount(pool) / 8
    assert float((counts - expected).abs().max()) < 0.05  # five standard errors
    barred = (ids == torch.tensor([[1], [2], [3]])) | (ids == seen[:, :1]) | (ids == seen[:, 1:])
    barred[:, 0] = False  # the target itself, wherever it comes first
    assert torch.equal(log_frequency, expected.log()[ids].masked_fill(barred, torch.inf))


def test_log_q_makes_the_whole_corpus_of_a_sample() -> None:
    """Softmax over a large sample, after the correction, is the softmax over everything."""
    pool = torch.arange(8).repeat_interleave(torch.tensor([40, 20, 10, 10, 5, 5, 5, 5]))
    scores = torch.randn(8, dtype=torch.float64)
    ids, log_frequency = draw_candidates(torch.zeros(1, dtype=torch.int64), pool, torch.full((1, 1), -1), 200_000)
    mass = (scores[ids] - log_frequency).exp()[0, 1:].sum() / 200_000
    torch.testing.assert_close(mass, scores[1:].exp().sum(), rtol=0.02, atol=0.0)
