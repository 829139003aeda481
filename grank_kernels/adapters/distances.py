"""Exact nearest rows in Euclidean distance, by the inner-product search."""

from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from grank_kernels.mips_topk import mips_topk
from grank_kernels.table.item_table import ItemTable
from grank_kernels.table.row_mask import RowMask

MOST = 2.0**60  # of a norm: products stay below the largest float32, 2^128
_BLOCK = 1 << 21  # float64 numbers of candidate rows at a time: 16 MB
_GROWTH = 8  # of the number of candidates, for queries whose result is not yet certain


def with_norms(rows: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Rows (n, d) with one more column, -|x|^2 / 2, computed in float64: the rows that `nearest` searches.

    Raises:
        ValueError: a row is finite, and its norm 2^60 or more, so that scores could overflow.
    """
    squares = np.einsum("nd,nd->n", rows, rows, dtype=np.float64)
    large = np.isfinite(squares) & (squares >= MOST**2)
    if large.any():
        raise ValueError(f"rows must have norms below 2^60 for Euclidean distances, got {np.sqrt(squares[large][0]):g}")
    return np.concatenate([rows, (-0.5 * squares).astype(np.float32)[:, None]], axis=1)


def nearest(
    queries: torch.Tensor,
    table: ItemTable,
    k: int,
    *,
    allow: RowMask | None = None,
    exclude: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The k rows of smallest squared distance to each query, exactly; equal distances: the smaller id first.

    The table ranks by q.x - |x|^2 / 2 in float32, whose rounding could reorder rows. So more than k candidates are
    taken, their distances are summed directly in float64, and the result is returned once the rounding bound rules
    out all other rows. Otherwise the search is repeated with more candidates.

    Args:
        queries: (B, d) float32.
        table: float32 rows (N, d + 1) from `with_norms`.
        k: 1 or more.
        allow: the eligible rows; None: all.
        exclude: (B, E) int64, ids never to return, by query.

    Returns:
        Squared distances (B, k), the float64 sums rounded to float32, ascending; ids (B, k) int64. Places without a
        result, and distances that are NaN or infinite, are (inf, -1).

    Raises:
        ValueError: a query is finite, and its norm 2^60 or more.
    """
    B, n = len(queries), len(table)
    norms = queries.double().norm(dim=1)
    if bool(((norms >= MOST) & norms.isfinite()).any()):
        raise ValueError(f"queries must have norms below 2^60 for Euclidean distances, got {float(norms.max()):g}")
    distances = torch.full((B, k), torch.inf, device=queries.device)
    ids = torch.full((B, k), -1, device=queries.device)
    open_queries, count = torch.arange(B, device=queries.device), min(n, 2 * k + 16)
    while len(open_queries) and n:
        step = max(1, _BLOCK // (count * table.dim))
        uncertain = []
        for part in torch.split(open_queries, step):
            filters: dict[str, Any] = {"allow": allow, "exclude": None if exclude is None else exclude[part]}
            found, at, certain = _of_candidates(queries[part], table, min(k, count), count, filters)
            distances[part, : found.shape[1]], ids[part, : at.shape[1]] = found, at
            uncertain.append(part[~certain])
        open_queries, count = torch.cat(uncertain), min(n, _GROWTH * count)
    return distances, ids


def _of_candidates(
    queries: torch.Tensor, table: ItemTable, k: int, count: int, filters: dict[str, Any]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Distances (b, k) and ids (b, k) of the nearest of `count` candidates, and whether no other row can be nearer."""
    top = mips_topk(torch.cat([queries, torch.ones_like(queries[:, :1])], 1), table, count, **filters)
    ids, by_id = top.indices.sort(dim=1)  # so that the stable sort by distance leaves equal ones in this order
    there = (ids >= 0) & (top.values.gather(1, by_id) > -torch.inf)
    known = int(table.ids[0])  # a row to read where there is none
    rows = table.rows(ids.where(there, known))[..., :-1].double()
    q = queries.double()
    squares = (rows - q[:, None]).square().sum(2)
    squares = squares.where(there & (squares.float() < torch.inf), torch.inf)  # NaN is not below
    squares, order = squares.sort(dim=1, stable=True)
    squares, ids = squares[:, :k], ids.gather(1, order)[:, :k]
    ids = ids.where(squares < torch.inf, -1)

    # a row x that is no candidate has a score of at most the last one's; if it is nearer than the k-th, then also
    # |x| < |q| + distance. Rounding of a score: d + 1 products and sums, and the column, see table/quantise.py
    last, kth, norm = top.values[:, -1].double(), squares[:, -1], q.norm(dim=1)
    reach = norm + kth.sqrt()
    error = (queries.shape[1] + 17) * 2.0**-22 * (norm * reach + reach.square() / 2)
    certain = (norm.square() - 2 * (last + error) > kth) | (last == -torch.inf)
    return squares.float(), ids, certain | (count == len(table))
