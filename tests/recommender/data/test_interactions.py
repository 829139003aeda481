"""Interactions from columns: what becomes an id, a time or a rating, what is refused, and the order of the rows."""

import warnings
from datetime import datetime
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from grank_kernels.recommender.data import Interactions, interactions
from grank_kernels.recommender.data.columns import checked_ids, checked_ratings, checked_timestamps

HUGE = 2**63 + 5


# ---- the order of the rows ----


@given(
    rows=st.lists(st.tuples(st.integers(-3, 3), st.integers(0, 9), st.integers(-2, 2)), min_size=1, max_size=60),
    spread=st.sampled_from([1, 1 << 40]),
    at_a_time=st.sampled_from([1, 3, 7, 1 << 22]),
    dtype=st.sampled_from([np.int64, object]),
)
def test_rows_are_sorted_stably(rows: list[tuple[int, int, int]], spread: int, at_a_time: int, dtype: Any) -> None:
    users = [user * spread for user, _, _ in rows]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interactions, "_ROWS", at_a_time)
        data = Interactions.from_columns(
            np.array(users, dtype), [row[1] for row in rows], [row[2] for row in rows], range(len(rows))
        )
    expected = sorted(range(len(rows)), key=lambda row: (users[row], rows[row][2]))  # Python's sort is stable
    assert data.ratings.tolist() == expected
    assert data.user_ids[data.users.numpy()].tolist() == [users[row] for row in expected]
    assert data.item_ids[data.items.numpy()].tolist() == [rows[row][1] for row in expected]
    assert data.timestamps.tolist() == [rows[row][2] for row in expected]
    assert data.user_ids.tolist() == sorted(set(users))


def test_no_rows_are_no_users() -> None:
    data = Interactions.from_columns([], [])
    assert (data.num_users, data.num_items, len(data), data.offsets.tolist()) == (0, 0, 0, [0])


# ---- ids ----


@pytest.mark.parametrize(
    ("column", "dtype"),
    [
        ([3, 1, 2], np.int64),
        (np.array([3, 1, 2], np.uint8), np.uint8),
        (np.array([3, 1, 2], ">i4"), np.int32),
        (np.arange(6)[::-2], np.int64),
        ([3, HUGE, 1], np.uint64),
        (np.array([3, HUGE], np.uint64), np.uint64),
        (np.array([3, 1], object), np.int64),
        (np.array([np.int16(3), HUGE], object), np.uint64),
        (["b", "a"], np.dtype("U1")),
        (np.array(["b", "long"], object), np.dtype("U4")),
        ([], np.int64),
    ],
)
def test_ids_are_integers_or_strings(column: Any, dtype: Any) -> None:
    ids = checked_ids("items", column)
    assert ids.dtype == dtype
    assert ids.tolist() == list(np.asarray(column, object))
    data = Interactions.from_columns(np.zeros(len(ids), int), column)
    assert data.item_ids.tolist() == sorted(set(ids.tolist()))
    assert data.item_ids[data.items.numpy()].tolist() == ids.tolist()


def test_read_only_columns_are_read_without_a_warning() -> None:
    column = np.arange(4)
    column.flags.writeable = False
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        data = Interactions.from_columns(column, column, column, column)
    assert data.ratings.tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("column", "message"),
    [
        ([[1], [2]], r"items must be \(n,\), got shape \(2, 1\)"),
        (7, r"items must be \(n,\), got shape \(\)"),
        ([1, -2], r"items must be 0 or more, got -2 in row 1; call \.view\('uint64'\) on signed 64-bit hashes"),
        (np.array([1, -2], np.int8), r"items must be 0 or more, got -2 in row 1$"),
        (["a", ""], r"items must not be \"\", got '' in row 1"),
        ([1.0, 2.5], r"items must be integers or strings, got float64; call \.astype\('int64'\) if they are whole"),
        ([True, False], r"items must be integers or strings, got bool"),
        (np.array(["2024"], "M8[s]"), r"items must be integers or strings, got datetime64\[s\]"),
        ([b"a"], r"items must be integers or strings, got \|S1"),
        (["a", None], r"items must be integers or strings, one of the two throughout, got None in row 1"),
        (np.array(["a", float("nan")], object), r"items must be .*, got nan in row 1"),
        (np.array([4, "a"], object), r"items must be .*, got 4 in row 0"),
        (np.array([4, True], object), r"items must be .*, got True in row 1"),
        (np.array([4, 2.5], object), r"items must be .*, got 2\.5 in row 1"),
        ([-1, HUGE], rf"items must fit int64 or uint64, got integers from -1 to {HUGE}"),
        (np.array([2**64], object), rf"items must fit int64 or uint64, got integers from {2**64} to {2**64}"),
    ],
)
def test_other_ids_are_refused(column: Any, message: str) -> None:
    rows = np.shape(column)[0] if np.ndim(column) else 1
    with pytest.raises(ValueError, match=message):
        Interactions.from_columns(range(rows), column)


def test_a_user_id_may_be_negative() -> None:
    assert Interactions.from_columns([3, -5], [1, 1]).user_ids.tolist() == [-5, 3]
    with pytest.raises(ValueError, match=r"users must not be \"\", got '' in row 0"):
        Interactions.from_columns([""], [1])


# ---- times and ratings ----


@pytest.mark.parametrize(
    ("column", "message"),
    [
        ([1.5], r"timestamps must be integers, got float64; call \.astype\('int64'\) to drop fractions"),
        (["2024-05-01"], r"timestamps must be integers, got <U10; numpy\.asarray\(dates, 'datetime64\[s\]'\)\.astype"),
        (np.array(["2024"], "M8[ns]"), r"timestamps must be integers, got datetime64\[ns\]; numpy\.asarray"),
        ([datetime(2024, 5, 1)], r"timestamps must be integers, got object; numpy\.asarray"),
        ([True], r"timestamps must be integers, got bool"),
        (np.array([1, HUGE], np.uint64)[1:], rf"timestamps must be at most {2**63 - 1}, got {HUGE} in row 0"),
    ],
)
def test_other_timestamps_are_refused(column: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Interactions.from_columns([1], [1], column)


def test_dates_are_converted_as_the_error_says() -> None:
    for dates in (["2024-05-01", "1970-01-02"], [datetime(2024, 5, 1), datetime(1970, 1, 2)]):
        seconds = np.asarray(dates, "datetime64[s]").astype("int64")
        assert checked_timestamps("timestamps", seconds).tolist() == [1714521600, 86400]
    assert checked_timestamps("timestamps", np.array([3, -2], object)).tolist() == [3, -2]


@pytest.mark.parametrize(
    ("column", "message"),
    [
        ([1, np.nan], r"ratings must be finite float32 numbers, got nan in row 1"),
        ([1, -np.inf], r"ratings must be finite float32 numbers, got -inf in row 1"),
        ([1, 1e39], r"ratings must be finite float32 numbers, got 1e\+39 in row 1"),
        (["good", "bad"], r"ratings must be numbers, got <U4"),
        ([5, None], r"ratings must be numbers, got None in row 1"),
        ([True, False], r"ratings must be numbers, got bool"),
        (np.array([5, True], object), r"ratings must be numbers, got True in row 1"),
        ([1j, 2], r"ratings must be numbers, got complex128"),
    ],
)
def test_other_ratings_are_refused(column: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Interactions.from_columns([1, 1], [1, 2], [1, 2], column)


def test_ratings_of_python_and_of_numpy() -> None:
    assert checked_ratings("ratings", np.array([5, 2.5], object)).tolist() == [5.0, 2.5]
    assert Interactions.from_columns([1], [1], ratings=np.array([2.5], ">f8")).ratings.tolist() == [2.5]


def test_a_bad_row_is_found_beyond_the_first_million() -> None:
    ratings = np.zeros((1 << 20) + 9, np.float32)
    ratings[-2] = np.nan
    with pytest.raises(ValueError, match=f"got nan in row {(1 << 20) + 7}"):
        checked_ratings("ratings", ratings)


def test_columns_must_have_one_length() -> None:
    with pytest.raises(ValueError, match=r"users, items, timestamps must be columns of one length, got \[2, 2, 1\]"):
        Interactions.from_columns([1, 2], [1, 2], [1])


# ---- titles ----


@pytest.mark.parametrize(
    ("titles", "error", "message"),
    [
        (
            ["A", "B"],
            TypeError,
            r"titles must be a mapping of item id to title, got list; dict\(zip",
        ),
        ({4: "A", 5: None}, TypeError, r"titles must be strings, got None for item 5"),
        ({"4": "A"}, ValueError, r"titles must have item ids as keys, such as 4, got keys such as '4'"),
    ],
)
def test_other_titles_are_refused(titles: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Interactions.from_columns([1, 1], [4, 5], titles=titles)


def test_items_without_a_title_are_called_by_their_id() -> None:
    assert Interactions.from_columns([1, 1], [4, 5], titles={5: "B", 9: "C"}).titles == ("item 4", "B")
    assert Interactions.from_columns([1, 1], [4, 5], titles={}).titles == ("item 4", "item 5")
