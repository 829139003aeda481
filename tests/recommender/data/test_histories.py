import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from grank_kernels.recommender.data import Histories, TrainingWindows

LISTS = [[5, 6, 7], [], [8]]


def lists(histories: Histories) -> list[list[int]]:
    return [own.tolist() for own in histories.items.split(histories.lengths.tolist())]


def test_padding_stands_behind_the_newest() -> None:
    histories = Histories.from_lists(LISTS, [[True, False, True], [], [False]])
    batch = histories.pad()
    assert batch.items.tolist() == [[5, 6, 7], [-1, -1, -1], [8, -1, -1]]
    assert batch.feedback.tolist() == [[True, False, True], [False] * 3, [False] * 3]
    assert batch.lengths.tolist() == [3, 0, 1]
    assert histories.pad(2).items.tolist() == [[6, 7], [-1, -1], [8, -1]]  # the last two of each
    assert histories.select(torch.tensor([1])).pad().items.tolist() == [[-1]]  # one column at least


def test_cut_and_select() -> None:
    histories = Histories.from_lists(LISTS)
    assert lists(histories.select(torch.tensor([2, 0, 0]))) == [[8], [5, 6, 7], [5, 6, 7]]
    assert lists(histories.select(torch.tensor([True, False, True]))) == [[5, 6, 7], [8]]
    assert lists(histories.cut(torch.tensor([1, 0]), torch.tensor([3, 0]))) == [[6, 7], []]
    assert histories.users.tolist() == [0, 0, 0, 2]


def test_feedback_must_fit_items() -> None:
    with pytest.raises(ValueError, match="feedback must have one entry for every item"):
        Histories.from_lists(LISTS, [[True], [], [True]])


@settings(max_examples=40)
@given(
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=12),
    targets=st.integers(1, 12),
    context=st.integers(0, 12),
    batch_items=st.integers(1, 60),
    ranks=st.integers(1, 3),
)
def test_windows_cover_every_target_once_an_epoch_and_stay_inside_their_user(
    lengths: list[int], targets: int, context: int, batch_items: int, ranks: int
) -> None:
    own = [list(range(100 * user, 100 * user + length)) for user, length in enumerate(lengths)]
    histories = Histories.from_lists(own)
    to_predict = {item for items in own for item in items[1:]}
    for epoch in (0, 1):
        shares = [
            TrainingWindows(
                histories, targets=targets, context=context, batch_items=batch_items, epoch=epoch, rank=r, ranks=ranks
            )
            for r in range(ranks)
        ]
        assert len({len(share) for share in shares}) == 1
        seen = []
        for share in shares:
            batches = list(share)
            assert len(batches) == len(share)
            for batch in batches:
                for row in batch.items:
                    items = row[row >= 0]
                    assert (row[: len(items)] == items).all()  # padding behind only
                    assert 2 <= len(items) <= targets + max(context, 1)
                    assert (items.diff() == 1).all()  # one user, in order, without a gap
                    seen.append(items)
        predicted = {int(item) for items in seen for item in items[-targets:] if item != items[0]}
        assert predicted == to_predict
        rows = sum(-(-max(0, length - 1) // targets) for length in lengths)
        assert rows <= len(seen)  # what ranks repeat to have as many batches may come on top
        if ranks == 1:
            assert len(seen) == rows


def test_an_epoch_follows_from_its_number() -> None:
    histories = Histories.from_lists([list(range(90)), list(range(100, 140))])

    def epoch(number: int, seed: int = 0) -> list[list[list[int]]]:
        windows = TrainingWindows(histories, targets=8, batch_items=32, seed=seed, epoch=number)
        return [batch.items.tolist() for batch in windows]

    assert epoch(3) == epoch(3)
    assert epoch(3) != epoch(4)
    assert epoch(3) != epoch(3, seed=1)


def test_batches_are_filled_and_hold_little_padding() -> None:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(2, 60, (400,), generator=generator)
    histories = Histories.from_lists([list(range(int(n))) for n in lengths])
    batches = [batch.items for batch in TrainingWindows(histories, targets=59, batch_items=600)]
    assert all(items.numel() <= 600 for items in batches)
    filled = sum(int((items >= 0).sum()) for items in batches) / sum(items.numel() for items in batches)
    assert filled > 0.8  # at random it would be about one half


def test_context_does_not_make_a_batch_ask_for_less() -> None:
    histories = Histories.from_lists([list(range(length)) for length in (*[12] * 40, *[90] * 40)])
    for batch in TrainingWindows(histories, targets=10, context=50, batch_items=110):
        rows, width = batch.items.shape
        assert rows * min(width, 11) <= 110
    rows = [len(batch.items) for batch in TrainingWindows(histories, targets=10, context=50, batch_items=110)]
    assert sum(rows) / len(rows) > 9  # of ten that fit; with all of a window counted it would be two or three
