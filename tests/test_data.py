import torch

from grank_kernels.data import Interactions, TrainingWindows, last_items, leave_one_out


def ragged(lists: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    lengths = torch.tensor([0] + [len(items) for items in lists])
    return lengths.cumsum(0), torch.tensor([item for items in lists for item in items])


def test_leave_one_out() -> None:
    users = ["b"] * 4 + ["a"] * 2 + ["c"] * 3
    data = Interactions.from_columns(users, [5, 6, 7, 8, 5, 6, 9, 8, 7], range(9), [1] * 9)
    split = leave_one_out(data)  # items 5..9 become 0..4; user a has too few to be asked
    assert split.num_items == 5
    assert split.train_offsets.tolist() == [0, 2, 4, 5]
    assert split.train_items.tolist() == [0, 1, 0, 1, 4]
    assert [column.tolist() for column in split.validation] == [[1, 2], [0, 2, 3], [0, 1, 4], [2, 3]]
    assert [column.tolist() for column in split.test] == [[1, 2], [0, 3, 5], [0, 1, 2, 4, 3], [3, 2]]


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
        assert [int(split.test.targets[user]), int(split.validation.targets[user])] == [own[-1], own[-2]]
        assert split.train_items[split.train_offsets[user] : split.train_offsets[user + 1]].tolist() == own[:-2]


def test_last_items_pads_on_the_left() -> None:
    offsets, items = ragged([[1, 2, 3], [], [4]])
    rows = last_items(items, offsets[:-1], offsets[1:], 2)
    assert rows.tolist() == [[2, 3], [-1, -1], [-1, 4]]
    assert last_items(items[:0], offsets[:1], offsets[:1], 2).tolist() == [[-1, -1]]


def test_windows_cover_every_target_and_stay_inside_their_user() -> None:
    lists = [list(range(100 * user, 100 * user + length)) for user, length in enumerate([0, 1, 2, 5, 6, 7, 23, 90])]
    offsets, items = ragged(lists)
    windows = TrainingWindows(offsets, items, history=8, targets=4, batch_size=3, seed=5)
    first, second = list(windows), list(windows)
    for batches in (first, second):
        assert len(batches) == len(windows)
        seen = set()
        for row in torch.cat(batches):
            items_of = row[row >= 0]
            assert (row[len(row) - len(items_of) :] == items_of).all()  # padding on the left only
            assert len(items_of) >= 2
            assert (items_of.diff() == 1).all()  # one user, in order, without a gap
            seen |= set(items_of[1:].tolist()) & set(row[-4:].tolist())
        assert seen == {item for own in lists for item in own[1:]}
    assert not all(torch.equal(a, b) for a, b in zip(first, second, strict=False))  # cut anew each epoch
    again = TrainingWindows(offsets, items, history=8, targets=4, batch_size=3, seed=5)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
