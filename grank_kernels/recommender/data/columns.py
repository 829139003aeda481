"""Columns of interactions: validated arrays, and ids as dense numbers."""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from grank_kernels.common.arrays import as_tensor

_INT64 = np.iinfo(np.int64)


class Numbered(NamedTuple):
    """A column of ids as positions in the sorted list of distinct ids.

    Attributes:
        ids: (m,) ascending, each present in the column.
        numbers: (n,) int32: row r holds `ids[numbers[r]]`.
    """

    ids: npt.NDArray[Any]
    numbers: Tensor

    @classmethod
    def of(cls, column: npt.NDArray[Any]) -> "Numbered":
        """The numbers of a column of integers or strings."""
        if column.dtype.kind in "iu" and len(column):
            if column.dtype.itemsize < 4:
                column = column.astype(np.int32)
            low, high = int(column.min()), int(column.max())
            most = min(4 * len(column) + (1 << 16), 1 << 31)
            if high - low < most and high < 1 << 62:  # true of nearly all ids: counted, not sorted, no int64 copy
                above = as_tensor("ids", column - low if low else column).to(torch.int32)
                seen = torch.bincount(above) > 0
                ids = seen.nonzero().squeeze(1).numpy() + low
                return cls(ids, seen.cumsum(0, dtype=torch.int32).sub_(1).index_select(0, above))
        ids, numbers = np.unique(column, return_inverse=True)
        return cls(ids, torch.from_numpy(numbers.astype(np.int32)))


Columns: TypeAlias = dict[str, npt.NDArray[Any] | Numbered]


def checked_ids(name: str, column: npt.ArrayLike, *, negative: bool = False) -> npt.NDArray[Any]:
    """A column of ids as an array of integers or of strings, (n,).

    Args:
        name: of the column, for messages.
        column: integers of any width, or strings; lists and object arrays of one of the two are converted.
        negative: whether negative integers are ids. They are none of items, where -1 marks an empty place of a result.

    Raises:
        ValueError: the column has another shape, or holds a value of another type, a negative number or "". The
            message names the row, and the conversion if there is an obvious one.
    """
    ids = _array(name, column)
    if ids.dtype.kind in "OT":  # T: NumPy's strings of variable width
        ids = _of_objects(name, ids)
    if ids.dtype.kind not in "iuU":
        fix = "; call .astype('int64') if they are whole" if ids.dtype.kind == "f" else ""
        raise ValueError(f"{name} must be integers or strings, got {ids.dtype}{fix}")
    if ids.dtype.kind == "U":
        _refuse(name, ids, lambda x: x == "", 'must not be ""')
    elif ids.dtype.kind == "i" and not negative:
        hashes = "; call .view('uint64') on signed 64-bit hashes" if ids.dtype == np.int64 else ""
        _refuse(name, ids, lambda x: x < 0, "must be 0 or more", hashes)
    return ids


def checked_timestamps(name: str, column: npt.ArrayLike) -> npt.NDArray[Any]:
    """A column of integers that int64 holds, (n,).

    Raises:
        ValueError: the column has another shape or type (the message says how to convert it), or holds an integer
            beyond int64.
    """
    times = _array(name, column)
    if times.dtype.kind == "O" and all(isinstance(x, (int, np.integer)) for x in times):
        times = _of_objects(name, times)
    if times.dtype.kind not in "iu":
        seconds = "numpy.asarray(dates, 'datetime64[s]').astype('int64') makes seconds of dates"
        fix = "call .astype('int64') to drop fractions" if times.dtype.kind == "f" else seconds
        raise ValueError(f"{name} must be integers, got {times.dtype}; {fix}")
    if times.dtype.kind == "u":
        _refuse(name, times, lambda x: x > _INT64.max, f"must be at most {_INT64.max}")
    return times


def checked_ratings(name: str, column: npt.ArrayLike) -> npt.NDArray[Any]:
    """A column of finite numbers, (n,).

    Raises:
        ValueError: the column has another shape or type, or holds NaN or infinity; the message names the row.
    """
    ratings = _array(name, column)
    if ratings.dtype.kind == "O":
        _refuse(name, ratings, lambda x: [not _is_number(value) for value in x], "must be numbers")
        ratings = ratings.astype(np.float64)
    if ratings.dtype.kind not in "iuf":
        raise ValueError(f"{name} must be numbers, got {ratings.dtype}")
    if ratings.dtype.kind == "f":
        with np.errstate(over="ignore"):
            _refuse(name, ratings, lambda x: ~np.isfinite(x.astype(np.float32)), "must be finite float32 numbers")
    return ratings


def _array(name: str, column: npt.ArrayLike) -> npt.NDArray[Any]:
    """A column as an array of one dimension, in the machine's byte order and without gaps, as torch takes it."""
    array = np.asarray(column)
    if array.ndim != 1:
        raise ValueError(f"{name} must be (n,), got shape {array.shape}")
    if isinstance(column, (list, tuple)) and array.dtype.kind == "f" and all(isinstance(x, int) for x in column):
        return np.array(column, dtype=object)  # NumPy makes floats of [], and of integers below and above 2^63
    return np.ascontiguousarray(array, array.dtype.newbyteorder("="))


def _is_number(x: Any) -> bool:
    return isinstance(x, (int, float, np.integer, np.floating)) and not isinstance(x, bool)


def _of_objects(name: str, ids: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """An object array, such as pandas makes, as integers or strings."""
    kind = str if any(isinstance(x, str) for x in ids) else int
    allowed = str if kind is str else (int, np.integer)
    for row, x in enumerate(ids):
        if not isinstance(x, allowed) or isinstance(x, bool):
            raise ValueError(f"{name} must be integers or strings, one of the two throughout, got {x!r} in row {row}")
    if kind is str:
        return ids.astype(np.str_)
    low, high = (min(ids), max(ids)) if len(ids) else (0, 0)
    if low < _INT64.min or high > np.iinfo(np.uint64).max or (low < 0 and high > _INT64.max):
        raise ValueError(f"{name} must fit int64 or uint64, got integers from {low} to {high}")
    return ids.astype(np.int64 if high <= _INT64.max else np.uint64)


def _refuse(name: str, column: npt.NDArray[Any], wrong: Callable[[Any], Any], must: str, fix: str = "") -> None:
    """Raises a ValueError for the first row that is wrong; looks at a million rows at a time."""
    for start in range(0, len(column), 1 << 20):
        rows = np.flatnonzero(wrong(column[start : start + (1 << 20)]))
        if len(rows):
            row = start + int(rows[0])
            value = column[row].item() if isinstance(column[row], np.generic) else column[row]
            raise ValueError(f"{name} {must}, got {value!r} in row {row}{fix}")
