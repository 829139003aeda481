"""FAISS's flat indexes over an `ItemTable`."""

import threading
import weakref
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from grank_kernels.adapters.distances import nearest, with_norms
from grank_kernels.adapters.faiss.errors import FaissError
from grank_kernels.adapters.faiss.index import METRIC_INNER_PRODUCT, METRIC_L2, Floats, Index
from grank_kernels.adapters.faiss.selectors import Ids, Mask
from grank_kernels.common.checks import check_choice, check_int
from grank_kernels.mips_topk import mips_topk
from grank_kernels.table.item_table import ItemTable
from grank_kernels.table.row_mask import RowMask
from grank_kernels.table.versions import Version

_FLOAT32 = np.finfo(np.float32)
_WAITING = 4096  # rows: an update of the table costs 300 us, a row that waits for it 2 us


class IndexFlat(Index):
    """Rows by position: `faiss.IndexFlat(d, metric)`.

    The ids are the positions, so that a removal renumbers later rows. Single rows wait in memory until something reads
    the table, or until there are 4,096 of them.

    L2 distances are summed in float64 and rounded once to float32, and ranked by the sums; see
    grank_kernels/adapters/distances.py.
    """

    def __init__(self, d: int, metric: int = METRIC_L2, *, dtype: torch.dtype = torch.float32) -> None:
        """An empty index.

        Args:
            d: width of a row.
            metric: `METRIC_INNER_PRODUCT` or `METRIC_L2`.
            dtype: torch.float32, float16, bfloat16 or int8, of the rows in the table, see `ItemTable`; L2 takes
                float32.
        """
        if metric not in (METRIC_INNER_PRODUCT, METRIC_L2):
            raise FaissError(f"metric must be METRIC_INNER_PRODUCT (0) or METRIC_L2 (1), got {metric}")
        if metric == METRIC_L2 and dtype != torch.float32:
            raise FaissError(f"dtype must be torch.float32 for METRIC_L2, got {dtype}: METRIC_INNER_PRODUCT takes it")
        check_choice("dtype", dtype, (torch.float32, torch.float16, torch.bfloat16, torch.int8))
        self.d, self.metric_type = int(check_int("d", d, 1)), metric
        self._filling = threading.Lock()
        self._dtype, self._device = dtype, torch.device("cpu")
        self.reset()

    # ---- the table ----

    @property
    def table(self) -> ItemTable:
        """The table of the rows, for all other arguments of `mips_topk`; updates of the index may replace it.

        Its ids ascend with the positions. Of an L2 index it has one more column, see `distances.with_norms`. A table
        may be set, for example a loaded one: positions are then in the order of its ids.
        """
        self._store_waiting()
        return self._table

    @table.setter
    def table(self, table: ItemTable) -> None:
        if not isinstance(table, ItemTable) or self.metric_type == METRIC_L2 or table.dim != self.d:
            raise FaissError(f"table must be an ItemTable of width {self.d}, for METRIC_INNER_PRODUCT, got {table!r}")
        self._set(table)

    def _set(self, table: ItemTable) -> None:
        self._table, self._dtype, self._device = table, table.dtype, table.device
        self._waiting: list[Floats] = []
        self._num_waiting = 0
        self._latest: tuple[weakref.ref[Version], Ids | None] | None = None

    def _empty(self) -> ItemTable:
        width = self.d + (self.metric_type == METRIC_L2)
        return ItemTable.from_rows(torch.empty(0, width, dtype=torch.float32, device=self._device), dtype=self._dtype)

    def _table_ids(self) -> Ids | None:
        """The table's ids by position, ascending; None: they are the positions."""
        version = self.table.current
        if self._latest is None or self._latest[0]() is not version:
            ids: Ids | None = None
            if version.columns.ids is not None:
                ids = np.sort(self._table.ids.numpy(force=True))
                if not len(ids) or (ids[0] == 0 and ids[-1] == len(ids) - 1):
                    ids = None
            self._latest = weakref.ref(version), ids
        return self._latest[1]

    def _ids_at(self, positions: Ids) -> torch.Tensor:
        """The table's ids of positions."""
        ids = self._table_ids()
        return torch.from_numpy(positions if ids is None else ids[positions]).to(self._device)

    def _store_waiting(self) -> None:
        if self._waiting:
            with self._filling:
                if self._waiting:  # no other thread was first
                    self._store(np.concatenate(self._waiting))
                    self._waiting, self._num_waiting = [], 0

    def _store(self, rows: Floats) -> None:
        x = torch.from_numpy(rows).to(self._device)
        if not len(self._table) and self._table.current.coarse is None:
            self._table, self._latest = ItemTable.from_rows(x, dtype=self._dtype), None  # without room for updates
            return
        first = int(self._table.ids.max()) + 1 if len(self._table) else 0
        self._table.upsert(torch.arange(first, first + len(x), device=self._device), x)

    # ---- FAISS's names ----

    @property
    def ntotal(self) -> int:
        """Number of rows."""
        return len(self._table) + self._num_waiting

    @property
    def flat(self) -> "IndexFlat":
        """The index itself."""
        return self

    def reset(self) -> None:
        """Removes all rows."""
        self._set(self._empty())

    def add(self, x: npt.ArrayLike) -> None:
        """Adds rows (n, d); their ids continue after the last row.

        Raises:
            FaissError: x has another shape, NaN or an infinity for int8, or the table is memory-mapped.
            ValueError: a finite row of an L2 index has a norm of 2^60 or more.
        """
        rows = self._rows(x)
        if self._dtype == torch.int8 and not np.isfinite(rows).all():
            raise FaissError("x must be finite for int8 rows, got NaN or infinity")
        if self._table.current.mapping is not None:
            raise FaissError("the index must be in memory to be updated, got a memory-mapped table")
        if not len(rows):
            return
        if self.metric_type == METRIC_L2:
            rows = with_norms(rows)
        if self._num_waiting + len(rows) < _WAITING:
            with self._filling:
                self._waiting.append(rows.copy() if isinstance(x, np.ndarray) else rows)
                self._num_waiting += len(rows)
            return
        self._store_waiting()
        with self._filling:
            self._store(rows)

    def add_with_ids(self, x: npt.ArrayLike, ids: npt.ArrayLike) -> None:
        """Raises FaissError, as in FAISS: the ids are the positions."""
        raise FaissError("add_with_ids needs an index with ids, got IndexFlat: IndexIDMap(index) has them")

    def merge_from(self, other: "IndexFlat", add_id: int = 0) -> None:
        """Moves all rows of another index of the same kind to the end of this one; the other is empty afterwards.

        Raises:
            FaissError: the other index has another class, width or dtype, or is this one; or add_id is not 0.
        """
        self._check_mergeable(other)
        if add_id:
            raise FaissError(f"add_id must be 0 for an index without ids, got {add_id}")
        for start in range(0, other.ntotal, _WAITING):
            self.add(other.read(np.arange(start, min(other.ntotal, start + _WAITING))))
        other.reset()

    def _check_mergeable(self, other: Any) -> None:
        if type(other) is not type(self) or other is self:
            raise FaissError(f"other must be another {type(self).__name__}, got {other!r}")
        if (other.d, other.metric_type, other._dtype) != (self.d, self.metric_type, self._dtype):
            raise FaissError(f"other must have the width, metric and dtype of {self!r}, got {other!r}")

    # ---- by position ----

    def best(self, queries: Floats, k: int, selected: Mask | None) -> tuple[Floats, Ids]:
        """Scores (n, k), or squared distances, and positions (n, k) of the best of the selected positions."""
        table = self.table
        allow: RowMask | None = None
        if selected is not None:
            allow = table.mask(self._ids_at(np.flatnonzero(selected)))
        x = torch.from_numpy(queries).to(self._device)
        if self.metric_type == METRIC_L2:
            scores, ids = nearest(x, table, k, allow=allow)
            nothing = _FLOAT32.max
        else:
            scores, ids = mips_topk(x, table, k, allow=allow)
            ids = ids.where(scores > float(_FLOAT32.min), -1)  # as in FAISS
            nothing = _FLOAT32.min
        positions, values = ids.numpy(force=True), scores.numpy(force=True)
        table_ids, found = self._table_ids(), positions >= 0
        if table_ids is not None:
            positions = np.where(found, np.searchsorted(table_ids, positions), -1)
        values = np.where(found, values, nothing)
        if self.metric_type == METRIC_INNER_PRODUCT and (values[:, 1:] == values[:, :-1]).any():
            order = np.lexsort((-positions, -values))
            values, positions = np.take_along_axis(values, order, 1), np.take_along_axis(positions, order, 1)
        return values, positions

    def read(self, positions: Ids) -> Floats:
        """The rows (n, d) at positions, float32."""
        rows = self.table.rows(self._ids_at(positions)).numpy(force=True)
        return np.ascontiguousarray(rows[:, : self.d])

    def _ids(self) -> Ids:
        return np.arange(self.ntotal)

    def _positions(self, ids: Ids) -> Ids:
        unknown = (ids < 0) | (ids >= self.ntotal)
        if unknown.any():
            raise FaissError(f"key must be in [0, {self.ntotal}), got {ids[unknown][0]}")
        return ids

    def _remove(self, mask: Mask) -> None:
        table = self.table
        table.remove(self._ids_at(np.flatnonzero(mask)))

    # ---- copies ----

    def __getstate__(self) -> dict[str, Any]:
        table = self.table  # with the rows that wait
        kept = {name: x for name, x in self.__dict__.items() if name != "_filling"}
        return kept | {"_table": table, "_latest": None, "_waiting": [], "_num_waiting": 0}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._filling = threading.Lock()

    def __repr__(self) -> str:
        dtype, metric = str(self._dtype).removeprefix("torch."), ("inner product", "L2")[self.metric_type]
        return f"{type(self).__name__}({self.ntotal:_} x {self.d} {dtype}, {metric}, {self._device})"


class IndexFlatIP(IndexFlat):
    """`faiss.IndexFlatIP(d)`: inner product."""

    def __init__(self, d: int, *, dtype: torch.dtype = torch.float32) -> None:
        """An empty index; arguments as of `IndexFlat`."""
        super().__init__(d, METRIC_INNER_PRODUCT, dtype=dtype)


class IndexFlatL2(IndexFlat):
    """`faiss.IndexFlatL2(d)`: squared Euclidean distance."""

    def __init__(self, d: int) -> None:
        """An empty index; d is the width of a row."""
        super().__init__(d, METRIC_L2)


class ScalarQuantizer:
    """FAISS's numbers of row formats."""

    QT_8bit, QT_fp16, QT_bf16 = 0, 3, 7


class IndexScalarQuantizer(IndexFlat):
    """`faiss.IndexScalarQuantizer(d, qtype, METRIC_INNER_PRODUCT)`: rows of 8 or 16 bits.

    8 bits are the table's int8 rows, with a scale a row instead of FAISS's range a column, and need no training.
    """

    def __init__(self, d: int, qtype: int = ScalarQuantizer.QT_8bit, metric: int = METRIC_L2) -> None:
        """An empty index.

        Args:
            d: width of a row.
            qtype: `ScalarQuantizer.QT_8bit`, `QT_fp16` or `QT_bf16`.
            metric: `METRIC_INNER_PRODUCT`; FAISS's default, `METRIC_L2`, is refused.
        """
        dtypes = {
            ScalarQuantizer.QT_8bit: torch.int8,
            ScalarQuantizer.QT_fp16: torch.float16,
            ScalarQuantizer.QT_bf16: torch.bfloat16,
        }
        if qtype not in dtypes:
            raise FaissError(f"qtype must be QT_8bit, QT_fp16 or QT_bf16 of ScalarQuantizer, got {qtype}")
        super().__init__(d, metric, dtype=dtypes[qtype])
