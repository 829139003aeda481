"""What all indexes with FAISS's names can do."""

from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import numpy.typing as npt

from grank_kernels.adapters.faiss.errors import FaissError
from grank_kernels.adapters.faiss.selectors import Ids, IDSelector, IDSelectorBatch, Mask, SearchParameters, selector_of
from grank_kernels.common.checks import check_int

if TYPE_CHECKING:
    from grank_kernels.adapters.faiss.flat import IndexFlat

Floats = npt.NDArray[np.float32]
Numbers = TypeVar("Numbers", bound=npt.NDArray[Any])
METRIC_INNER_PRODUCT, METRIC_L2 = 0, 1
_RESULTS = 1 << 22  # scores and ids of a range search at a time


class Index:
    """What all indexes can do.

    As in FAISS, arrays are converted to float32; places without a result have the id -1 and, as score, the smallest
    float32 (inner product) or the largest (L2); of equal scores the larger position comes first (inner product), or the
    smaller (L2). Where only some of several equal scores are among the best k, those of smaller positions are returned;
    FAISS leaves that open for the inner product.

    Attributes:
        d: width of a row.
        metric_type: `METRIC_INNER_PRODUCT` or `METRIC_L2`.
        verbose: as in FAISS; there is nothing to report.
    """

    d: int
    metric_type: int
    is_trained = True
    metric_arg = 0.0
    verbose = False

    # ---- what the kinds of index differ in ----

    @property
    def ntotal(self) -> int:
        """Number of rows."""
        raise NotImplementedError

    @property
    def flat(self) -> "IndexFlat":
        """The index of the rows by position."""
        raise NotImplementedError

    def _ids(self) -> Ids:
        """Ids by position."""
        raise NotImplementedError

    def _positions(self, ids: Ids) -> Ids:
        """Positions of ids, to read their rows; FaissError for ids that are not there."""
        raise NotImplementedError

    def _remove(self, mask: Mask) -> None:
        """Removes the rows at the marked positions."""
        raise NotImplementedError

    # ---- what follows from it ----

    def train(self, x: npt.ArrayLike) -> None:
        """Does nothing, for an exact index has nothing to learn; x must have the index's width."""
        self._rows(x)

    def search(
        self,
        x: npt.ArrayLike,
        k: int,
        *,
        params: SearchParameters | None = None,
        D: Floats | None = None,
        I: Ids | None = None,  # noqa: E741  FAISS's name
    ) -> tuple[Floats, Ids]:
        """Scores or squared distances (n, k) and ids (n, k) of the best k rows for each query, best first.

        Args:
            x: queries (n, d).
            k: 1 or more.
            params: `SearchParameters(sel=...)`, the eligible ids.
            D: array (n, k) float32 to write the scores to.
            I: array (n, k) int64 to write the ids to.

        Raises:
            ValueError: an argument has another shape.
        """
        values, positions = self._best(x, k, params)
        return _filled("D", D, values), _filled("I", I, self._named(positions))

    def assign(self, x: npt.ArrayLike, k: int, labels: Ids | None = None) -> Ids:
        """The ids of `search` alone."""
        return _filled("labels", labels, self._named(self._best(x, k, None)[1]))

    def search_and_reconstruct(
        self,
        x: npt.ArrayLike,
        k: int,
        *,
        params: SearchParameters | None = None,
        D: Floats | None = None,
        I: Ids | None = None,  # noqa: E741
        R: Floats | None = None,
    ) -> tuple[Floats, Ids, Floats]:
        """`search`, and the rows found, (n, k, d) float32, with NaN in places without a result."""
        values, positions = self._best(x, k, params)
        rows = np.full((*positions.shape, self.d), np.nan, np.float32)
        rows[positions >= 0] = self.flat.read(positions[positions >= 0])
        return _filled("D", D, values), _filled("I", I, self._named(positions)), _filled("R", R, rows)

    def range_search(
        self, x: npt.ArrayLike, thresh: float, *, params: SearchParameters | None = None
    ) -> tuple[npt.NDArray[np.uint64], Floats, Ids]:
        """All rows with a score above `thresh`, or a squared distance below it, in the order of their positions.

        Returns:
            Offsets (n + 1,): the results of query i are `offsets[i]` to `offsets[i + 1]`; scores; ids.
        """
        found: list[tuple[Floats, Ids]] = []
        queries, selected = self._rows(x), self._selected(params)
        start, k = 0, 1024
        while start < len(queries):
            count = max(1, min(self.ntotal, k))
            part = queries[start : start + max(1, _RESULTS // count)]
            values, positions = self.flat.best(part, count, selected)
            inside = (values < thresh) if self.metric_type == METRIC_L2 else (values > thresh)
            inside &= positions >= 0
            if inside[:, -1].any() and count < self.ntotal:  # there may be more
                k *= 8
                continue
            for own_values, own_positions, own in zip(values, positions, inside, strict=True):
                order = np.argsort(own_positions[own])
                found.append((own_values[own][order], own_positions[own][order]))
            start += len(part)
        ends = np.cumsum([0, *(len(own) for own, _ in found)]).astype(np.uint64)
        if not found:
            return ends, np.empty(0, np.float32), np.empty(0, np.int64)
        return ends, np.concatenate([own for own, _ in found]), self._named(np.concatenate([at for _, at in found]))

    def reconstruct(self, key: int, x: Floats | None = None) -> Floats:
        """The row (d,) of an id, written to x if given; of repeated ids the row added last.

        Raises:
            FaissError: there is no row of this id.
        """
        row: Floats = self.reconstruct_batch(np.asarray([key]))[0]
        return _filled("x", x, row)

    def reconstruct_batch(self, key: npt.ArrayLike, x: Floats | None = None) -> Floats:
        """The rows (n, d) of ids (n,); errors as `reconstruct`."""
        ids = np.asarray(key, np.int64)
        if ids.ndim != 1:
            raise FaissError(f"key must be (n,), got {ids.shape}")
        return _filled("x", x, self.flat.read(self._positions(ids)))

    def reconstruct_n(self, n0: int = 0, ni: int = -1, x: Floats | None = None) -> Floats:
        """The rows (ni, d) of the ids n0, n0 + 1, ...; ni = -1: up to `ntotal`. Errors as `reconstruct`."""
        count = max(0, self.ntotal - n0) if ni == -1 else ni
        return _filled("x", x, self.reconstruct_batch(np.arange(n0, n0 + count)))

    def remove_ids(self, x: "npt.ArrayLike | IDSelector") -> int:
        """Removes the rows of some ids, an array or a selector, and returns their number; unknown ids are ignored."""
        selector = x if isinstance(x, IDSelector) else IDSelectorBatch(np.asarray(x, np.int64))
        mask = selector.members(self._ids())
        count = int(mask.sum())
        if count:
            self._remove(mask)
        return count

    def _named(self, positions: Ids) -> Ids:
        """Ids of positions, -1 for -1."""
        return positions

    def _best(self, x: npt.ArrayLike, k: int, params: SearchParameters | None) -> tuple[Floats, Ids]:
        return self.flat.best(self._rows(x), check_int("k", k, 1), self._selected(params))

    def _selected(self, params: SearchParameters | None) -> Mask | None:
        """The eligible positions; None: all."""
        selector = selector_of(params)
        return None if selector is None else selector.members(self._ids())

    def _rows(self, x: npt.ArrayLike) -> Floats:
        rows: Floats = np.ascontiguousarray(x, np.float32)
        if rows.ndim != 2 or rows.shape[1] != self.d:
            raise FaissError(f"x must be (n, {self.d}), got {rows.shape}")
        return rows


def _filled(name: str, given: Numbers | None, computed: Numbers) -> Numbers:
    """The result, written to the array that the caller gave, if any."""
    if given is None:
        return computed
    if not isinstance(given, np.ndarray) or (given.shape, given.dtype) != (computed.shape, computed.dtype):
        kind = f"{given.dtype} {given.shape}" if isinstance(given, np.ndarray) else type(given).__name__
        raise FaissError(f"{name} must be an array {computed.dtype} {computed.shape}, got {kind}")
    given[...] = computed
    return given
