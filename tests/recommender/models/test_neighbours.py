"""The baselines without training, against their definitions written out."""

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from grank_kernels.recommender.data import Histories
from grank_kernels.recommender.models import neighbours
from grank_kernels.recommender.models.neighbours import ItemKNN, Popularity

ITEMS = 7
HISTORIES = st.lists(st.lists(st.integers(0, ITEMS - 1), max_size=8), max_size=12)


def definition(train: list[list[int]], history: list[int], kept: int) -> dict[int, float]:
    """Scores of the items with any, straight from the docstring."""
    users = [{u for u, items in enumerate(train) if item in items} for item in range(ITEMS)]

    def similarity(a: int, b: int) -> float:
        return len(users[a] & users[b]) / math.sqrt(len(users[a]) * len(users[b])) if users[a] and users[b] else 0.0

    scores: dict[int, float] = {}
    for item in set(history):
        others = sorted(set(range(ITEMS)) - {item}, key=lambda other: (-similarity(item, other), other))[:kept]
        for other in others:
            if similarity(item, other) > 0 and other not in history:
                scores[other] = scores.get(other, 0.0) + similarity(item, other)
    return scores


@given(train=HISTORIES, asked=HISTORIES, k=st.integers(1, 9), at_a_time=st.sampled_from([1, 3 * ITEMS, 1 << 24]))
def test_item_knn_is_its_definition(train: list[list[int]], asked: list[list[int]], k: int, at_a_time: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(neighbours, "_ENTRIES", at_a_time)
        model = ItemKNN.fit(Histories.from_lists(train), ITEMS, neighbours=ITEMS)
        found = model.recommend(Histories.from_lists(asked), k)
    assert found.values.shape == found.indices.shape == (len(asked), k)
    for history, values, items in zip(asked, found.values.tolist(), found.indices.tolist(), strict=True):
        scores = definition(train, history, ITEMS)
        count = min(k, len(scores))
        assert items[count:] == [-1] * (k - count)
        assert values[count:] == [-math.inf] * (k - count)
        assert len(set(items[:count])) == count
        assert values[:count] == sorted(values[:count], reverse=True)
        best = sorted(scores.values(), reverse=True)
        for place, item in enumerate(items[:count]):  # float32 sums of up to 7 terms of at most 1
            assert values[place] == pytest.approx(scores[item], rel=1e-6)
            assert values[place] == pytest.approx(best[place], rel=1e-6)


@pytest.mark.parametrize("kept", [1, 2, 3])
def test_every_item_keeps_its_nearest_neighbours(kept: int) -> None:
    train = [[0, 1], [0, 1], [0, 2], [0, 3], [3, 1]]
    model = ItemKNN.fit(Histories.from_lists(train), ITEMS, neighbours=kept)
    found = model.recommend(Histories.from_lists([[0]]), 3)
    scores = definition(train, [0], kept)
    assert found.indices[0].tolist() == [1, 2, 3][:kept] + [-1] * (3 - kept)  # 1: 2/sqrt(12); 2: 1/2; 3: 1/sqrt(8)
    assert found.values[0, :kept].tolist() == pytest.approx([scores[item] for item in (1, 2, 3)[:kept]])


def test_equal_scores_come_by_number() -> None:
    model = ItemKNN.fit(Histories.from_lists([[6, 5, 4, 2]] * 3), ITEMS)
    assert model.recommend(Histories.from_lists([[4]]), 4).indices.tolist() == [[2, 5, 6, -1]]


def test_what_was_given_is_left_as_it_was() -> None:
    histories = Histories.from_lists([[3, 1, 3, 2], [2, 0]])
    before = histories.items.clone()
    ItemKNN.fit(histories, ITEMS).recommend(histories, 2)
    assert torch.equal(histories.items, before)


def test_popularity() -> None:
    model = Popularity.fit(Histories.from_lists([[1, 2], [1, 3], [1, 3], []]), 5)
    found = model.recommend(Histories.from_lists([[], [1, 4], [0, 1, 2, 3, 4]]), 3)
    assert found.indices.tolist() == [[1, 3, 2], [3, 2, 0], [-1, -1, -1]]
    assert found.values[1].tolist() == [2, 1, 0]
    assert model.recommend(Histories.from_lists([]), 3).indices.shape == (0, 3)


OUTSIDE = Histories.from_lists([[0, 7]])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ItemKNN.fit(OUTSIDE, 7), "histories must hold items from 0 to 6, got 0 to 7"),
        (lambda: Popularity.fit(OUTSIDE, 7), "histories must hold items from 0 to 6, got 0 to 7"),
        (lambda: ItemKNN.fit(OUTSIDE, 8, neighbours=0), "neighbours must be 1 or more, got 0"),
        (lambda: ItemKNN.fit(OUTSIDE, 0), "num_items must be 1 or more, got 0"),
        (
            lambda: ItemKNN.fit(OUTSIDE, 8).recommend(Histories.from_lists([[8, 0]]), 1),
            "histories must hold items from 0 to 7, got 0 to 8",
        ),
        (lambda: ItemKNN.fit(OUTSIDE, 8).recommend(OUTSIDE, 0), "k must be 1 or more, got 0"),
    ],
)
def test_bad_arguments_are_named(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
