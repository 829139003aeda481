"""Targets and negatives of training windows."""

import torch
from torch.nn import functional as F

from grank_kernels.recommender.data import Histories
from grank_kernels.recommender.models.targets import draw_candidates, draw_moments, later_targets, truncate


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
    assert truncate(items, torch.tensor([2, 0]), 99).tolist() == [[5, 6, 99], [99, 99, 99]]
    assert truncate(items, torch.tensor([1, 2]), torch.tensor([[7], [3]])).tolist() == [[5, 7, 7], [8, 9, 3]]


def test_candidates_are_the_target_and_a_draw_from_the_softmax() -> None:
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0, 5.0, 4.0]).expand(20_000, 6)
    targets, barred = torch.full((20_000,), 4), torch.full((20_000, 2), 5)
    drawn = draw_candidates(targets, logits, barred, 1)
    assert (drawn[:, 0] == 4).all()
    counts = torch.bincount(drawn[:, 1], minlength=6) / 20_000
    torch.testing.assert_close(
        counts, F.pad(logits[0, :4].softmax(0), (0, 2)), rtol=0.0, atol=0.02
    )  # 5 standard errors


def test_candidates_run_out() -> None:
    logits = torch.randn(3, 6)
    drawn = draw_candidates(torch.tensor([0, 1, 2]), logits, torch.tensor([[3, 3], [1, 5], [2, 2]]), 8)
    assert drawn.shape == (3, 9)
    assert [sorted(row) for row in drawn.tolist()] == [
        [-1, -1, -1, -1, 0, 1, 2, 4, 5],
        [-1, -1, -1, -1, 0, 1, 2, 3, 4],
        [-1, -1, -1, 0, 1, 2, 3, 4, 5],
    ]
    assert drawn[:, 0].tolist() == [0, 1, 2]
