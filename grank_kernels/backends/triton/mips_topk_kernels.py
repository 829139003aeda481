"""Triton kernels that compute scores: quantise the queries, sample, scan, rescore, collect.

    score[b, i] = sum_j q[b, j] x[i, j]                             float32, float16, bfloat16
    score[b, i] = float32(sum_j q8[b, j] x8[i, j]) * (s_b * s_i)    int8, with scales s
                  + radius_b * error_i                              certified copy of float rows: an upper bound of the
                                                                    float score, proved in quantise.py

A tile is ITEMS rows x QUERIES queries. Rows are the M axis of the tensor-core product and queries the N axis for every
batch size: a single query is padded to N = 16, where it would be padded to M = 64 (wgmma). Every kernel adds in the
same order, j ascending, DEPTH columns a product, accumulated in float32, or in int32, which holds 127^2 d for d <=
2^17. The bits of a score therefore depend on its query and its row alone.

Memory traffic: each row is read once per call, and one row in N / size once more for the sample; the queries are read
once per program; O(B k) candidates are written. Arithmetic per score: d multiply-adds, one subtraction and one maximum;
int8 adds one multiplication and one conversion. The rest runs only for tiles with a candidate.
"""

import triton
import triton.language as tl

from grank_kernels.backends.triton.selection import compact, drop_excluded, kth_best, reaches

LARGEST = tl.constexpr(3.4028234663852886e38)  # the largest finite float32
ROUND_INT = tl.constexpr(12582912.0)  # 1.5 * 2^23: a float32 of |x| < 2^22 added to it has no fraction
ROUND_INT_BITS = tl.constexpr(0x4B400000)


@triton.jit
def quantise(queries, quantised, d, BLOCK: tl.constexpr):
    """The int8 query and its scale: scale = max|q| / 127; q / scale rounded half to even, NaN to 0."""
    query = tl.program_id(0).to(tl.int64)
    row = queries.data + query * queries.row_stride
    most = 0.0
    bad = 0
    for begin in range(0, d, BLOCK):
        column = begin + tl.arange(0, BLOCK)
        x = tl.load(row + column * queries.column_stride, mask=column < d, other=0.0).to(tl.float32)
        bad += tl.sum((x != x).to(tl.int32), 0)
        most = tl.maximum(most, tl.max(tl.where(x == x, tl.abs(x), 0.0), 0))
    scale = tl.where(bad > 0, float("nan"), tl.div_rn(most, 127.0))
    for begin in range(0, d, BLOCK):
        column = begin + tl.arange(0, BLOCK)
        x = tl.load(row + column * queries.column_stride, mask=column < d, other=0.0).to(tl.float32)
        ratio = tl.div_rn(x, tl.zeros((BLOCK,), tl.float32) + scale)
        ratio = tl.minimum(tl.maximum(ratio, -127.0), 127.0)
        whole = (ratio + ROUND_INT) - ROUND_INT
        number = tl.where(ratio == ratio, whole, 0.0).to(tl.int8)
        tl.store(quantised.data + query * quantised.row_stride + column, number, mask=column < d)
    tl.store(quantised.scale + query, scale)


@triton.jit
def _load_queries(queries, query, column, shape: tl.constexpr):
    """(DEPTH, QUERIES) of the queries, transposed; 0 outside."""
    inside = (column < shape.D)[:, None] & (query < queries.number)[None, :]
    row = query.to(tl.int64)[None, :] * queries.row_stride
    place = row + column.to(tl.int64)[:, None] * queries.column_stride
    return tl.load(queries.data + place, mask=inside, other=0.0).to(shape.COMPUTE)


@triton.jit
def _products(first, queries, query, x, row_mask, shape: tl.constexpr):
    """(ITEMS, QUERIES) float32 inner products with the rows that begin at `x`; 0 where `row_mask` is false.

    `first` holds the first DEPTH columns of the queries.
    """
    ACCUMULATOR: tl.constexpr = tl.int32 if shape.COMPUTE.is_int8() else tl.float32
    column = tl.arange(0, shape.DEPTH)
    x = x[:, None] + column[None, :]
    if shape.D <= shape.DEPTH:
        inside = row_mask[:, None] if shape.D == shape.DEPTH else row_mask[:, None] & (column < shape.D)[None, :]
        tile = tl.load(x, mask=inside, other=0)
        total = tl.dot(tile.to(shape.COMPUTE), first, out_dtype=ACCUMULATOR, input_precision="ieee")
    else:
        total = tl.full((shape.ITEMS, shape.QUERIES), 0, ACCUMULATOR)
        for begin in range(0, shape.D, shape.DEPTH):
            if shape.D % shape.DEPTH == 0:
                inside = row_mask[:, None]
            else:
                inside = row_mask[:, None] & (begin + column < shape.D)[None, :]
            tile = tl.load(x + begin, mask=inside, other=0)
            q = _load_queries(queries, query, begin + column, shape)
            total = tl.dot(tile.to(shape.COMPUTE), q, total, out_dtype=ACCUMULATOR, input_precision="ieee")
    if shape.COMPUTE.is_int8():
        if shape.D <= 260:  # |total| < 2^22, so the conversion is one addition to the bits of 1.5 * 2^23
            return (total + ROUND_INT_BITS).to(tl.float32, bitcast=True) - ROUND_INT
        else:
            return total.to(tl.float32)
    else:
        return total


@triton.jit
def _load_optional(values, place, mask):
    """The values at `place`, 0 where masked; None if there are no values."""
    if values is not None:
        return tl.load(values + place, mask=mask, other=0.0)
    else:
        return None


@triton.jit
def _scores(products, row_scale, row_error, query_scale, radius):
    """The scores, or their upper bounds if errors and radii are given."""
    if row_error is not None:
        return products * (query_scale[None, :] * row_scale[:, None]) + radius[None, :] * row_error[:, None]
    elif row_scale is not None:
        return products * (query_scale[None, :] * row_scale[:, None])
    else:
        return products


@triton.jit
def _bars(score, query_scale):
    """What a product, times the row's scale, must reach for the score to reach its query's threshold `score`.

    At most the largest finite number, which an infinite score reaches too: inf - inf is NaN.

    For int8 a lower bound, which saves one multiplication per score. With the scales q and x, the score is
    fl(product fl(q x)): its rounding errors are below 2^-21 of the threshold and its underflow is below 2^-118, since
    |product| <= 2^31; the division by q rounds once more. Margins of 2^-20 and 2^-116, and of 2^-140 for the product
    with x, cover them.
    """
    if query_scale is not None:
        lower = score - tl.abs(score) * 9.5367431640625e-07 - 1.2037062152420224e-35
        bar = tl.div_rn(lower, query_scale) - 7.174648137343064e-43
        return tl.where(score == float("inf"), LARGEST, tl.minimum(bar, LARGEST))
    else:
        return tl.minimum(score, LARGEST)


@triton.jit
def _slope(radius, query_scale):
    """The largest radius of a tile's queries in units of their scales, so that bounds cost nothing per score.

    2^-13 of it is added for rounding, as in quantise.py. 0 without radii.
    """
    if radius is not None:
        slope = tl.div_rn(radius * 1.0001220703125, query_scale)
        return tl.max(tl.where(slope == slope, slope, 0.0), 0)
    else:
        return 0.0


@triton.jit
def _slack(slope, row_error):
    """The most that an error of a tile's rows adds to a product times its row's scale."""
    if row_error is not None:
        return slope * tl.max(row_error, 0)
    else:
        return 0.0


@triton.jit
def _distances(products, row_scale, bars):
    """Not negative where the score may reach its threshold."""
    if row_scale is not None:
        return products * row_scale[:, None] - bars[None, :]
    else:
        return products - bars[None, :]


@triton.jit
def _allowed(allow, query, row, mask):
    """Whether each row is eligible for each query; False where masked."""
    place = query.to(tl.int64)[None, :] * allow.row_stride + row[:, None] * allow.column_stride
    return tl.load(allow.mask + place, mask=mask, other=0) != 0


@triton.jit
def _emit(
    products, row_scale, row_error, queries, query, rows, position, row_mask, allow, lists, list_index,
    ITEMS: tl.constexpr, QUERIES: tl.constexpr,
):  # fmt: skip
    """Appends the eligible scores that reach their query's threshold to the query's list.

    `query` is the first query of the tile and `list_index` its list. Counting goes on when a list is full, so that a
    loss is noticed. A wide tile is halved, each half behind a test of its own, down to 16 queries: 8 or 16 scores per
    thread.
    """
    if QUERIES > 16:
        HALF: tl.constexpr = QUERIES // 2
        low, high = tl.split(tl.permute(tl.reshape(products, (ITEMS, 2, HALF)), (0, 2, 1)))
        _emit(
            low, row_scale, row_error, queries, query, rows, position, row_mask, allow, lists, list_index,
            ITEMS, HALF,
        )  # fmt: skip
        _emit(
            high, row_scale, row_error, queries, query + HALF, rows, position, row_mask, allow, lists,
            list_index + HALF, ITEMS, HALF,
        )  # fmt: skip
    else:
        lane = tl.arange(0, QUERIES)
        score = tl.load(lists.score + list_index + lane)
        query_scale = _load_optional(queries.scale, query + lane, query + lane < queries.number)
        radius = _load_optional(queries.radius, query + lane, query + lane < queries.number)
        scores = _scores(products, row_scale, row_error, query_scale, radius)
        hit = (scores >= score[None, :]) & row_mask[:, None]
        if tl.max(hit.to(tl.int32)) > 0:
            if allow.mask is not None:
                hit &= _allowed(allow, query + lane, position, hit)
            ties = position if rows.ids is None else tl.load(rows.ids + position, mask=row_mask, other=0)
            tie = tl.load(lists.tie + list_index + lane)
            hit &= reaches(scores, ties[:, None], score[None, :], tie[None, :])
            counters, _ = tl.broadcast((lists.count + list_index + lane)[None, :], hit)
            slot = tl.atomic_add(counters, 1, mask=hit, sem="relaxed")
            hit &= slot.to(tl.uint32) < lists.size - lists.first  # unsigned: a count may reach 2^32 - 1
            to = (list_index + lane).to(tl.int64) * lists.size + lists.first
            one_zero = tl.where(scores == 0, 0.0, scores)  # -0.0 is returned as 0.0
            tl.store((lists.scores + to)[None, :] + slot, one_zero, mask=hit)
            tl.store((lists.positions + to)[None, :] + slot, position.to(tl.int32)[:, None], mask=hit)


@triton.jit
def _scan_tiles(begin, end, step, first, queries, rows, allow, lists, list_index, shape: tl.constexpr):
    """Emits candidates from the tiles begin, begin + step, ... below `end`."""
    lane = tl.arange(0, shape.ITEMS)
    query = tl.program_id(0) * shape.QUERIES + tl.arange(0, shape.QUERIES)
    score = tl.load(lists.score + list_index + tl.arange(0, shape.QUERIES))
    query_scale = _load_optional(queries.scale, query, query < queries.number)
    radius = _load_optional(queries.radius, query, query < queries.number)
    bars, slope = _bars(score, query_scale), _slope(radius, query_scale)
    all_pass = tl.max((score == -float("inf")).to(tl.int32), 0) > 0  # -inf - -inf is NaN
    offset = lane.to(tl.int64) * rows.stride
    for tile in range(begin, end, step):
        start = tl.cast(tile, tl.int64) * shape.ITEMS
        row_mask = lane < tl.minimum(rows.number - start, shape.ITEMS).to(tl.int32)
        row_scale = _load_optional(rows.scale, start + lane, row_mask)
        row_error = _load_optional(rows.error, start + lane, row_mask)
        x = rows.data + start * rows.stride + offset
        products = _products(first, queries, query, x, row_mask, shape)
        # One subtraction and one maximum per score; a comparison would be converted to an integer to be reduced.
        if (tl.max(_distances(products, row_scale, bars)) >= -_slack(slope, row_error)) | all_pass:
            # `zero` is 0, which the compiler cannot know. Knowing it, it computes addresses of this branch before the
            # loop, and spills registers.
            zero = tl.minimum(rows.number - start, 0).to(tl.int32)
            _emit(
                products, row_scale, row_error, queries, tl.program_id(0) * shape.QUERIES + zero, rows,
                rows.base + start + lane, row_mask, allow, lists, list_index + zero,
                shape.ITEMS, shape.QUERIES,
            )  # fmt: skip


@triton.jit
def sample(queries, rows, allow, sampled, shape: tl.constexpr):
    """The best score of each group of sampled rows, and its position; NaN where a group has no eligible row.

    `sampled.size` rows are sampled, one from each of as many equal parts of the table, at a pseudo-random place
    (jittered stratified sampling), and dealt to the groups in turn. The r-th best of the groups is at most the r-th
    best of the sample, and hardly less while r^2 is small beside the number of groups; so one maximum per score
    replaces a list.
    """
    query = tl.program_id(0) * shape.QUERIES + tl.arange(0, shape.QUERIES)
    group = tl.program_id(1) * shape.ITEMS + tl.arange(0, shape.ITEMS)
    first = _load_queries(queries, query, tl.arange(0, shape.DEPTH), shape)
    query_scale = _load_optional(queries.scale, query, query < queries.number)
    radius = _load_optional(queries.radius, query, query < queries.number)
    best = tl.full((shape.ITEMS, shape.QUERIES), float("nan"), tl.float32)
    winner = tl.full((shape.ITEMS, shape.QUERIES), 0, tl.int32)
    for begin in range(0, sampled.size, sampled.groups):
        row_mask = begin + group < sampled.size
        row = _sampled_row(begin + group, sampled.size, rows.number)
        row_scale = _load_optional(rows.scale, row, row_mask)
        row_error = _load_optional(rows.error, row, row_mask)
        products = _products(first, queries, query, rows.data + row * rows.stride, row_mask, shape)
        scores = _scores(products, row_scale, row_error, query_scale, radius)
        better = row_mask[:, None] & ((scores > best) | ((best != best) & (scores == scores)))
        if allow.mask is not None:
            better &= _allowed(allow, query, row, better & (query < queries.number)[None, :])
        best = tl.where(better, scores, best)
        winner = tl.where(better, row.to(tl.int32)[:, None], winner)
    to = query.to(tl.int64)[None, :] * sampled.groups + group[:, None]
    inside = (query < queries.number)[None, :] & (group < sampled.groups)[:, None]
    tl.store(sampled.scores + to, tl.where(best == 0, 0.0, best), mask=inside)
    tl.store(sampled.positions + to, winner, mask=inside)


@triton.jit
def _sampled_row(i, size, N):
    """The row of sample i: at a pseudo-random place in the i-th of `size` equal parts of the table."""
    i = tl.minimum(i, size - 1)
    mixed = ((i.to(tl.uint32) + 1) * 0x9E3779B1).to(tl.int64)  # 2^32 / golden ratio: Fibonacci hashing
    width = N // size
    longer = N % size  # the first `longer` parts have one row more
    place = (mixed * (width + (i < longer).to(tl.int64))) >> 32
    return i.to(tl.int64) * width + tl.minimum(i, longer) + place


@triton.jit
def scan(queries, rows, allow, lists, shape: tl.constexpr):
    """Scores every row against every query, and emits the scores that reach their query's threshold.

    The programs of one split and all query tiles run side by side, so that rows are read from memory once. The fields
    of `lists` with one value per query are padded to whole tiles.
    """
    query = tl.program_id(0) * shape.QUERIES + tl.arange(0, shape.QUERIES)
    first = _load_queries(queries, query, tl.arange(0, shape.DEPTH), shape)
    _scan_tiles(
        tl.program_id(1), tl.cdiv(rows.number, shape.ITEMS), tl.num_programs(1), first, queries, rows, allow, lists,
        tl.program_id(0) * shape.QUERIES, shape,
    )  # fmt: skip


@triton.jit
def rescore(queries, rows, listed, lists, shape: tl.constexpr):
    """Scores the listed rows of a query exactly and writes the proven ones to its list, NaN for the others.

    The rows that are not listed have upper bounds, and so scores, of at most `listed.bound`. Hence every score above
    the bound is known: the list is as if `scan` had emitted all scores above that threshold. The bound proves nothing
    for a query whose radius is NaN. The product is that of `scan`, with 16 queries of which 15 are zero: the same bits.
    """
    query = tl.program_id(0)
    lane = tl.where(tl.arange(0, shape.QUERIES) == 0, query, queries.number)  # queries beyond the last load as zeros
    n = tl.load(listed.count + query)
    entry = tl.program_id(1) * shape.ITEMS + tl.arange(0, shape.ITEMS)
    row_mask = entry < n
    position = tl.load(listed.positions + query.to(tl.int64) * listed.size + entry, mask=row_mask, other=0)
    row = position.to(tl.int64) & 0xFFFFFFFF
    first = _load_queries(queries, lane, tl.arange(0, shape.DEPTH), shape)
    products = _products(first, queries, lane, rows.data + row * rows.stride, row_mask, shape)
    score = tl.sum(tl.where((lane == query)[None, :], products, 0.0), 1)
    list_index = query + tl.full((shape.ITEMS,), 0, tl.int32)
    radius = tl.load(listed.radius + list_index)
    bar = tl.where(radius == radius, tl.load(listed.bound + list_index), float("inf"))
    proven = row_mask & ((score > bar) | (bar == -float("inf")))
    to = query.to(tl.int64) * lists.size + lists.first + entry
    tl.store(lists.scores + to, tl.where(proven, score, float("nan")), mask=row_mask)
    tl.store(lists.positions + to, position, mask=row_mask)
    tl.store(lists.count + list_index, n, mask=entry == 0)
    tl.store(lists.score + list_index, bar, mask=entry == 0)


@triton.jit
def _cut(
    lists, list_index, k, query, query_mask, ids, exclude, best, to, R: tl.constexpr, TILE: tl.constexpr
):  # fmt: skip
    """Copies the k best of R lists to `best` from entry `to` on, and returns how many were copied.

    The thresholds of lists with k entries or more rise to their k-th best.
    """
    start = list_index.to(tl.int64) * lists.size
    n = tl.load(lists.count + list_index)
    if exclude.ids is not None:
        drop_excluded(lists, ids, start, n, exclude, query, query_mask, R, TILE)
    wanted = tl.zeros((R,), tl.int32) + k
    score, tie, valid = kth_best(lists, ids, start, n, wanted, R, TILE)
    kept = compact(lists, ids, start, n, score, tie, best, to, R, TILE)
    raised = query_mask & (valid >= k)
    tl.store(lists.score + list_index, score, mask=raised)
    tl.store(lists.tie + list_index, tie, mask=raised)
    tl.store(lists.count + list_index, kept)
    return kept


@triton.jit
def collect(
    queries, rows, allow, exclude, pending, lists, best, shape: tl.constexpr, BLOCK: tl.constexpr, R: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    """Finds the k best rows of each split of the table for every pending query, whatever the data; k = `best.first`.

    A program has a list of its own in `lists` for each of its queries; a list holds k + BLOCK ITEMS entries or more.
    The program scans blocks of tiles, one tile at first, then two, ... up to BLOCK. Lists with 2 k entries, or without
    room for the next block, are cut to their k best, which raises their thresholds. The k best of split s are written
    to entry k + s k of the query's list in `best`. No data is shared between programs, and no list can overflow.
    """
    query = tl.program_id(0) * shape.QUERIES + tl.arange(0, shape.QUERIES)
    query_mask = query < queries.number
    query_mask &= tl.load(pending + query, mask=query_mask, other=0) > 0
    if tl.max(query_mask.to(tl.int32), 0) > 0:
        first = _load_queries(queries, query, tl.arange(0, shape.DEPTH), shape)
        list_index = (tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)) * shape.QUERIES
        _clear_lists(lists, list_index + tl.arange(0, shape.QUERIES), best, query, query_mask)
        tiles = tl.cdiv(rows.number, shape.ITEMS)
        tile = tl.program_id(1) + 0
        block = tile * 0 + 1
        while tile < tiles:
            stop = tl.minimum(tiles, tile + block * tl.num_programs(1))
            _scan_tiles(
                tile, stop, tl.num_programs(1), first, queries, rows, allow, lists, list_index, shape
            )  # fmt: skip
            tile += block * tl.num_programs(1)
            block = tl.minimum(2 * block, BLOCK)
            tl.debug_barrier()
            zero = tl.minimum(stop - 1, 0)  # hides addresses from the compiler, as in `_scan_tiles`
            for part in range(0, shape.QUERIES, R):
                member = part + zero + tl.arange(0, R)
                n = tl.max(tl.load(lists.count + list_index + member), 0)
                if (n >= 2 * best.first) | (n > lists.size - block * shape.ITEMS):
                    cut_query = tl.program_id(0) * shape.QUERIES + member
                    _cut(
                        lists, list_index + member, best.first, cut_query, cut_query < queries.number, rows.ids,
                        exclude, lists, (list_index + member).to(tl.int64) * lists.size, R, TILE,
                    )  # fmt: skip
            tl.debug_barrier()
        for part in range(0, shape.QUERIES, R):
            _write_best(
                lists, list_index, part + tl.arange(0, R), queries, pending, rows.ids, exclude, best, shape, R, TILE
            )  # fmt: skip


@triton.jit
def _clear_lists(lists, list_index, best, query, query_mask):
    """Empties lists and sets their thresholds to those of their queries; nothing passes where `query_mask` is false."""
    tl.store(lists.score + list_index, tl.load(best.score + query, mask=query_mask, other=float("inf")))
    tl.store(lists.tie + list_index, tl.load(best.tie + query, mask=query_mask, other=-1))
    tl.store(lists.count + list_index, tl.zeros_like(query))
    tl.debug_barrier()


@triton.jit
def _write_best(
    lists, list_index, member, queries, pending, ids, exclude, best, shape: tl.constexpr,
    R: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Writes the k best of a program's lists to its k entries of their queries' lists, NaN where there are fewer."""
    k = best.first
    query = tl.program_id(0) * shape.QUERIES + member
    query_mask = query < queries.number
    query_mask &= tl.load(pending + query, mask=query_mask, other=0) > 0
    to = query.to(tl.int64) * best.size + k + tl.program_id(1) * k
    kept = _cut(lists, list_index + member, k, query, query_mask, ids, exclude, best, to, R, TILE)
    entry = tl.arange(0, TILE)[None, :]
    nothing = tl.full((R, TILE), float("nan"), tl.float32)
    for begin in range(0, k, TILE):
        rest = query_mask[:, None] & (begin + entry >= kept[:, None]) & (begin + entry < k)
        tl.store(best.scores + to[:, None] + begin + entry, nothing, mask=rest)
        tl.store(best.positions + to[:, None] + begin + entry, tl.zeros((R, TILE), tl.int32), mask=rest)
