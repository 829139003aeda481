"""`Catalogue`: external ids and titles of a model's items."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from grank_kernels.common.atomic_files import replace_file

_INT64 = np.iinfo(np.int64)
_UINT64 = np.iinfo(np.uint64)


class Catalogue:
    """External ids and titles by item number, which is the row of the model's item table.

    Attributes:
        ids: (N,) int64, uint64 if one of them is 2^63 or more, or strings.
        titles: N strings, or None.
        offered: (N,) bool, the items that may be recommended, or None for all; `grank refresh` sets it.
        missing: what `of` returns for item number -1: "" where ids are strings; else -1, or the next smaller integer
            that is no id.
    """

    def __init__(
        self, ids: npt.ArrayLike, titles: Sequence[str] | None = None, offered: npt.ArrayLike | None = None
    ) -> None:
        """Checks the ids.

        Args:
            ids: (N,), unique: integers that all fit int64 or all fit uint64, or strings other than "".
            titles: N strings, or None.
            offered: (N,) bool, or None.

        Raises:
            TypeError: ids other than integers and strings, titles other than a sequence of strings.
            ValueError: ids that repeat, are "" or are out of range, titles or `offered` of another number.
        """
        self.ids = _narrowest("ids", _checked("ids", ids))
        self.titles = None if titles is None else _checked_titles(titles, len(self.ids))
        self.offered = None if offered is None else np.asarray(offered)
        if self.offered is not None and (self.offered.dtype != bool or self.offered.shape != (len(self.ids),)):
            got = f"{self.offered.dtype} {self.offered.shape}"
            raise ValueError(f"offered must be bool ({len(self.ids)},), one entry an item, got {got}")
        self._order = self.ids.argsort(kind="stable")
        self._by_id = self.ids[self._order]
        repeated = self._by_id[1:][self._by_id[1:] == self._by_id[:-1]]
        if len(repeated):
            raise ValueError(f"ids must be unique, got {repeated[0].item()!r} more than once")
        if self._strings and len(self) and self._by_id[0] == "":
            raise ValueError('ids must not be "", the mark of a missing item, got one')
        self.missing: int | str = "" if self._strings else _largest_negative_absent(self._by_id)

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def _strings(self) -> bool:
        return self.ids.dtype.kind == "U"

    def find(self, ids: npt.ArrayLike) -> npt.NDArray[np.int64]:
        """Item numbers (n,) int64 of n ids, -1 for an id that is not in the catalogue. Integers are compared exactly.

        Raises:
            TypeError: integer ids for a catalogue of strings, or the other way around.
            ValueError: ids of more than one dimension.
        """
        given = _checked("item ids", ids)
        if len(given) == 0 or len(self) == 0:
            return np.full(len(given), -1, np.int64)
        if (given.dtype.kind == "U") != self._strings:
            raise TypeError(f"item ids must be {_kind(self.ids)}, as the catalogue's, got {_kind(given)}")
        inside: Any = True
        if not self._strings:
            limits = np.iinfo(self.ids.dtype)
            inside = (given >= limits.min) & (given <= limits.max)
            given = np.where(inside, given, 0).astype(self.ids.dtype)
        places = np.searchsorted(self._by_id, given).clip(max=len(self) - 1)
        return np.where(inside & (self._by_id[places] == given), self._order[places], -1)

    def of(self, numbers: npt.NDArray[np.int64]) -> npt.NDArray[Any]:
        """Ids of item numbers of any shape, `missing` for -1.

        Strings, int64, or Python integers in an array of objects where the catalogue's ids are uint64: no integer
        dtype holds both 2^63 and -1.
        """
        wide = self.ids.dtype == np.uint64
        found = np.full(np.shape(numbers), self.missing, object if wide else self.ids.dtype)
        found[numbers >= 0] = self.ids[numbers[numbers >= 0]]
        return found

    def title(self, name: Any) -> str:
        """The title of an id; the id itself in a catalogue without titles.

        Raises:
            KeyError: the id is not in the catalogue.
        """
        number = int(self.find([name])[0])
        if number < 0:
            raise KeyError(name)
        return str(name) if self.titles is None else self.titles[number]

    def save(self, path: Path) -> None:
        """Write a Parquet file with a column `id`, and columns `title` and `offered` if there are such."""
        import pyarrow
        from pyarrow import parquet

        columns = {"id": self.ids} | ({} if self.titles is None else {"title": self.titles})
        columns |= {} if self.offered is None else {"offered": self.offered}
        with replace_file(path) as file:
            parquet.write_table(pyarrow.table(columns), file)

    @classmethod
    def load(cls, path: Path) -> "Catalogue":
        """Read a file of `save`, or any Parquet file with a column `id` and perhaps `title` and `offered`.

        Raises:
            FileNotFoundError: the file does not exist.
            ValueError: the file is damaged or holds something else; the message names it.
        """
        import pyarrow
        from pyarrow import parquet

        try:
            with parquet.ParquetFile(path) as file:
                table = file.read([name for name in ("id", "title", "offered") if name in file.schema_arrow.names])
            ids = table.column("id").to_numpy()
            columns = table.column_names
            titles = table.column("title").to_pylist() if "title" in columns else None
            return cls(ids, titles, table.column("offered").to_numpy() if "offered" in columns else None)
        except FileNotFoundError:
            raise FileNotFoundError(f"{path} does not exist") from None
        except (pyarrow.ArrowException, KeyError, OSError, OverflowError, TypeError, ValueError) as error:
            raise ValueError(f"{path} must be a Parquet file of item ids and titles, got {error}") from None


def _kind(ids: npt.NDArray[Any]) -> str:
    return "strings" if ids.dtype.kind == "U" else "integers"


def _checked(name: str, ids: npt.ArrayLike) -> npt.NDArray[Any]:
    """Ids (n,) as int64, uint64, strings, or objects that are Python integers beyond both."""
    array = ids if isinstance(ids, np.ndarray) else np.asarray(ids)
    if array.size == 0 and array.ndim == 1:
        return array if array.dtype.kind in "iuU" else array.astype(np.int64)
    if array.dtype.kind not in "iu" and not (array is ids and array.dtype.kind == "U"):
        # NumPy makes floats of integers on both sides of 2^63 and strings of what is mixed with strings.
        array = np.asarray(ids, object)
        types = {type(each) for each in array.flat}
        if all(issubclass(each, str) for each in types):
            array = array.astype(np.str_)
        elif all(issubclass(each, (int, np.integer)) and each is not bool for each in types):
            array = np.array([int(each) for each in array.flat], object).reshape(array.shape)
        else:
            got = " and ".join(sorted(each.__name__ for each in types))
            raise TypeError(f"{name} must be integers only or strings only, got {got}")
    if array.ndim != 1:
        raise ValueError(f"{name} must be of shape (n,), got {array.shape}")
    return array


def _narrowest(name: str, ids: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Integers as int64, or as uint64 if one of them needs it; strings as they are."""
    if ids.dtype.kind == "U":
        return ids
    low, high = (int(ids.min()), int(ids.max())) if len(ids) else (0, 0)
    if low < _INT64.min or high > (_INT64.max if low < 0 else _UINT64.max):
        raise ValueError(f"{name} must all fit int64 or all fit uint64, got {low} and {high}")
    return ids.astype(np.int64 if high <= _INT64.max else np.uint64)


def _largest_negative_absent(ascending: npt.NDArray[Any]) -> int:
    descending = ascending[ascending < 0][::-1]  # none where ids are uint64
    gaps = np.flatnonzero(descending != -1 - np.arange(len(descending)))
    return -1 - int(gaps[0] if len(gaps) else len(descending))


def _checked_titles(titles: Sequence[str], N: int) -> tuple[str, ...]:
    if isinstance(titles, str) or not isinstance(titles, (Sequence, np.ndarray)):
        raise TypeError(f"titles must be a sequence of strings in the order of ids, got {type(titles).__name__}")
    if len(titles) != N:
        raise ValueError(f"titles must be as many as ids, got {len(titles)} and {N}")
    for each in titles:
        if not isinstance(each, str):
            raise TypeError(f"titles must be strings, got {type(each).__name__} {each!r}")
    return tuple(titles)
