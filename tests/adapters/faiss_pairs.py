"""Indexes of ours and of FAISS with the same rows, and comparisons of their results."""

from types import ModuleType
from typing import Any

import numpy as np

RANDOM = np.random.default_rng(1)
X, Q = (RANDOM.integers(-9, 10, (n, 6)).astype(np.float32) for n in (300, 25))  # sums are exact in float32
IDS = RANDOM.permutation(1000)[:300] - 100  # some are negative


def flat(faiss: ModuleType, x: np.ndarray = X) -> Any:
    index = faiss.IndexFlatIP(6)
    index.add(x)
    return index


def squares(faiss: ModuleType, x: np.ndarray = X) -> Any:
    index = faiss.IndexFlatL2(6)
    index.add(x)
    return index


def named(faiss: ModuleType, x: np.ndarray = X, kind: str = "IndexIDMap2", metric: str = "IndexFlatIP") -> Any:
    index = getattr(faiss, kind)(getattr(faiss, metric)(6))
    index.add_with_ids(x, IDS[: len(x)])
    return index


def named_squares(faiss: ModuleType) -> Any:
    return named(faiss, metric="IndexFlatL2")


def named_once(faiss: ModuleType) -> Any:
    return named(faiss, kind="IndexIDMap")


KINDS = [flat, squares, named_once, named, named_squares]


def assert_same(got: Any, wanted: Any) -> None:
    if isinstance(wanted, tuple):
        assert len(got) == len(wanted)
        for one, other in zip(got, wanted, strict=True):
            assert_same(one, other)
    elif isinstance(wanted, np.ndarray):
        assert (got.dtype, got.shape) == (wanted.dtype, wanted.shape)
        np.testing.assert_array_equal(got, wanted)
    else:
        assert got == wanted


def assert_found(index: Any, other: Any, queries: np.ndarray = Q) -> None:
    """The same scores, and the same ids where the scores at place k are not shared with rows beyond it."""
    assert index.ntotal == other.ntotal
    for k in (1, 7, max(1, other.ntotal), other.ntotal + 3):
        got, wanted = index.search(queries, k), other.search(queries, k)
        assert_same(got[0], wanted[0])
        inside = wanted[0] != wanted[0][:, -1:] if k < other.ntotal else np.ones_like(wanted[0], bool)
        assert_same(got[1][inside], wanted[1][inside])
