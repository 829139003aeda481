"""`Catalogue`: the items of a model as the world names them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

_KINDS = {"i": "integers", "u": "integers", "U": "strings"}  # of NumPy's dtypes


class Catalogue:
    """Item ids and titles by item number, the row of the model's item table.

    Attributes:
        ids: (N,), integers or strings.
        titles: N readable names, or None.
    """

    def __init__(self, ids: npt.ArrayLike, titles: Sequence[str] | None = None) -> None:
        """Checks the ids.

        Args:
            ids: (N,), unique: integers of 0 or more, or strings, not "".
            titles: N readable names, or None.

        Raises:
            TypeError: ids that are neither integers nor strings.
            ValueError: ids that repeat, are negative or empty, or titles of another number.
        """
        self.ids = np.asarray(ids)
        if self.ids.dtype.kind == "O" and all(isinstance(name, str) for name in self.ids.flat):
            self.ids = self.ids.astype(np.str_)
        if self.ids.dtype.kind not in _KINDS:
            raise TypeError(f"ids must be integers or strings, got {self.ids.dtype}")
        if self.ids.ndim != 1:
            raise ValueError(f"ids have shape {self.ids.shape}; they take (N,)")
        self.titles = None if titles is None else tuple(titles)
        if self.titles is not None and len(self.titles) != len(self.ids):
            raise ValueError(f"titles must be as many as ids, got {len(self.titles)} and {len(self.ids)}")
        self._order = self.ids.argsort(kind="stable")
        self._by_id = self.ids[self._order]
        repeated = self._by_id[1:][self._by_id[1:] == self._by_id[:-1]]
        if len(repeated):
            raise ValueError(f"ids must be unique; {repeated[0]!r} stands there more than once")
        if len(self) and (self._by_id[0] == "" if self._strings else self._by_id[0] < 0):
            raise ValueError(
                f'ids must not be negative or "", got {self._by_id[0]!r}; it marks where nothing was found'
            )

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def _strings(self) -> bool:
        return self.ids.dtype.kind == "U"

    def find(self, ids: npt.ArrayLike) -> npt.NDArray[np.int64]:
        """Item numbers, (n,) int64, of n ids; -1 for those that are not in the catalogue.

        Raises:
            TypeError: ids that are integers where the catalogue's are strings, or the other way around.
            ValueError: ids of more than one dimension.
        """
        given = np.asarray(ids)
        if given.size == 0 or len(self) == 0:
            return np.full(given.size, -1, np.int64)
        takes = _KINDS[self.ids.dtype.kind]
        if _KINDS.get(given.dtype.kind) != takes:
            raise TypeError(f"item ids are {given.dtype}; the catalogue's are {takes}")
        if given.ndim != 1:
            raise ValueError(f"item ids have shape {given.shape}; they take (n,)")
        places = np.searchsorted(self._by_id, given).clip(max=len(self) - 1)
        numbers: npt.NDArray[np.int64] = np.where(self._by_id[places] == given, self._order[places], -1)
        return numbers

    def of(self, numbers: npt.NDArray[np.int64]) -> npt.NDArray[Any]:
        """Ids of item numbers of any shape; for -1 that is -1, or "" where ids are strings."""
        if len(self) == 0:
            return np.full(numbers.shape, "" if self._strings else -1, self.ids.dtype)
        ids = self.ids[numbers.clip(min=0)]
        return np.where(numbers >= 0, ids, "" if self._strings else -1)

    def title(self, name: Any) -> str:
        """The title of an id, or the id itself where there are no titles."""
        return str(name) if self.titles is None else self.titles[int(self.find([name])[0])]

    def save(self, path: Path) -> None:
        """Write a Parquet file with columns `id` and perhaps `title`."""
        import pyarrow
        from pyarrow import parquet

        columns = {"id": self.ids} | ({} if self.titles is None else {"title": self.titles})
        parquet.write_table(pyarrow.table(columns), path)

    @classmethod
    def load(cls, path: Path) -> "Catalogue":
        """Read what `save` has written, or any Parquet file with such columns.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is no such file; the message names it.
        """
        from pyarrow import parquet

        try:
            table = parquet.read_table(path)
            ids = table.column("id").to_numpy()
            return cls(ids, table.column("title").to_pylist() if "title" in table.column_names else None)
        except (KeyError, TypeError, ValueError) as error:  # of which pyarrow's own are some
            raise ValueError(f"{path}: expected a Parquet file of item ids and titles, got {error}") from None
