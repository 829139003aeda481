"""FAISS's names for the searches of this package: a program changes its import."""

import numpy as np
import numpy.typing as npt
import torch

from grank_kernels.common.arrays import as_tensor
from grank_kernels.mips_topk import mips_topk
from grank_kernels.table.item_table import ItemTable

_NOTHING = np.finfo(np.float32).min  # FAISS's score of places without a result


class IndexFlatIP:
    """`faiss.IndexFlatIP(d)`; filled by `add_with_ids`, also `faiss.IndexIDMap(faiss.IndexFlatIP(d))`.

        index = IndexFlatIP(64)  # instead of faiss.IndexFlatIP(64)
        index.add(rows)
        D, I = index.search(queries, 10)

    As in FAISS, arrays are converted to float32, places without a result have the id -1 and the smallest float32 as
    score, and ids of rows added without ids are their positions, so that a removal renumbers later rows. Unlike in
    FAISS, equal scores are ordered by id, and ids are unique.

    Attributes:
        d: width of a row.
        table: the `ItemTable`, for all other arguments of `mips_topk`. Rows added without ids keep there the ids that
            they had when they were added.
    """

    is_trained = True

    def __init__(self, d: int, *, dtype: torch.dtype = torch.float32) -> None:
        """An empty index.

        Args:
            d: width of a row.
            dtype: torch.float32, float16, bfloat16 or int8, of the rows in the table, see `ItemTable`.
        """
        self.d, self._dtype = d, dtype
        self.reset()

    def reset(self) -> None:
        """Removes all rows."""
        nothing = torch.empty(0, dtype=torch.int64)
        self.table = ItemTable.from_rows(torch.empty(0, self.d), ids=nothing, dtype=self._dtype)
        self._given: bool | None = None  # whether rows were added with ids; None: there are no rows
        self._next = 0  # the table's id for the next row added without ids
        self._kept: npt.NDArray[np.int64] | None = None  # the table's ids by position; None: the positions

    @property
    def ntotal(self) -> int:
        """Number of rows."""
        return len(self.table)

    def add(self, x: npt.ArrayLike) -> None:
        """Adds rows (n, d); their ids continue after the last row.

        Raises:
            ValueError: x has another shape, or rows were added with ids.
        """
        rows = self._rows(x)
        ids = np.arange(self._next, self._next + len(rows))
        self._fill(ids, rows, given=False)
        self._next += len(rows)
        if self._kept is not None:
            self._kept = np.concatenate([self._kept, ids])

    def add_with_ids(self, x: npt.ArrayLike, ids: npt.ArrayLike) -> None:
        """Adds rows (n, d) with ids (n,), integers of 0 or more.

        Raises:
            ValueError: x has another shape, ids repeat, are negative or in the index, or rows were added without ids.
        """
        names = np.asarray(ids, np.int64)
        there = self._there(names)
        if there.any():
            raise ValueError(f"ids must be new, got {names[there][0]}, which is in the index: remove it first")
        self._fill(names, self._rows(x), given=True)

    def remove_ids(self, ids: npt.ArrayLike) -> int:
        """Removes rows by id and returns their number; ids that are not in the index are ignored, as in FAISS."""
        names = np.unique(np.asarray(ids, np.int64))
        if self._given is False:
            positions = names[(names >= 0) & (names < self.ntotal)]
            kept = np.arange(self.ntotal) if self._kept is None else self._kept
            names, self._kept = kept[positions], np.delete(kept, positions)
        names = names[self._there(names)]
        self.table.remove(names)
        return len(names)

    def search(self, x: npt.ArrayLike, k: int) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
        """Scores and ids (n, k) of the k rows of largest inner product with each query of x (n, d)."""
        scores, ids = mips_topk(self._rows(x), self.table, k)
        found = ids >= 0
        if self._kept is not None:
            ids = np.where(found, np.searchsorted(self._kept, ids), -1)
        return np.where(found, scores, _NOTHING), ids

    def _there(self, ids: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
        version = self.table.current
        there: npt.NDArray[np.bool_] = (version.find(as_tensor("ids", ids)) < version.size).numpy()
        return there

    def _fill(self, ids: npt.NDArray[np.int64], rows: npt.NDArray[np.float32], *, given: bool) -> None:
        if self._given not in (None, given):
            raise ValueError("rows must all be added with ids, or all without: reset() empties the index")
        self.table.upsert(ids, rows)
        self._given = given

    def _rows(self, x: npt.ArrayLike) -> npt.NDArray[np.float32]:
        rows = np.ascontiguousarray(x, np.float32)
        if rows.ndim != 2 or rows.shape[1] != self.d:
            raise ValueError(f"x must be (n, {self.d}), got {rows.shape}")
        return rows
