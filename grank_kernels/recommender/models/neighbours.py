"""Baselines without training: item-kNN by co-occurrence, and popularity."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from grank_kernels.common.checks import check_int
from grank_kernels.mips_topk import TopK, mips_topk
from grank_kernels.recommender.data.histories import Histories

_ENTRIES = 1 << 24  # of a chunk of a sparse product, at most 200 MB if no entry is zero


class ItemKNN:
    """Scores items by their co-occurrence with the items of a history (Deshpande and Karypis, TOIS 2004, section 4).

    The similarity of two items is the cosine of their columns in the user-item matrix, `|A and B| / sqrt(|A| |B|)` with
    A and B the sets of their users. Every item keeps its nearest neighbours. An item's score for a history is the sum
    of its similarities to those items of the history that have it as a neighbour.
    """

    def __init__(self, similarities: Any) -> None:
        """From a SciPy CSR matrix (N, N) float32 whose row j holds the neighbours of item j; `fit` makes it."""
        self._similarities = similarities

    @classmethod
    def fit(cls, histories: Histories, num_items: int, *, neighbours: int = 100) -> "ItemKNN":
        """Count co-occurrences.

        Args:
            histories: histories of the training users.
            num_items: size of the corpus, N.
            neighbours: number of neighbours that an item keeps.

        Raises:
            ImportError: SciPy is not installed.
            ValueError: `num_items` or `neighbours` is below 1, or an item is outside [0, num_items).
        """
        for name, value in (("num_items", num_items), ("neighbours", neighbours)):
            check_int(name, value, 1)
        users = _incidence(histories, num_items)
        items = users.T.tocsr()
        scale = 1 / np.sqrt(np.maximum(np.diff(items.indptr), 1)).astype(np.float32)
        parts = []
        step = max(1, _ENTRIES // num_items)
        for first in range(0, num_items, step):
            part = items[first : first + step] @ users
            rows = np.repeat(np.arange(part.shape[0]) + first, np.diff(part.indptr))
            part.data *= scale[rows] * scale[part.indices]
            part.data[rows == part.indices] = 0
            parts.append(_best(part, neighbours))
        return cls(_sparse().vstack(parts, format="csr"))

    def recommend(self, histories: Histories, k: int) -> TopK:
        """The k items of largest score outside the history.

        Args:
            histories: B histories.
            k: 1 or more.

        Returns:
            `TopK(values, indices)`, (B, k) float32 and int64, padded with -inf and -1 after the last item with a
            positive score. Equal scores: the smaller index first.
        """
        k = check_int("k", k, 1)
        num_items = self._similarities.shape[0]
        values = np.full((len(histories), k), -np.inf, np.float32)
        indices = np.full((len(histories), k), -1, np.int64)
        users = _incidence(histories, num_items)
        step = max(1, _ENTRIES // num_items)
        for first in range(0, len(histories), step):
            seen = users[first : first + step]
            scores = seen @ self._similarities
            found = _best(scores - scores.multiply(seen), k)
            rows = np.repeat(np.arange(found.shape[0]), np.diff(found.indptr))
            places = np.arange(found.nnz) - found.indptr[rows]
            values[first + rows, places], indices[first + rows, places] = found.data, found.indices
        return TopK(torch.from_numpy(values), torch.from_numpy(indices))


class Popularity:
    """The most frequent items outside the history.

    Also an inner-product search: an item's vector is its count, every user's vector is 1.
    """

    def __init__(self, counts: Tensor) -> None:
        """From the number of training rows of each item, (N,) float32; `fit` counts them."""
        self.counts = counts

    @classmethod
    def fit(cls, histories: Histories, num_items: int) -> "Popularity":
        """Count the rows of every item of a corpus of `num_items` in the training users' histories."""
        _check_items(histories, num_items)
        return cls(torch.bincount(histories.items, minlength=num_items).float())

    def recommend(self, histories: Histories, k: int) -> TopK:
        """As `ItemKNN.recommend`; items without a training row are last, with value 0."""
        ones = torch.ones(len(histories), 1)
        return mips_topk(ones, self.counts.unsqueeze(1), k, exclude=(histories.offsets, histories.items))


def _check_items(histories: Histories, num_items: int) -> None:
    if len(histories.items):
        low, high = (int(x) for x in histories.items.aminmax())
        if low < 0 or high >= num_items:
            raise ValueError(f"histories must hold items from 0 to {num_items - 1}, got {low} to {high}")


def _incidence(histories: Histories, num_items: int) -> Any:
    """The user-item matrix, SciPy CSR (U, N) float32 of ones."""
    _check_items(histories, num_items)
    items, offsets = histories.items.numpy(), histories.offsets.numpy()
    ones = np.ones(len(items), np.float32)
    matrix = _sparse().csr_matrix((ones, items, offsets), shape=(len(histories), num_items), copy=True)
    matrix.sum_duplicates()
    matrix.data[:] = 1
    return matrix


def _best(matrix: Any, k: int) -> Any:
    """The k largest positive entries of each row of a CSR matrix, in descending order; equal ones by column."""
    rows = np.repeat(np.arange(matrix.shape[0]), np.diff(matrix.indptr))
    order = np.lexsort((matrix.indices, -matrix.data, rows))
    rows, data = rows[order], matrix.data[order]
    keep = (np.arange(len(order)) - matrix.indptr[rows] < k) & (data > 0)
    offsets = np.concatenate(([0], np.cumsum(np.bincount(rows[keep], minlength=matrix.shape[0]))))
    return _sparse().csr_matrix((data[keep], matrix.indices[order][keep], offsets), shape=matrix.shape)


def _sparse() -> Any:
    try:
        from scipy import sparse
    except ImportError:
        raise ImportError("item-kNN needs scipy: pip install 'grank-kernels[train]'") from None
    return sparse
