"""Splits: what is held out, what is trained on, and the policies for repeated rows."""

import pytest
import torch

from grank_kernels.recommender.data import Cases, Histories, Interactions, half_and_half, leave_one_out
from grank_kernels.recommender.data.splits import REPEATS


def lists(histories: Histories) -> list[list[int]]:
    return [own.tolist() for own in histories.items.split(histories.lengths.tolist())]


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


# ---- repeated rows ----

AGAIN = Interactions.from_columns(
    ["a"] * 6 + ["b"] * 3 + ["c"] * 4, [0, 1, 2, 1, 3, 0, 4, 0, 4, 5, 1, 2, 3], ratings=[5, 1, 5, 5, 5, 5] + [5] * 7
)


@pytest.mark.parametrize(
    ("repeats", "train", "test", "dropped"),
    [
        ("keep", [[0, 1, 2, 1], [4], [5, 1]], [([0, 1, 2, 1, 3], [0]), ([4, 0], [4]), ([5, 1, 2], [3])], 0),
        ("first", [[0, 1], [4, 0], [5, 1]], [([0, 1, 2], [3]), ([5, 1, 2], [3])], 3),
        ("last", [[2, 1], [0, 4], [5, 1]], [([2, 1, 3], [0]), ([5, 1, 2], [3])], 3),
    ],
)
def test_policies_of_leave_one_out(
    repeats: str, train: list[list[int]], test: list[tuple[list[int], list[int]]], dropped: int
) -> None:
    split = leave_one_out(AGAIN, repeats=repeats)
    assert lists(split.train) == train
    assert [(history, targets) for _, history, targets in asked(split.test)] == test
    assert split.dropped_rows == dropped
    unreachable = [bool(set(history) & set(targets)) for history, targets in test]
    assert split.test.targets_in_history.tolist() == unreachable
    assert any(unreachable) == (repeats == "keep")


@pytest.mark.parametrize(("repeats", "feedback"), [("first", [True, False]), ("last", [True, True])])
def test_a_policy_keeps_the_feedback_of_the_row_it_keeps(repeats: str, feedback: list[bool]) -> None:
    assert leave_one_out(AGAIN, repeats=repeats).train.feedback[:2].tolist() == feedback


def test_policies_of_half_and_half() -> None:
    users = torch.arange(4).repeat_interleave(5)
    data = Interactions.from_columns(users, [0, 1, 2, 1, 3] * 4, ratings=[5, 1, 5, 5, 5] * 4)  # the first 1 is no event

    def held_out(repeats: str) -> tuple[list[int], list[int], int]:
        split = half_and_half(data, least=4, validation=1, test=1, repeats=repeats)
        return split.test.histories.items.tolist(), split.test.targets.items.tolist(), split.dropped_rows

    for repeats in REPEATS:
        assert held_out(repeats) == ([0, 2], [1, 3], 0)
    again = Interactions.from_columns(users, [0, 1, 2, 1, 3] * 4)
    split = half_and_half(again, least=4, validation=1, test=1)
    assert asked(split.test)[0][1:] == ([0, 1], [2, 1, 3])
    assert split.test.targets_in_history.tolist() == [False, True, False]
    first = half_and_half(again, least=4, validation=1, test=1, repeats="first")
    assert asked(first.test)[0][1:] == ([0, 1], [2, 3])
    last = half_and_half(again, least=4, validation=1, test=1, repeats="last")
    assert asked(last.test)[0][1:] == ([0, 2], [1, 3])
    assert first.dropped_rows == last.dropped_rows == 4


@pytest.mark.parametrize("repeats", ["first", "last"])
def test_policies_agree_without_repeats(repeats: str) -> None:
    kept, other = (half_and_half(half_and_half_data(), validation=7, test=9, repeats=x) for x in ("keep", repeats))
    assert asked(kept.test) == asked(other.test)
    assert asked(kept.validation) == asked(other.validation)
    assert lists(kept.train) == lists(other.train)
    assert other.dropped_rows == 0


def test_other_policies_are_refused() -> None:
    with pytest.raises(ValueError, match="repeats must be one of keep, first, last, got 'drop'"):
        leave_one_out(AGAIN, repeats="drop")
    with pytest.raises(ValueError, match="repeats must be one of keep, first, last, got 'drop'"):
        half_and_half(AGAIN, repeats="drop")
