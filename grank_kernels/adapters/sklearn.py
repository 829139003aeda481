"""`sklearn.neighbors.NearestNeighbors` with `algorithm="brute"`, by `mips_topk`."""

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from scipy import sparse
from sklearn.base import BaseEstimator
from sklearn.utils.validation import check_is_fitted, validate_data

from grank_kernels.adapters.distances import nearest, with_norms
from grank_kernels.common.checks import check_choice, check_int
from grank_kernels.mips_topk import mips_topk
from grank_kernels.table.item_table import ItemTable

Floats = npt.NDArray[np.float32]


class NearestNeighbors(BaseEstimator):  # type: ignore[misc] # scikit-learn has no types
    """Exact nearest neighbours by Euclidean or cosine distance.

    Rows and queries are converted to float32. Euclidean distances are summed in float64, and ranked by the sums. Cosine
    distances are 1 - the inner product of rows and queries of norm 1, in float32; a row of zeros is at distance 1.
    Equal distances: the smaller index first.

    Attributes:
        n_samples_fit_: number of rows.
        n_features_in_: width of a row.
        table_: the rows, normalised for cosine, with one more column for Euclidean distance.
    """

    def __init__(
        self, *, n_neighbors: int = 5, metric: str = "euclidean", algorithm: str = "brute", n_jobs: int | None = None
    ) -> None:
        """Takes scikit-learn's parameters.

        Args:
            n_neighbors: default of `kneighbors`.
            metric: "euclidean" or "cosine".
            algorithm: "brute" or "auto", which are the same here.
            n_jobs: accepted and unneeded: searches use the threads of torch.
        """
        self.n_neighbors, self.metric, self.algorithm, self.n_jobs = n_neighbors, metric, algorithm, n_jobs

    def fit(self, X: npt.ArrayLike, y: object = None) -> "NearestNeighbors":
        """Keeps a copy of the rows (N, d).

        Raises:
            ValueError: a parameter is not one of those named above, or X has another shape, NaN or an infinity.
        """
        check_choice("metric", self.metric, ("euclidean", "cosine"))
        check_choice("algorithm", self.algorithm, ("brute", "auto"))
        check_int("n_neighbors", self.n_neighbors, 1)
        rows = validate_data(self, X, dtype=np.float32, order="C")
        self.n_samples_fit_ = len(rows)
        self.effective_metric_ = self.metric
        self.table_ = ItemTable.from_rows(with_norms(rows) if self.metric == "euclidean" else _normalised(rows))
        return self

    def kneighbors(
        self, X: npt.ArrayLike | None = None, n_neighbors: int | None = None, return_distance: bool = True
    ) -> Any:
        """The nearest rows of each query.

        Args:
            X: queries (n, d); None: the rows themselves, each without itself.
            n_neighbors: number of neighbours; None: the parameter.
            return_distance: whether to return distances, too.

        Returns:
            Distances (n, n_neighbors) float32, ascending, and positions (n, n_neighbors) int64; or the positions alone.

        Raises:
            ValueError: there are fewer rows than neighbours, or X is refused as by `fit`.
        """
        check_is_fitted(self)
        k = check_int("n_neighbors", self.n_neighbors if n_neighbors is None else n_neighbors, 1)
        own = None
        if X is None:
            own = torch.arange(self.n_samples_fit_)
            queries = self.table_.rows(own)
            queries = queries[:, : self.n_features_in_].contiguous()
        else:
            rows = validate_data(self, X, reset=False, dtype=np.float32, order="C")
            queries = torch.from_numpy(rows if self.metric == "euclidean" else _normalised(rows))
        most = self.n_samples_fit_ - (own is not None)
        if k > most:
            raise ValueError(
                f"Expected n_neighbors <= n_samples_fit, but n_neighbors = {k}, n_samples_fit = {most}, "
                f"n_samples = {len(queries)}"
            )
        exclude = None if own is None else own[:, None]
        if self.metric == "euclidean":
            squares, ids = nearest(queries, self.table_, k, exclude=exclude)
            distances = squares.sqrt()
        else:
            scores, ids = mips_topk(queries, self.table_, k, exclude=exclude)
            distances = (1 - scores).clamp(0, 2)
        return (distances.numpy(), ids.numpy()) if return_distance else ids.numpy()

    def kneighbors_graph(
        self, X: npt.ArrayLike | None = None, n_neighbors: int | None = None, mode: str = "connectivity"
    ) -> "sparse.csr_matrix":
        """The neighbours as a sparse matrix (n, N) with ones, or with the distances for mode "distance"."""
        check_choice("mode", mode, ("connectivity", "distance"))
        distances, ids = self.kneighbors(X, n_neighbors)
        data = distances if mode == "distance" else np.ones_like(distances)
        ends = np.arange(0, ids.size + 1, ids.shape[1])
        return sparse.csr_matrix((data.ravel(), ids.ravel(), ends), shape=(len(ids), self.n_samples_fit_))


def _normalised(rows: Floats) -> Floats:
    normalised: Floats = torch.nn.functional.normalize(torch.from_numpy(rows), dim=1).numpy()
    return normalised
