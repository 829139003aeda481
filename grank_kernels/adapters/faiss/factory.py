"""`index_factory`, and FAISS's functions on arrays, indexes and threads."""

import copy
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from grank_kernels.adapters.faiss.errors import FaissError
from grank_kernels.adapters.faiss.flat import IndexFlat, IndexScalarQuantizer, ScalarQuantizer
from grank_kernels.adapters.faiss.id_map import IndexIDMap, IndexIDMap2
from grank_kernels.adapters.faiss.index import METRIC_L2, Floats, Index
from grank_kernels.adapters.faiss.selectors import Ids
from grank_kernels.common.checks import check_int

_ROWS = {
    "Flat": None,
    "SQ8": ScalarQuantizer.QT_8bit,
    "SQfp16": ScalarQuantizer.QT_fp16,
    "SQbf16": ScalarQuantizer.QT_bf16,
}
_ID_MAPS = {"IDMap": IndexIDMap, "IDMap2": IndexIDMap2}


def index_factory(d: int, description: str, metric: int = METRIC_L2) -> Index:
    """An empty exact index.

    Args:
        d: width of a row.
        description: "Flat", "SQfp16", "SQbf16" or "SQ8" (with `METRIC_INNER_PRODUCT`), alone or after "IDMap," or
            "IDMap2,".
        metric: `METRIC_INNER_PRODUCT` or `METRIC_L2`.

    Raises:
        FaissError: any other description, such as that of an approximate index.
    """
    *before, rows = (part.strip() for part in description.split(","))
    if rows not in _ROWS or len(before) > 1 or any(part not in _ID_MAPS for part in before):
        raise FaissError(
            f'description must be "Flat", "SQfp16", "SQbf16" or "SQ8", alone or after "IDMap," or "IDMap2,", got '
            f'{description!r}: exact search has no index to build, so use "Flat", or "SQ8" for a quarter of the bytes'
        )
    quantised = _ROWS[rows]
    index = IndexFlat(d, metric) if quantised is None else IndexScalarQuantizer(d, quantised, metric)
    return _ID_MAPS[before[0]](index) if before else index


def clone_index(index: Index) -> Index:
    """A copy of an index and its rows."""
    return copy.deepcopy(index)


def downcast_index(index: Index) -> Index:
    """The index itself: it has its class already."""
    return index


def normalize_L2(x: Floats) -> None:  # noqa: N802  FAISS's name
    """Divides each row of an array (n, d) by its norm, in place; rows of zeros stay.

    Raises:
        TypeError: x is not a NumPy array.
        ValueError: x is not float32 (n, d), or read-only.
    """
    if not isinstance(x, np.ndarray):
        raise TypeError(f"x must be a NumPy array, changed in place, got {type(x).__name__}")
    if x.dtype != np.float32 or x.ndim != 2 or not x.flags.writeable:
        raise FaissError(f"x must be a writable float32 array (n, d), got {x.dtype} {x.shape}")
    norms = np.sqrt(np.einsum("nd,nd->n", x, x, dtype=np.float64)).astype(np.float32)
    norms[norms == 0] = 1
    x /= norms[:, None]


def knn(xq: npt.ArrayLike, xb: npt.ArrayLike, k: int, metric: int = METRIC_L2) -> tuple[Floats, Ids]:
    """Scores or squared distances (n, k) and positions (n, k) of the best k rows of xb for each row of xq."""
    rows = np.asarray(xb)
    if rows.ndim != 2:
        raise FaissError(f"xb must be (N, d), got {rows.shape}")
    index = IndexFlat(rows.shape[1], metric)
    index.add(rows)
    return index.search(xq, k)


def vector_to_array(v: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """A copy of an array, such as `id_map`."""
    return np.array(v)


def swig_ptr(a: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """The array itself, which selectors take in place of FAISS's pointer."""
    return a


def omp_set_num_threads(num_threads: int) -> None:
    """Sets the number of threads of torch, and so of searches on the CPU."""
    torch.set_num_threads(check_int("num_threads", num_threads, 1))


def omp_get_max_threads() -> int:
    """Number of threads of searches on the CPU."""
    return torch.get_num_threads()
