"""Kernels that score: quantise the queries, sample, scan and emit, rescore, collect.

    score[b, i] = sum_j q[b, j] x[i, j]                             float32, float16, bfloat16
    score[b, i] = float32(sum_j q8[b, j] x8[i, j]) * (s_b * s_i)    int8, scales s
                  + radius_b * error_i                              BOUNDED: of the certified copy of float rows, above
                                                                    the float score by the proof in quantise.py

A tile is ITEMS rows x QUERIES queries. The rows stand on the M axis of the tensor cores' product and the queries on N,
whatever the batch: one query pads N to 16, where it would pad M to 64 (wgmma), and all kernels add in one order, j
ascending, DEPTH numbers a product, accumulated in float32, or in int32, which holds 127^2 d for d <= 2^17. So the bits
of a score depend on its query and its row alone.

Bytes: each row once a call, and one in N / size of them once more for the sample; the queries once a program; O(B k)
candidates. Operations a score: d multiply-adds; a subtraction and a maximum, for int8 a multiplication and a
conversion by addition more; all else stands behind a gate that a tile without a candidate does not pass.
"""

import triton
import triton.language as tl

from grank_kernels.backends.triton.selection import compact, drop_excluded, kth_best, reaches


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
    first, queries, q_row, q_column, query, B, x, live,
    D: tl.constexpr, DEPTH: tl.constexpr, ITEMS: tl.constexpr, QUERIES: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """(ITEMS, QUERIES) inner products of the rows that begin at `x` where `live`, 0 elsewhere, as float32.

    `first` are the first DEPTH columns of the queries.
    """
    ACCUMULATOR: tl.constexpr = tl.int32 if COMPUTE.is_int8() else tl.float32
    column = tl.arange(0, DEPTH)
    x = x[:, None] + column[None, :]
    if D <= DEPTH:
        inside = live[:, None] if D == DEPTH else live[:, None] & (column < D)[None, :]
        tile = tl.load(x, mask=inside, other=0)
        total = tl.dot(tile.to(COMPUTE), first, out_dtype=ACCUMULATOR, input_precision="ieee")
    else:
        total = tl.zeros((ITEMS, QUERIES), ACCUMULATOR)
        for begin in range(0, D, DEPTH):
            inside = live[:, None] if D % DEPTH == 0 else live[:, None] & (begin + column < D)[None, :]
            tile = tl.load(x + begin, mask=inside, other=0)
            q = _load_queries(queries, q_row, q_column, query, begin + column, B, D, COMPUTE)
            total = tl.dot(tile.to(COMPUTE), q, total, out_dtype=ACCUMULATOR, input_precision="ieee")
    if COMPUTE.is_int8():
        if D <= 260:  # |total| < 2^22: added to the bits of 1.5 * 2^23 it is the fraction, and needs no conversion
            return (total + 0x4B400000).to(tl.float32, bitcast=True) - 12582912.0
        else:
            return total.to(tl.float32)
    else:
        return total


@triton.jit
def _load_scales(scale, bound, place, mask, COMPUTE: tl.constexpr, BOUNDED: tl.constexpr):
    """Scales of int8 rows or queries, and errors or radii; what takes their place where there are none is not used."""
    if BOUNDED:
        return tl.load(scale + place, mask=mask, other=0.0), tl.load(bound + place, mask=mask, other=0.0)
    elif COMPUTE.is_int8():
        return tl.load(scale + place, mask=mask, other=0.0), mask
    else:
        return mask, mask


@triton.jit
def _scores(products, row_scale, row_error, query_scale, radius, COMPUTE: tl.constexpr, BOUNDED: tl.constexpr):
    if BOUNDED:
        return products * (query_scale[None, :] * row_scale[:, None]) + radius[None, :] * row_error[:, None]
    elif COMPUTE.is_int8():
        return products * (query_scale[None, :] * row_scale[:, None])
    else:
        return products


@triton.jit
def _bars(score, query_scale, COMPUTE: tl.constexpr):
    """What a product, times the row's scale, must reach for the score to reach the threshold `score` of its query.

    At most the largest number, which what reaches infinity reaches too: infinity minus infinity is no number.

    For int8 a lower bound of it, so that a score costs one multiplication less here. With the scales q and x, the score
    is fl(product fl(q x)): its roundings are below 2^-21 of the threshold, and what underflows is below 2^-118, since
    |product| <= 2^31; the division by q rounds once more. 2^-20 and 2^-116, and 2^-140 for the product with x, do.
    """
    LARGEST: tl.constexpr = 3.4028234663852886e38
    if COMPUTE.is_int8():
        lower = score - tl.abs(score) * 9.5367431640625e-07 - 1.2037062152420224e-35
        bar = tl.div_rn(lower, query_scale) - 7.174648137343064e-43
        return tl.where(score == float("inf"), LARGEST, tl.minimum(bar, LARGEST))
    else:
        return tl.minimum(score, LARGEST)


@triton.jit
def _slope(radius, query_scale, BOUNDED: tl.constexpr):
    """What a row's error adds at most, in units of the query's scale, for any query of a tile: bounds then cost a score
    nothing. 2^-13 of it for the roundings, as in quantise.py.
    """
    if BOUNDED:
        slope = tl.div_rn(radius * 1.0001220703125, query_scale)
        return tl.max(tl.where(slope == slope, slope, 0.0), 0)
    else:
        return 0.0


@triton.jit
def _added(slope, row_error, BOUNDED: tl.constexpr):
    if BOUNDED:
        return slope * tl.max(row_error, 0)
    else:
        return 0.0


@triton.jit
def _distances(products, row_scale, bars, COMPUTE: tl.constexpr):
    """Not negative where the score may reach its threshold."""
    if COMPUTE.is_int8():
        return products * row_scale[:, None] - bars[None, :]
    else:
        return products - bars[None, :]


@triton.jit
def _allowed(allow, allow_row, allow_column, query, row, mask):
    place = query.to(tl.int64)[None, :] * allow_row + row[:, None] * allow_column
    return tl.load(allow + place, mask=mask, other=0) != 0


@triton.jit
def _emit(
    products, row_scale, row_error, query_scale, query_radius, B, query, position, live, ids,
    allow, allow_row, allow_column,
    threshold_score, threshold_tie, count, to_scores, to_positions, list_size, skip, room, mine,
    ITEMS: tl.constexpr, QUERIES: tl.constexpr, COMPUTE: tl.constexpr, BOUNDED: tl.constexpr,
    HAS_IDS: tl.constexpr, HAS_ALLOW: tl.constexpr,
):  # fmt: skip
    """Appends the scores that are of rows (`live`), allowed and reach their query's threshold to its list.

    Thresholds, counters and lists are those from `mine` on, the lists list_size apart; the first `skip` places of each
    are left alone and `room` are free. Counting goes on where there is no room, so that what is lost is seen.
    A wide tile is halved, each half behind a gate of its own, down to 16 queries: 8 or 16 scores a thread.
    """
    if QUERIES > 16:
        HALF: tl.constexpr = QUERIES // 2
        low, high = tl.split(tl.permute(tl.reshape(products, (ITEMS, 2, HALF)), (0, 2, 1)))
        _emit(
            low, row_scale, row_error, query_scale, query_radius, B, query, position, live, ids,
            allow, allow_row, allow_column,
            threshold_score, threshold_tie, count, to_scores, to_positions, list_size, skip, room, mine,
            ITEMS, HALF, COMPUTE, BOUNDED, HAS_IDS, HAS_ALLOW,
        )  # fmt: skip
        _emit(
            high, row_scale, row_error, query_scale, query_radius, B, query + HALF, position, live, ids,
            allow, allow_row, allow_column,
            threshold_score, threshold_tie, count, to_scores, to_positions, list_size, skip, room, mine + HALF,
            ITEMS, HALF, COMPUTE, BOUNDED, HAS_IDS, HAS_ALLOW,
        )  # fmt: skip
    else:
        lane = tl.arange(0, QUERIES)
        score = tl.load(threshold_score + mine + lane)
        q_scale, radius = _load_scales(query_scale, query_radius, query + lane, query + lane < B, COMPUTE, BOUNDED)
        scores = _scores(products, row_scale, row_error, q_scale, radius, COMPUTE, BOUNDED)
        hit = (scores >= score[None, :]) & live[:, None]
        if tl.max(hit.to(tl.int32)) > 0:
            if HAS_ALLOW:
                hit &= _allowed(allow, allow_row, allow_column, query + lane, position, hit)
            ties = tl.load(ids + position, mask=live, other=0) if HAS_IDS else position
            tie = tl.load(threshold_tie + mine + lane)
            hit &= reaches(scores, ties[:, None], score[None, :], tie[None, :])
            counters, _ = tl.broadcast((count + mine + lane)[None, :], hit)
            slot = tl.atomic_add(counters, 1, mask=hit, sem="relaxed")
            hit &= slot.to(tl.uint32) < room  # a count of up to 2^32 - 1 hits is unsigned
            to = (mine + lane).to(tl.int64) * list_size + skip
            unsigned = tl.where(scores == 0, 0.0, scores)  # one zero, as the contract has it
            tl.store((to_scores + to)[None, :] + slot, unsigned, mask=hit)
            tl.store((to_positions + to)[None, :] + slot, position.to(tl.int32)[:, None], mask=hit)


@triton.jit
def _scan_tiles(
    begin, end, step, first, queries, q_row, q_column, query_scale, query_radius, B,
    items, item_stride, row_scale, row_error, N, base, ids, allow, allow_row, allow_column,
    threshold_score, threshold_tie, count, to_scores, to_positions,
    list_size, skip, room, mine,
    D: tl.constexpr, DEPTH: tl.constexpr, ITEMS: tl.constexpr, QUERIES: tl.constexpr, COMPUTE: tl.constexpr,
    BOUNDED: tl.constexpr, HAS_IDS: tl.constexpr, HAS_ALLOW: tl.constexpr,
):  # fmt: skip
    """Emits what reaches the thresholds, from the tiles begin, begin + step, ... below end."""
    lane = tl.arange(0, ITEMS)
    query = tl.program_id(0) * QUERIES + tl.arange(0, QUERIES)
    score = tl.load(threshold_score + mine + tl.arange(0, QUERIES))
    q_scale, radius = _load_scales(query_scale, query_radius, query, query < B, COMPUTE, BOUNDED)
    bars, slope = _bars(score, q_scale, COMPUTE), _slope(radius, q_scale, BOUNDED)
    no_gate = tl.max((score == -float("inf")).to(tl.int32), 0) > 0  # -inf minus -inf is no number
    offset = lane.to(tl.int64) * item_stride
    for tile in range(begin, end, step):
        start = tl.cast(tile, tl.int64) * ITEMS
        live = lane < tl.minimum(N - start, ITEMS).to(tl.int32)
        x_scale, error = _load_scales(row_scale, row_error, start + lane, live, COMPUTE, BOUNDED)
        products = _products(
            first, queries, q_row, q_column, query, B, items + start * item_stride + offset, live,
            D, DEPTH, ITEMS, QUERIES, COMPUTE,
        )  # fmt: skip
        # One subtraction and one maximum a score; of a comparison the reduction would make an integer first.
        if (tl.max(_distances(products, x_scale, bars, COMPUTE)) >= -_added(slope, error, BOUNDED)) | no_gate:
            # Zero, which the compiler cannot know: it would compute this branch's addresses before the loop, and spill.
            zero = tl.minimum(N - start, 0).to(tl.int32)
            _emit(
                products, x_scale, error, query_scale, query_radius, B, tl.program_id(0) * QUERIES + zero,
                base + start + lane, live, ids, allow, allow_row, allow_column, threshold_score, threshold_tie, count,
                to_scores, to_positions, list_size, skip, room, mine + zero,
                ITEMS, QUERIES, COMPUTE, BOUNDED, HAS_IDS, HAS_ALLOW,
            )  # fmt: skip


@triton.jit
def sample(
    queries, q_row, q_column, query_scale, query_radius, B, items, item_stride, row_scale, row_error, N,
    allow, allow_row, allow_column, size, to_scores, to_positions, groups,
    D: tl.constexpr, DEPTH: tl.constexpr, ITEMS: tl.constexpr, QUERIES: tl.constexpr, COMPUTE: tl.constexpr,
    BOUNDED: tl.constexpr, HAS_ALLOW: tl.constexpr,
):  # fmt: skip
    """The best of each group of sampled rows: (B, groups) scores and positions, NaN where a group has none.

    `size` rows are sampled, one of every N / size at a place that looks random; they fall into `groups` in turn. The
    r-th best of the groups is at most the r-th best of the sample, and hardly less while r^2 is small beside the
    groups; so one maximum a score is all it takes, and no list.
    """
    query = tl.program_id(0) * QUERIES + tl.arange(0, QUERIES)
    group = tl.program_id(1) * ITEMS + tl.arange(0, ITEMS)
    first = _load_queries(queries, q_row, q_column, query, tl.arange(0, DEPTH), B, D, COMPUTE)
    q_scale, radius = _load_scales(query_scale, query_radius, query, query < B, COMPUTE, BOUNDED)
    best = tl.full((ITEMS, QUERIES), float("nan"), tl.float32)
    winner = tl.zeros((ITEMS, QUERIES), tl.int32)
    for begin in range(0, size, groups):
        live = begin + group < size
        row = _sampled_row(begin + group, size, N)
        x_scale, error = _load_scales(row_scale, row_error, row, live, COMPUTE, BOUNDED)
        products = _products(
            first, queries, q_row, q_column, query, B, items + row * item_stride, live,
            D, DEPTH, ITEMS, QUERIES, COMPUTE,
        )  # fmt: skip
        scores = _scores(products, x_scale, error, q_scale, radius, COMPUTE, BOUNDED)
        better = live[:, None] & ((scores > best) | ((best != best) & (scores == scores)))
        if HAS_ALLOW:
            better &= _allowed(allow, allow_row, allow_column, query, row, better & (query < B)[None, :])
        best = tl.where(better, scores, best)
        winner = tl.where(better, row.to(tl.int32)[:, None], winner)
    to = query.to(tl.int64)[None, :] * groups + group[:, None]
    inside = (query < B)[None, :] & (group < groups)[:, None]
    tl.store(to_scores + to, tl.where(best == 0, 0.0, best), mask=inside)
    tl.store(to_positions + to, winner, mask=inside)


@triton.jit
def _sampled_row(i, size, N):
    """The row of sample i: in the i-th of `size` equal parts of the table, at a place that looks random."""
    i = tl.minimum(i, size - 1)
    mixed = ((i.to(tl.uint32) + 1) * 0x9E3779B1).to(tl.int64)
    width = N // size
    longer = N % size  # so many of the first parts are longer by one
    place = (mixed * (width + (i < longer).to(tl.int64))) >> 32
    return i.to(tl.int64) * width + tl.minimum(i, longer) + place


@triton.jit
def scan(
    queries, q_row, q_column, query_scale, query_radius, B, items, item_stride, row_scale, row_error, N, base, ids,
    allow, allow_row, allow_column, threshold_score, threshold_tie, count, to_scores, to_positions, row_size, k,
    D: tl.constexpr, DEPTH: tl.constexpr, ITEMS: tl.constexpr, QUERIES: tl.constexpr, COMPUTE: tl.constexpr,
    BOUNDED: tl.constexpr, HAS_IDS: tl.constexpr, HAS_ALLOW: tl.constexpr,
):  # fmt: skip
    """Every row against every query: what reaches the query's threshold is emitted behind its k kept candidates.

    Programs of one split and all query tiles run side by side, so that rows are read from memory once. Thresholds and
    counters are padded to whole tiles.
    """
    query = tl.program_id(0) * QUERIES + tl.arange(0, QUERIES)
    first = _load_queries(queries, q_row, q_column, query, tl.arange(0, DEPTH), B, D, COMPUTE)
    _scan_tiles(
        tl.program_id(1), tl.cdiv(N, ITEMS), tl.num_programs(1), first, queries, q_row, q_column,
        query_scale, query_radius, B, items, item_stride, row_scale, row_error, N, base, ids,
        allow, allow_row, allow_column, threshold_score, threshold_tie,
        count, to_scores, to_positions, row_size, k, row_size - k, tl.program_id(0) * QUERIES,
        D, DEPTH, ITEMS, QUERIES, COMPUTE, BOUNDED, HAS_IDS, HAS_ALLOW,
    )  # fmt: skip


@triton.jit
def rescore(
    queries, q_row, q_column, B, items, item_stride, listed, listed_size, listed_count, bound, query_radius,
    to_score, count, to_scores, to_positions, row_size, k,
    D: tl.constexpr, DEPTH: tl.constexpr, ITEMS: tl.constexpr, QUERIES: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """Scores the listed rows of one query and puts those that it vouches for behind the query's k kept candidates.

    The list holds the rows of largest upper bounds; those that it leaves out have none above `bound`, the least in the
    list, or are none (-inf). So scores above `bound` are all that there are above it, as if `scan` had emitted what
    exceeds that threshold; the others become NaN. The bound says nothing of a query whose radius is NaN.
    The product is that of `scan`, on 16 queries of which one is not zero: the same bits.
    """
    query = tl.program_id(0)
    lane = tl.where(tl.arange(0, QUERIES) == 0, query, B)  # zeros beyond B
    n = tl.load(listed_count + query)
    entry = tl.program_id(1) * ITEMS + tl.arange(0, ITEMS)
    live = entry < n
    place = tl.load(listed + query.to(tl.int64) * listed_size + entry, mask=live, other=0)
    row = place.to(tl.int64) & 0xFFFFFFFF
    first = _load_queries(queries, q_row, q_column, lane, tl.arange(0, DEPTH), B, D, COMPUTE)
    products = _products(
        first, queries, q_row, q_column, lane, B, items + row * item_stride, live, D, DEPTH, ITEMS, QUERIES, COMPUTE
    )
    score = tl.sum(tl.where((lane == query)[None, :], products, 0.0), 1)
    mine = query + tl.zeros((ITEMS,), tl.int32)
    radius = tl.load(query_radius + mine)
    bar = tl.where(radius == radius, tl.load(bound + mine), float("inf"))
    vouched = live & ((score > bar) | (bar == -float("inf")))
    to = query.to(tl.int64) * row_size + k + entry
    tl.store(to_scores + to, tl.where(vouched, score, float("nan")), mask=live)
    tl.store(to_positions + to, place, mask=live)
    tl.store(count + mine, n, mask=entry == 0)
    tl.store(to_score + mine, bar, mask=entry == 0)


@triton.jit
def _cut(
    list_count, list_scores, list_positions, list_size, list_score, list_tie, mine, query, live, ids,
    exclude_offsets, exclude_ids, E, k, to_scores, to_positions, to,
    R: tl.constexpr, TILE: tl.constexpr, HAS_IDS: tl.constexpr, HAS_EXCLUDE: tl.constexpr,
):  # fmt: skip
    """Copies the k best of R lists to `to`, raises the thresholds of lists that have so many; returns what was kept."""
    lists = mine.to(tl.int64) * list_size
    n = tl.load(list_count + mine)
    if HAS_EXCLUDE:
        drop_excluded(
            list_scores, list_positions, ids, lists, n, exclude_offsets, exclude_ids, E, query, live, R, TILE, HAS_IDS
        )
    wanted = tl.zeros((R,), tl.int32) + k
    score, tie, valid = kth_best(list_scores, list_positions, ids, lists, n, wanted, R, TILE, HAS_IDS)
    kept = compact(
        list_scores, list_positions, ids, lists, n, score, tie, to_scores, to_positions, to, R, TILE, HAS_IDS
    )
    raised = live & (valid >= k)
    tl.store(list_score + mine, score, mask=raised)
    tl.store(list_tie + mine, tie, mask=raised)
    tl.store(list_count + mine, kept)
    return kept


@triton.jit
def collect(
    queries, q_row, q_column, query_scale, query_radius, B, items, item_stride, row_scale, row_error, N, base, ids,
    allow, allow_row, allow_column, exclude_offsets, exclude_ids, E,
    threshold_score, threshold_tie, pending, list_count, list_score, list_tie, list_scores, list_positions, list_size,
    to_scores, to_positions, row_size, k,
    D: tl.constexpr, DEPTH: tl.constexpr, ITEMS: tl.constexpr, QUERIES: tl.constexpr, COMPUTE: tl.constexpr,
    BOUNDED: tl.constexpr, BLOCK: tl.constexpr, R: tl.constexpr, TILE: tl.constexpr,
    HAS_IDS: tl.constexpr, HAS_ALLOW: tl.constexpr, HAS_EXCLUDE: tl.constexpr,
):  # fmt: skip
    """The k best rows of each split for every pending query, whatever the data.

    A program keeps a list of its own for each of its queries, list_size >= k + BLOCK ITEMS. It scans blocks of tiles,
    one at first, then two, ... up to BLOCK; lists of 2 k entries, or without room for the next block, are cut to their
    k best, which raises their thresholds. The k best of split s go to k + s k of the query's candidates. Nothing is
    shared between programs, nothing can overflow.
    """
    query = tl.program_id(0) * QUERIES + tl.arange(0, QUERIES)
    live = query < B
    live &= tl.load(pending + query, mask=live, other=0) > 0
    if tl.max(live.to(tl.int32), 0) > 0:
        first = _load_queries(queries, q_row, q_column, query, tl.arange(0, DEPTH), B, D, COMPUTE)
        mine = (tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)) * QUERIES
        lane = tl.arange(0, QUERIES)
        tl.store(list_score + mine + lane, tl.load(threshold_score + query, mask=live, other=float("inf")))
        tl.store(list_tie + mine + lane, tl.load(threshold_tie + query, mask=live, other=-1))
        tl.store(list_count + mine + lane, tl.zeros((QUERIES,), tl.int32))
        tl.debug_barrier()
        tiles = tl.cdiv(N, ITEMS)
        tile = tl.program_id(1) + 0
        block = tile * 0 + 1
        while tile < tiles:
            stop = tl.minimum(tiles, tile + block * tl.num_programs(1))
            _scan_tiles(
                tile, stop, tl.num_programs(1), first, queries, q_row, q_column, query_scale, query_radius, B,
                items, item_stride, row_scale, row_error, N, base, ids, allow, allow_row, allow_column,
                list_score, list_tie,
                list_count, list_scores, list_positions, list_size, 0, list_size, mine,
                D, DEPTH, ITEMS, QUERIES, COMPUTE, BOUNDED, HAS_IDS, HAS_ALLOW,
            )  # fmt: skip
            tile += block * tl.num_programs(1)
            block = tl.minimum(2 * block, BLOCK)
            tl.debug_barrier()
            zero = tl.minimum(stop - 1, 0)  # hides addresses from the compiler, as in `_scan_tiles`
            for some in range(0, QUERIES, R):
                part = some + zero + tl.arange(0, R)
                n = tl.max(tl.load(list_count + mine + part), 0)
                if (n >= 2 * k) | (n > list_size - block * ITEMS):
                    member = tl.program_id(0) * QUERIES + part
                    _cut(
                        list_count, list_scores, list_positions, list_size, list_score, list_tie, mine + part, member,
                        member < B, ids, exclude_offsets, exclude_ids, E, k, list_scores, list_positions,
                        (mine + part).to(tl.int64) * list_size, R, TILE, HAS_IDS, HAS_EXCLUDE,
                    )  # fmt: skip
            tl.debug_barrier()
        entry = tl.arange(0, TILE)[None, :]
        for some in range(0, QUERIES, R):
            part = some + tl.arange(0, R)
            member = tl.program_id(0) * QUERIES + part
            chosen = member < B
            chosen &= tl.load(pending + member, mask=chosen, other=0) > 0
            to = member.to(tl.int64) * row_size + k + tl.program_id(1) * k
            kept = _cut(
                list_count, list_scores, list_positions, list_size, list_score, list_tie, mine + part, member,
                chosen, ids, exclude_offsets, exclude_ids, E, k, to_scores, to_positions, to,
                R, TILE, HAS_IDS, HAS_EXCLUDE,
            )  # fmt: skip
            for begin in range(0, k, TILE):
                rest = chosen[:, None] & (begin + entry >= kept[:, None]) & (begin + entry < k)
                nothing = tl.full((R, TILE), float("nan"), tl.float32)
                tl.store(to_scores + to[:, None] + begin + entry, nothing, mask=rest)
                tl.store(to_positions + to[:, None] + begin + entry, tl.zeros((R, TILE), tl.int32), mask=rest)
