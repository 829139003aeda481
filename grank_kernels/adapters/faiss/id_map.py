"""FAISS's maps from positions to ids of one's own."""

import numpy as np
import numpy.typing as npt

from grank_kernels.adapters.faiss.errors import FaissError
from grank_kernels.adapters.faiss.flat import IndexFlat
from grank_kernels.adapters.faiss.index import Floats, Index
from grank_kernels.adapters.faiss.selectors import Ids, Mask
from grank_kernels.table.item_table import ItemTable


class IndexIDMap(Index):
    """`faiss.IndexIDMap(index)`: ids of one's own, of any sign, also repeated.

    Attributes:
        index: the index of the rows by position.
    """

    def __init__(self, index: IndexFlat) -> None:
        """Takes an empty flat index.

        Raises:
            FaissError: the index has rows, or is not flat.
        """
        if not isinstance(index, IndexFlat):
            raise FaissError(f"index must be a flat index, got {index!r}")
        if index.ntotal:
            raise FaissError(f"index must be empty, got {index.ntotal} rows")
        self.index, self.d, self.metric_type = index, index.d, index.metric_type
        self._set_ids(np.empty(0, np.int64))

    def _set_ids(self, ids: Ids) -> None:
        self._id_parts = [ids]

    @property
    def id_map(self) -> Ids:
        """Ids by position."""
        if len(self._id_parts) > 1:
            self._id_parts = [np.concatenate(self._id_parts)]
        return self._id_parts[0]

    @property
    def ntotal(self) -> int:
        """Number of rows."""
        return self.index.ntotal

    @property
    def flat(self) -> IndexFlat:
        """The index of the rows by position."""
        return self.index

    @property
    def table(self) -> ItemTable:
        """The table of the rows; its ids ascend with the positions of `id_map`."""
        return self.index.table

    def reset(self) -> None:
        """Removes all rows."""
        self.index.reset()
        self._set_ids(np.empty(0, np.int64))

    def add(self, x: npt.ArrayLike) -> None:
        """Raises FaissError, as in FAISS: rows need ids."""
        raise FaissError(f"add needs an index without ids, got {type(self).__name__}: add_with_ids adds to it")

    def add_with_ids(self, x: npt.ArrayLike, ids: npt.ArrayLike) -> None:
        """Adds rows (n, d) with ids (n,) int64. An id that is there is added once more, as in FAISS.

        Raises:
            FaissError: a shape does not fit.
        """
        names = np.array(ids, np.int64)
        rows = self._rows(x)
        if names.shape != rows.shape[:1]:
            raise FaissError(f"ids must be ({len(rows)},), one a row, got {names.shape}")
        self.index.add(rows)
        self._id_parts.append(names)

    def merge_from(self, other: "IndexIDMap", add_id: int = 0) -> None:
        """Moves all rows of another index of the same class here, `add_id` added to their ids.

        Raises:
            FaissError: as `IndexFlat.merge_from`.
        """
        if type(other) is not type(self):
            raise FaissError(f"other must be another {type(self).__name__}, got {other!r}")
        self.index.merge_from(other.index)
        self._id_parts.append(other.id_map + add_id)
        other.reset()

    def reconstruct_batch(self, key: npt.ArrayLike, x: Floats | None = None) -> Floats:
        """Raises FaissError, as in FAISS."""
        raise FaissError("reconstruct needs IndexIDMap2, which finds rows by id, got IndexIDMap")

    def _ids(self) -> Ids:
        return self.id_map

    def _named(self, positions: Ids) -> Ids:
        return np.where(positions >= 0, self.id_map[positions], -1) if len(self.id_map) else positions

    def _remove(self, mask: Mask) -> None:
        self.index._remove(mask)
        self._set_ids(self.id_map[~mask])

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.index!r})"


class IndexIDMap2(IndexIDMap):
    """`faiss.IndexIDMap2(index)`: `IndexIDMap` with rows found by id."""

    def reconstruct_batch(self, key: npt.ArrayLike, x: Floats | None = None) -> Floats:
        """The rows (n, d) of ids (n,); of repeated ids the row added last.

        Raises:
            FaissError: there is no row of an id.
        """
        return Index.reconstruct_batch(self, key, x)

    def _positions(self, ids: Ids) -> Ids:
        order = np.argsort(self.id_map, kind="stable")
        ascending = self.id_map[order]
        after = np.searchsorted(ascending, ids, side="right") - 1
        unknown = after < 0
        unknown[~unknown] = ascending[after[~unknown]] != ids[~unknown]
        if unknown.any():
            raise FaissError(f"key must be an id of the index, got {ids[unknown][0]}, which is not")
        return order[after]
