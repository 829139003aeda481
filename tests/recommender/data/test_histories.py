import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from grank_kernels.recommender.data import Cases, Histories, Interactions, TrainingWindows, half_and_half, leave_one_out

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


def asked(cases: Cases) -> list[tuple[int, list[int], list[int]]]:
    return list(zip(cases.users.tolist(), lists(cases.histories), lists(cases.targets), strict=True))


def test_leave_one_out() -> None:
    users = ["b"] * 4 + ["a"] * 2 + ["c"] * 3
    ratings = [1, 5, 4, 3, 5, 5, 5, 5, 2]
    data = Interactions.from_columns(users, [5, 6, 7, 8, 5, 6, 9, 8, 7], range(9), ratings)
    split = leave_one_out(data)  # items 5..9 become 0..4; user a has too few to be asked
    assert split.num_items == 5
    assert lists(split.train) == [[0, 1], [0, 1], [4]]
    assert split.train.feedback.tolist() == [True, True, False, True, True]
    assert asked(split.validation) == [(1, [0, 1], [2]), (2, [4], [3])]
    assert asked(split.test) == [(1, [0, 1, 2], [3]), (2, [4, 3], [2])]
    assert split.test.targets.feedback.tolist() == [False, False]


def test_leave_one_out_is_stable_where_timestamps_are_equal() -> None:
    generator = torch.Generator().manual_seed(0)
    items = torch.stack([torch.randperm(60, generator=generator) for _ in range(30)])
    users = torch.arange(30).repeat_interleave(60)
    whose = torch.randperm(1800, generator=generator)
    rows = sorted(range(1800), key=lambda row: int(whose[row]))  # users interleaved, each in an order of its own
    data = Interactions.from_columns(users[rows], items.flatten()[rows], [7] * 1800, [3] * 1800)
    split = leave_one_out(data)
    for user in range(30):
        own = [int(items.flatten()[row]) for row in rows if row // 60 == user]
        assert [int(split.test.targets.items[user]), int(split.validation.targets.items[user])] == [own[-1], own[-2]]
        assert lists(split.train)[user] == own[:-2]


def half_and_half_data() -> Interactions:
    """60 users; user u has u events and one film it did not like, the same for all."""
    users = [user for user in range(60) for _ in range(user + 1)]
    items = [item for user in range(60) for item in [*range(user), 99]]
    return Interactions.from_columns(users, items, range(len(users)), [2 if item == 99 else 4 for item in items])


def test_half_and_half_holds_out_users_whole() -> None:
    split = half_and_half(half_and_half_data(), least=10, validation=7, test=9, seed=3)
    assert len(split.validation) == 7
    assert len(split.test) == 9
    assert len(split.train) == 50 - 7 - 9
    held_out = set(split.validation.users.tolist()) | set(split.test.users.tolist())
    assert len(held_out) == 16
    assert min(held_out) >= 10
    for cases in (split.validation, split.test):
        for user, history, targets in asked(cases):
            assert history == list(range(user // 2))
            assert targets == list(range(user // 2, user))
    trained = {len(own) for own in lists(split.train)}
    assert trained == set(range(10, 60)) - held_out
    assert split.train.feedback.all()
    again = half_and_half(half_and_half_data(), least=10, validation=7, test=9, seed=3)
    other = half_and_half(half_and_half_data(), least=10, validation=7, test=9, seed=4)
    assert torch.equal(split.test.users, again.test.users)
    assert not torch.equal(split.test.users, other.test.users)


def test_without_ratings_all_feedback_is_positive() -> None:
    users = torch.arange(4).repeat_interleave(12)
    data = Interactions.from_columns(users, torch.arange(48) % 13)
    assert leave_one_out(data).train.feedback.all()
    assert [len(own) for own in lists(half_and_half(data, validation=1, test=1).train)] == [12, 12]


def test_half_and_half_wants_users_to_train_on() -> None:
    with pytest.raises(ValueError, match=r"validation and test must leave users to train on, got 25 \+ 25 of 50"):
        half_and_half(half_and_half_data(), validation=25, test=25)


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
