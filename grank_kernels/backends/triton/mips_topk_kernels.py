"""Kernels that score: quantise queries, sample, scan and emit, collect.

A tile is ITEMS rows x QUERIES queries: items stand on the M axis of the tensor cores' product, queries on N, whatever the
batch, so that a single query pads N to 16, not M to 64, and one order of accumulation serves all kernels: k ascending,
DEPTH numbers a product, accumulated in float32 (int32 for int8: exact while 127^2 d < 2^31). A score's bits depend on its
query and its row alone.

Bytes: the rows once a call (1/64 more for the sample), queries once a program, candidates O(B k).
Operations: B N d multiply-adds; one compare a score against its query's threshold; the rest behind a gate that a tile
without a candidate does not pass.
"""

import triton
import triton.language as tl

from grank_kernels.backends.triton.selection import LAST_TIE, compact, drop_excluded, kth_best, reaches


@triton.jit
def quantise(queries, row_stride, column_stride, d, numbers, scales, D: tl.constexpr):
    """int8 numbers and the scale of a query: scale = max|q| / 127, q / scale rounded half to even, NaN to 0."""
    query = tl.program_id(0).to(tl.int64)
    most = 0.0
    bad = 0
    for begin in range(0, d, D):
        column = begin + tl.arange(0, D)
        x = tl.load(queries + query * row_stride + column * column_stride, mask=column < d, other=0.0).to(tl.float32)
        bad += tl.sum((x != x).to(tl.int32), 0)
        most = tl.maximum(most, tl.max(tl.where(x == x, tl.abs(x), 0.0), 0))
    scale = tl.where(bad > 0, float("nan"), tl.div_rn(most, 127.0))
    for begin in range(0, d, D):
        column = begin + tl.arange(0, D)
        x = tl.load(queries + query * row_stride + column * column_stride, mask=column < d, other=0.0).to(tl.float32)
        ratio = tl.div_rn(x, tl.zeros((D,), tl.float32) + scale)
        ratio = tl.minimum(tl.maximum(ratio, -127.0), 127.0)
        whole = (ratio + 12582912.0) - 12582912.0  # 1.5 * 2^23: the sum has no fraction, rounded half to even
        tl.store(numbers + query * d + column, tl.where(ratio == ratio, whole, 0.0).to(tl.int8), mask=column < d)
    tl.store(scales + query, scale)


@triton.jit
def _load_queries(queries, row_stride, column_stride, query, column, B, D: tl.constexpr, COMPUTE: tl.constexpr):
    """(DEPTH, QUERIES), transposed, zero outside."""
    inside = (column < D)[:, None] & (query < B)[None, :]
    place = query.to(tl.int64)[None, :] * row_stride + column.to(tl.int64)[:, None] * column_stride
    return tl.load(queries + place, mask=inside, other=0.0).to(COMPUTE)


@triton.jit
def _products(
    first, queries, q_row, q_column, query, B, items, item_stride, row, row_scale, query_scale,
    D: tl.constexpr, DEPTH: tl.constexpr, ITEMS: tl.constexpr, QUERIES: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """Scores (ITEMS, QUERIES) of the rows `row` (int64, all inside the table). `first` holds the queries' first columns."""
    ACCUMULATOR: tl.constexpr = tl.int32 if COMPUTE == tl.int8 else tl.float32
    column = tl.arange(0, DEPTH)
    x = items + row[:, None] * item_stride + column[None, :]
    if D <= DEPTH:
        tile = tl.load(x) if D == DEPTH else tl.load(x, mask=(column < D)[None, :], other=0.0)
        total = tl.dot(tile.to(COMPUTE), first, out_dtype=ACCUMULATOR, input_precision="ieee")
    else:
        total = tl.zeros((ITEMS, QUERIES), ACCUMULATOR)
        for begin in range(0, D, DEPTH):
            inside = (begin + column < D)[None, :]
            tile = tl.load(x + begin) if D % DEPTH == 0 else tl.load(x + begin, mask=inside, other=0.0)
            q = _load_queries(queries, q_row, q_column, query, begin + column, B, D, COMPUTE)
            total = tl.dot(tile.to(COMPUTE), q, total, out_dtype=ACCUMULATOR, input_precision="ieee")
    if COMPUTE == tl.int8:
        x_scale = tl.load(row_scale + row)
        return total.to(tl.float32) * (query_scale[None, :] * x_scale[:, None])
    else:
        return total


@triton.jit
def _allowed(allow, allow_row, allow_column, query, row, mask):
    place = query.to(tl.int64)[None, :] * allow_row + row[:, None] * allow_column
    return tl.load(allow + place, mask=mask, other=0) != 0


@triton.jit
def _emit(
    scores, hit, position, query, live, score, tie, ids, allow, allow_row, allow_column,
    count, to_scores, to_positions, to, room, ITEMS: tl.constexpr, QUERIES: tl.constexpr,
    HAS_IDS: tl.constexpr, HAS_ALLOW: tl.constexpr,
):  # fmt: skip
    """Appends the hits that are rows (`live`), allowed and reach (score, tie) to the candidates of their queries.

    `count` and `to` point to the counter and the candidates of each query. Counting goes on where there is no room, so
    that `select` sees what was lost.
    """
    hit &= live[:, None]
    if HAS_ALLOW:
        hit &= _allowed(allow, allow_row, allow_column, query, position, hit)
    ties = tl.load(ids + position, mask=live, other=0) if HAS_IDS else position
    hit &= reaches(scores, ties[:, None], score[None, :], tie[None, :])
    counters = count[None, :] + tl.zeros((ITEMS, QUERIES), tl.int32)
    slot = tl.atomic_add(counters, tl.full((ITEMS, QUERIES), 1, tl.int32), mask=hit, sem="relaxed")
    hit &= slot.to(tl.uint32) < room  # the count of up to 2^32 - 1 hits is unsigned
    unsigned = tl.where(scores == 0, 0.0, scores)  # one zero, as the contract has it
    tl.store(to_scores + to[None, :] + slot, unsigned, mask=hit)
    places = position.to(tl.int32)[:, None] + tl.zeros((ITEMS, QUERIES), tl.int32)
    tl.store(to_positions + to[None, :] + slot, places, mask=hit)


@triton.jit
def sample(
    queries, q_row, q_column, query_scale, B, items, item_stride, row_scale, N,
    allow, allow_row, allow_column, size, to_scores, to_positions, groups,
    D: tl.constexpr, DEPTH: tl.constexpr, ITEMS: tl.constexpr, QUERIES: tl.constexpr, COMPUTE: tl.constexpr,
    HAS_ALLOW: tl.constexpr,
):  # fmt: skip
    """The best of each group of sampled rows: (B, groups) scores and positions, NaN where a group has none.

    `size` rows are sampled, one of every N / size at a place that looks random; they fall into `groups` in turn. The r-th
    best of the groups is at most the r-th best of the sample, and hardly less while r^2 is small beside the groups; so
    one maximum a score is all it takes, and no list.
    """
    query = tl.program_id(0) * QUERIES + tl.arange(0, QUERIES)
    group = tl.program_id(1) * ITEMS + tl.arange(0, ITEMS)
    first = _load_queries(queries, q_row, q_column, query, tl.arange(0, DEPTH), B, D, COMPUTE)
    q_scale = tl.load(query_scale + query, mask=query < B, other=0.0) if COMPUTE == tl.int8 else 0.0
    best = tl.full((ITEMS, QUERIES), float("nan"), tl.float32)
    place = tl.zeros((ITEMS, QUERIES), tl.int32)
    for begin in range(0, size, groups):
        i = (begin + group).to(tl.int64)
        live = i < size
        stratum = i * N // size
        width = (i + 1) * N // size - stratum
        mixed = (i.to(tl.uint32) + 1) * 0x9E3779B1
        row = tl.minimum(stratum + ((mixed.to(tl.int64) * width) >> 32), N - 1)
        scores = _products(
            first, queries, q_row, q_column, query, B, items, item_stride, row, row_scale, q_scale,
            D, DEPTH, ITEMS, QUERIES, COMPUTE,
        )  # fmt: skip
        better = live[:, None] & ((scores > best) | ((best != best) & (scores == scores)))
        if HAS_ALLOW:
            better &= _allowed(allow, allow_row, allow_column, query, row, better & (query < B)[None, :])
        best = tl.where(better, scores, best)
        place = tl.where(better, row.to(tl.int32)[:, None], place)
    to = query.to(tl.int64)[None, :] * groups + group[:, None]
    inside = (query < B)[None, :] & (group < groups)[:, None]
    tl.store(to_scores + to, tl.where(best == 0, 0.0, best), mask=inside)
    tl.store(to_positions + to, place, mask=inside)


@triton.jit
def scan(
    queries, q_row, q_column, query_scale, B, items, item_stride, row_scale, N, base, ids,
    allow, allow_row, allow_column, threshold_score, threshold_tie, count, to_scores, to_positions, row_size, k,
    D: tl.constexpr, DEPTH: tl.constexpr, ITEMS: tl.constexpr, QUERIES: tl.constexpr, COMPUTE: tl.constexpr,
    HAS_IDS: tl.constexpr, HAS_ALLOW: tl.constexpr,
):  # fmt: skip
    """Every row against every query: what reaches the query's threshold is emitted into its row of candidates.

    Programs of one split and all query tiles run side by side, so that rows are read from memory once.
    """
    query = tl.program_id(0) * QUERIES + tl.arange(0, QUERIES)
    first = _load_queries(queries, q_row, q_column, query, tl.arange(0, DEPTH), B, D, COMPUTE)
    q_scale = tl.load(query_scale + query, mask=query < B, other=0.0) if COMPUTE == tl.int8 else 0.0
    score = tl.load(threshold_score + query, mask=query < B, other=float("inf"))
    tie = tl.load(threshold_tie + query, mask=query < B, other=-1)
    to = query.to(tl.int64) * row_size + k
    for tile in range(tl.program_id(1), tl.cdiv(N, ITEMS), tl.num_programs(1)):
        row = tl.cast(tile, tl.int64) * ITEMS + tl.arange(0, ITEMS)
        scores = _products(
            first, queries, q_row, q_column, query, B, items, item_stride, tl.minimum(row, N - 1), row_scale, q_scale,
            D, DEPTH, ITEMS, QUERIES, COMPUTE,
        )  # fmt: skip
        hit = scores >= score[None, :]
        if tl.max(hit.to(tl.int32)) > 0:
            _emit(
                scores, hit, base + row, query, row < N, score, tie, ids, allow, allow_row, allow_column,
                count + query, to_scores, to_positions, to, row_size - k, ITEMS, QUERIES, HAS_IDS, HAS_ALLOW,
            )  # fmt: skip


@triton.jit
def collect(
    queries, q_row, q_column, query_scale, B, items, item_stride, row_scale, N, base, ids,
    allow, allow_row, allow_column, exclude_offsets, exclude_ids, E,
    threshold_score, threshold_tie, pending, list_count, list_scores, list_positions, list_size,
    to_scores, to_positions, row_size, k,
    D: tl.constexpr, DEPTH: tl.constexpr, ITEMS: tl.constexpr, QUERIES: tl.constexpr, COMPUTE: tl.constexpr,
    TILE: tl.constexpr, HAS_IDS: tl.constexpr, HAS_ALLOW: tl.constexpr, HAS_EXCLUDE: tl.constexpr,
):  # fmt: skip
    """The k best rows of each split for every pending query, whatever the data.

    A program keeps a list of its own for each of its queries, list_size >= k + ITEMS. A list without room for one more
    tile is cut to its k best, which also raises the threshold. The k best of split s go to k + s k of the query's
    candidates. Nothing is shared between programs, nothing can overflow.
    """
    query = tl.program_id(0) * QUERIES + tl.arange(0, QUERIES)
    live = query < B
    live &= tl.load(pending + query, mask=live, other=0) > 0
    if tl.max(live.to(tl.int32), 0) > 0:
        first = _load_queries(queries, q_row, q_column, query, tl.arange(0, DEPTH), B, D, COMPUTE)
        q_scale = tl.load(query_scale + query, mask=query < B, other=0.0) if COMPUTE == tl.int8 else 0.0
        score = tl.load(threshold_score + query, mask=live, other=float("inf"))
        tie = tl.load(threshold_tie + query, mask=live, other=-1)
        program = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
        mine = program.to(tl.int64) * QUERIES + tl.arange(0, QUERIES)
        count = list_count + mine
        lists = mine * list_size
        wanted = tl.zeros((QUERIES,), tl.int32) + k
        tl.store(count, tl.zeros((QUERIES,), tl.int32))
        tl.debug_barrier()
        tiles = tl.cdiv(N, ITEMS)
        for tile in range(tl.program_id(1), tiles, tl.num_programs(1)):
            row = tl.cast(tile, tl.int64) * ITEMS + tl.arange(0, ITEMS)
            scores = _products(
                first, queries, q_row, q_column, query, B, items, item_stride, tl.minimum(row, N - 1), row_scale,
                q_scale, D, DEPTH, ITEMS, QUERIES, COMPUTE,
            )  # fmt: skip
            hit = scores >= score[None, :]
            if tl.max(hit.to(tl.int32)) > 0:
                _emit(
                    scores, hit, base + row, query, row < N, score, tie, ids, allow, allow_row, allow_column,
                    count, list_scores, list_positions, lists, list_size, ITEMS, QUERIES, HAS_IDS, HAS_ALLOW,
                )  # fmt: skip
                tl.debug_barrier()
                n = tl.load(count)
                if tl.max(n, 0) > list_size - ITEMS:
                    if HAS_EXCLUDE:
                        drop_excluded(
                            list_scores, list_positions, ids, lists, n, exclude_offsets, exclude_ids, E, query, live,
                            QUERIES, TILE, HAS_IDS,
                        )  # fmt: skip
                    border, border_tie, valid = kth_best(
                        list_scores, list_positions, ids, lists, n, wanted, QUERIES, TILE, HAS_IDS
                    )
                    n = compact(
                        list_scores, list_positions, ids, lists, n, border, border_tie,
                        list_scores, list_positions, lists, QUERIES, TILE, HAS_IDS,
                    )  # fmt: skip
                    score = tl.where(valid >= k, border, score)
                    tie = tl.where(valid >= k, border_tie, tie)
                    tl.store(count, n)
                    tl.debug_barrier()
        n = tl.load(count)
        if HAS_EXCLUDE:
            drop_excluded(
                list_scores, list_positions, ids, lists, n, exclude_offsets, exclude_ids, E, query, live,
                QUERIES, TILE, HAS_IDS,
            )  # fmt: skip
        border, border_tie, valid = kth_best(list_scores, list_positions, ids, lists, n, wanted, QUERIES, TILE, HAS_IDS)
        to = query.to(tl.int64) * row_size + k + tl.program_id(1) * k
        n = compact(
            list_scores, list_positions, ids, lists, n, border, border_tie,
            to_scores, to_positions, to, QUERIES, TILE, HAS_IDS,
        )  # fmt: skip
        entry = tl.arange(0, TILE)[None, :]
        for begin in range(0, k, TILE):
            rest = live[:, None] & (begin + entry >= n[:, None]) & (begin + entry < k)
            tl.store(
                to_scores + to[:, None] + begin + entry, tl.full((QUERIES, TILE), float("nan"), tl.float32), mask=rest
            )
            tl.store(to_positions + to[:, None] + begin + entry, tl.zeros((QUERIES, TILE), tl.int32), mask=rest)
