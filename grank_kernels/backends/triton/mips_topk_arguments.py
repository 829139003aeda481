"""The arguments of the kernels, grouped: tensors become pointers, absent tensors (None) become compile-time constants.

Triton specialises every field on its own, as it does a plain argument: an integer of value 1 is a constant, an address
or an integer divisible by 16 is known to be. A kernel is therefore given the groups it reads and no others.
"""

from typing import Any, NamedTuple


class Queries(NamedTuple):
    """The query vectors.

    Attributes:
        data: (B, d), any strides.
        row_stride: elements from one query to the next.
        column_stride: elements from one column to the next.
        number: B.
        scale: (B,) float32 of int8 queries, else None.
        radius: (B,) float32 factor of a row's error in the upper bound of a score (certified search), else None.
    """

    data: Any
    row_stride: Any
    column_stride: Any
    number: Any
    scale: Any
    radius: Any


class Rows(NamedTuple):
    """The rows of the table, or of one chunk of it.

    Attributes:
        data: (N, d), rows contiguous.
        stride: elements from one row to the next.
        number: N.
        scale: (N,) float32 of int8 rows, else None.
        error: (N,) float32 quantisation error of int8 rows (certified search), else None.
        base: position of the first row in the table.
        ids: external ids by position in the table, or None.
    """

    data: Any
    stride: Any
    number: Any
    scale: Any
    error: Any
    base: Any
    ids: Any


class Allow(NamedTuple):
    """The mask of eligible rows: (B, N) or, with row stride 0, (N,) uint8; `mask` None: every row is eligible."""

    mask: Any
    row_stride: Any
    column_stride: Any


class Exclude(NamedTuple):
    """The excluded ids: query b excludes `ids[offsets[b] : offsets[b + 1]]`; `ids` has `number` entries, or is None."""

    offsets: Any
    ids: Any
    number: Any


class Sample(NamedTuple):
    """The best score of each group of sampled rows.

    Attributes:
        scores: (B, groups) float32, NaN where a group has no eligible row.
        positions: (B, groups) of these rows.
        groups: groups per query.
        size: sampled rows.
    """

    scores: Any
    positions: Any
    groups: Any
    size: Any


class Lists(NamedTuple):
    """Lists of candidates, one per query, and the threshold of each.

    Attributes:
        scores: (lists, size) float32; NaN marks an entry as dropped.
        positions: (lists, size) int32, the bits of an uint32.
        size: entries from one list to the next.
        first: entry that the first candidate is written to; those before hold the best of earlier chunks.
        count: (lists,) candidates found, of which size - first at most are stored.
        score: (lists,) float32 of the threshold.
        tie: (lists,) int64 of the threshold: among equal scores an entry with a tie up to this one passes.
    """

    scores: Any
    positions: Any
    size: Any
    first: Any
    count: Any
    score: Any
    tie: Any


class Progress(NamedTuple):
    """How far the search for each query is.

    Attributes:
        kept: (B,) int32, entries at the beginning of the query's list that are its best so far.
        pending: (B,) int32, 1 where the threshold failed and `collect` must search again.
        number: B.
    """

    kept: Any
    pending: Any
    number: Any


class Listed(NamedTuple):
    """The rows with the largest upper bounds, which `rescore` scores exactly.

    Attributes:
        positions: (B, size) of the rows.
        size: entries from one query's list to the next.
        count: (B,) rows listed.
        bound: (B,) float32, the smallest upper bound in the list; -inf where every row is listed.
        radius: (B,) float32 of the queries; NaN where the bounds hold for no row.
    """

    positions: Any
    size: Any
    count: Any
    bound: Any
    radius: Any


class ProductShape(NamedTuple):
    """Compile-time shape of the product of a tile of rows with a tile of queries.

    Attributes:
        D: columns of a row.
        DEPTH: columns multiplied at a time.
        ITEMS: rows of a tile.
        QUERIES: queries of a tile.
        COMPUTE: Triton dtype of the factors.
    """

    D: int
    DEPTH: int
    ITEMS: int
    QUERIES: int
    COMPUTE: Any
