"""Kernels that choose among candidates: the threshold from a sample, the k best of a row, their order.

A candidate is a score and a position (uint32 in an int32). Rows of candidates lie in global memory; a NaN marks an
entry that is none: every score that can be returned is a number. Entries are compared by (score descending, tie
ascending), the tie being the external id, or the position where there are no ids, so that no two entries are equal.

The r-th best entry is found by bisection, first of the scores' bits, then, among equals, of the ties: at most 32 passes
over the row, and 32 more (63 with ids) only where equal scores stand on both sides of the border. A pass is one compare
and one addition an entry. There is no sort, so there are no registers to spill: a bitonic sort of 64 x 128 keys takes
all 255 and spills 191 (compiled for sm_80).
"""

import triton
import triton.language as tl

LAST_TIE = tl.constexpr((1 << 63) - 1)  # (-inf, LAST_TIE) is the threshold that every score reaches


@triton.jit
def _ordered(score):
    """int32 in the order of the scores."""
    bits = score.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _score_of(ordered):
    return (ordered ^ ((ordered >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _ties(positions, ids, mask, HAS_IDS: tl.constexpr):
    place = positions.to(tl.int64) & 0xFFFFFFFF
    if HAS_IDS:
        return tl.load(ids + place, mask=mask, other=0)
    else:
        return place


@triton.jit
def _load_row(scores, row, begin, n, TILE: tl.constexpr):
    """(R, TILE) scores of rows from their entry `begin` on, NaN beyond their ends."""
    entry = begin + tl.arange(0, TILE)[None, :]
    return tl.load(scores + row[:, None] + entry, mask=entry < n[:, None], other=float("nan"))


@triton.jit
def kth_best(scores, positions, ids, row, n, r, R: tl.constexpr, TILE: tl.constexpr, HAS_IDS: tl.constexpr):
    """Score and tie of the r-th best of n entries, and the number of valid ones, for R rows that begin at `row`.

    A row with fewer than r valid entries has the threshold that all reach.
    """
    longest = tl.max(n, 0)
    valid = tl.zeros((R,), tl.int32)
    least = tl.full((R,), float("inf"), tl.float32)
    most = tl.full((R,), -float("inf"), tl.float32)
    for begin in range(0, longest, TILE):
        found = _load_row(scores, row, begin, n, TILE)
        number = found == found
        valid += tl.sum(number.to(tl.int32), 1)
        least = tl.minimum(least, tl.min(tl.where(number, found, float("inf")), 1))
        most = tl.maximum(most, tl.max(tl.where(number, found, -float("inf")), 1))
    enough = valid >= r
    low = tl.where(enough, _ordered(least), 0).to(tl.int64)
    high = tl.where(enough, _ordered(most), 0).to(tl.int64)
    reach_low = valid  # entries that reach low: at least r
    above_high = tl.zeros((R,), tl.int32)  # entries above high: fewer than r
    while tl.max(high - low, 0) > 0:
        middle = low + ((high - low + 1) >> 1)
        score = _score_of(middle.to(tl.int32))
        count = tl.zeros((R,), tl.int32)
        for begin in range(0, longest, TILE):
            count += tl.sum((_load_row(scores, row, begin, n, TILE) >= score[:, None]).to(tl.int32), 1)
        up = (count >= r) & (high > low)
        down = (count < r) & (high > low)
        low = tl.where(up, middle, low)
        reach_low = tl.where(up, count, reach_low)
        high = tl.where(down, middle - 1, high)
        above_high = tl.where(down, count, above_high)
    border = _score_of(low.to(tl.int32))
    need = r - above_high  # of those that equal the border
    divided = enough & (reach_low > r)
    first = tl.zeros((R,), tl.int64)
    last = tl.where(divided, LAST_TIE if HAS_IDS else 0xFFFFFFFF, 0).to(tl.int64)
    while tl.max(last - first, 0) > 0:
        middle = first + ((last - first) >> 1)
        count = tl.zeros((R,), tl.int32)
        for begin in range(0, longest, TILE):
            same = _load_row(scores, row, begin, n, TILE) == border[:, None]
            place = tl.load(positions + row[:, None] + begin + tl.arange(0, TILE)[None, :], mask=same, other=0)
            count += tl.sum((same & (_ties(place, ids, same, HAS_IDS) <= middle[:, None])).to(tl.int32), 1)
        last = tl.where(divided & (count >= need), middle, last)
        first = tl.where(divided & (count < need), middle + 1, first)
    score = tl.where(enough, border, -float("inf"))
    tie = tl.where(divided, last, LAST_TIE)
    return score, tie, valid


@triton.jit
def reaches(scores, ties, score, tie):
    """Whether (scores, ties) are at least as good as (score, tie)."""
    return (scores > score) | ((scores == score) & (ties <= tie))


@triton.jit
def compact(
    scores, positions, ids, row, n, score, tie, to_scores, to_positions, to,
    R: tl.constexpr, TILE: tl.constexpr, HAS_IDS: tl.constexpr,
):  # fmt: skip
    """Copies the entries of R rows that reach (score, tie) to `to`, in the order they stand in; returns their number.

    A row may be compacted in place: an entry never moves up, and a tile is read before it is written.
    """
    entry = tl.arange(0, TILE)[None, :]
    moved = tl.zeros((R,), tl.int32)
    for begin in range(0, tl.max(n, 0), TILE):
        here = begin + entry < n[:, None]
        found = _load_row(scores, row, begin, n, TILE)
        place = tl.load(positions + row[:, None] + begin + entry, mask=here, other=0)
        keep = reaches(found, _ties(place, ids, here, HAS_IDS), score[:, None], tie[:, None])
        slot = moved[:, None] + tl.cumsum(keep.to(tl.int32), 1) - 1
        tl.debug_barrier()
        tl.store(to_scores + to[:, None] + slot, found, mask=keep)
        tl.store(to_positions + to[:, None] + slot, place, mask=keep)
        moved += tl.sum(keep.to(tl.int32), 1)
    tl.debug_barrier()
    return moved


@triton.jit
def excluded_range(exclude_offsets, E, query, live):
    """Where the ids that a query excludes begin and end; in [0, E] whatever the offsets say."""
    first = tl.load(exclude_offsets + query, mask=live, other=0)
    last = tl.load(exclude_offsets + query + 1, mask=live, other=0)
    first = tl.minimum(tl.maximum(first, 0), E)
    return first, tl.minimum(tl.maximum(last, first), E)


@triton.jit
def drop_excluded(
    scores, positions, ids, row, n, exclude_offsets, exclude_ids, E, query, live,
    R: tl.constexpr, TILE: tl.constexpr, HAS_IDS: tl.constexpr,
):  # fmt: skip
    """Makes NaN of the entries of R rows that their queries exclude: every entry is compared with every excluded id."""
    entry = tl.arange(0, TILE)[None, :]
    first, last = excluded_range(exclude_offsets, E, query, live)
    nothing = tl.full((R, TILE), float("nan"), tl.float32)
    for begin in range(0, tl.max(n, 0), TILE):
        here = begin + entry < n[:, None]
        place = tl.load(positions + row[:, None] + begin + entry, mask=here, other=0)
        ties = _ties(place, ids, here, HAS_IDS)
        drop = tl.zeros((R, TILE), tl.int1)
        for skip in range(0, tl.max(last - first, 0), 4):
            for one in tl.static_range(4):  # four loads on their way at a time
                listed = tl.load(exclude_ids + first + skip + one, mask=first + skip + one < last, other=-1)
                drop |= ties == listed[:, None]
        tl.store(scores + row[:, None] + begin + entry, nothing, mask=here & drop)
    tl.debug_barrier()


@triton.jit
def threshold(
    scores, positions, ids, groups, rate, k, exclude_offsets, E, B,
    to_score, to_tie, count, kept, pending, all_pending, padded,
    R: tl.constexpr, TILE: tl.constexpr, HAS_IDS: tl.constexpr, HAS_EXCLUDE: tl.constexpr,
):  # fmt: skip
    """Begins a search: the threshold of each query, no candidates yet.

    Of the m = k + excluded best rows of the table, a sample of one row in `rate` holds about m / rate. The r-th best of
    the sample, with r = m / rate + 5 sqrt(m / rate) + 6 rounded up, is below the m-th best row with a probability of
    1 - 1e-6. Without a sample (groups = 0) every score passes. What pads the queries to `padded` lets nothing pass.
    """
    query = tl.program_id(0) * R + tl.arange(0, R)
    live = query < B
    wanted = tl.full((R,), 1.0, tl.float32) * k
    if HAS_EXCLUDE:
        first, last = excluded_range(exclude_offsets, E, query, live)
        wanted += (last - first).to(tl.float32)
    share = wanted / rate
    r = (share + 5 * tl.sqrt(share) + 7).to(tl.int32)
    row = query.to(tl.int64) * groups
    score, tie, _ = kth_best(scores, positions, ids, row, tl.where(live, groups, 0), r, R, TILE, HAS_IDS)
    tl.store(to_score + query, tl.where(live, score, float("inf")), mask=query < padded)
    tl.store(to_tie + query, tl.where(live, tie, -1), mask=query < padded)
    tl.store(count + query, tl.zeros((R,), tl.int32), mask=live)
    tl.store(kept + query, tl.zeros((R,), tl.int32), mask=live)
    tl.store(pending + query, tl.zeros((R,), tl.int32) + all_pending, mask=live)


@triton.jit
def select(
    scores, positions, ids, row_size, room, k, exclude_offsets, exclude_ids, E, B,
    to_score, to_tie, count, kept, pending,
    R: tl.constexpr, TILE: tl.constexpr,
    HAS_IDS: tl.constexpr, HAS_EXCLUDE: tl.constexpr, COLLECTED: tl.constexpr,
):  # fmt: skip
    """Keeps the k best of each row at its beginning, or says that the query must be collected.

    A row is the `kept` best of earlier chunks in its first k places, then candidates: `count` that `scan` emitted, of
    which `room` fit, or (COLLECTED, for pending queries only) `room` that `collect` left. What `scan` emitted holds the
    k best if none was lost and at least k are left, or if every score passed the threshold. Otherwise the query is
    pending; its next threshold is the k-th best of what was stored, if there are as many, which k rows are known to
    reach, and else the one that all reach.
    """
    query = tl.program_id(0) * R + tl.arange(0, R)
    live = query < B
    before = tl.load(kept + query, mask=live, other=0)
    if COLLECTED:
        live &= tl.load(pending + query, mask=live, other=0) > 0
        emitted = tl.zeros((R,), tl.int64) + room
    else:
        emitted = tl.load(count + query, mask=live, other=0).to(tl.uint32).to(tl.int64)
    row = query.to(tl.int64) * row_size
    n = tl.where(live, k + tl.minimum(emitted, room), 0).to(tl.int32)
    entry = tl.arange(0, TILE)[None, :]
    nothing = tl.full((R, TILE), float("nan"), tl.float32)
    for begin in range(0, k, TILE):
        gap = live[:, None] & (begin + entry >= before[:, None]) & (begin + entry < k)
        tl.store(scores + row[:, None] + begin + entry, nothing, mask=gap)
        tl.store(positions + row[:, None] + begin + entry, tl.zeros((R, TILE), tl.int32), mask=gap)
    tl.debug_barrier()
    if HAS_EXCLUDE:
        drop_excluded(
            scores, positions, ids, row, n, exclude_offsets, exclude_ids, E, query, live, R, TILE, HAS_IDS
        )  # fmt: skip
    score, tie, valid = kth_best(scores, positions, ids, row, n, tl.zeros((R,), tl.int32) + k, R, TILE, HAS_IDS)
    if not COLLECTED:
        old_score = tl.load(to_score + query, mask=live, other=0.0)
        all_passed = (old_score == -float("inf")) & (tl.load(to_tie + query, mask=live, other=0) == LAST_TIE)
        failed = (emitted > room) | ((valid < k) & ~all_passed)
        tl.store(pending + query, failed.to(tl.int32), mask=live)
        tl.store(count + query, tl.zeros((R,), tl.int32), mask=live)
        n = tl.where(failed, 0, n)
        done = live & ~failed
    else:
        done = live
    tl.store(to_score + query, score, mask=live)
    tl.store(to_tie + query, tie, mask=live)
    moved = compact(scores, positions, ids, row, n, score, tie, scores, positions, row, R, TILE, HAS_IDS)
    tl.store(kept + query, moved, mask=done)


@triton.jit
def rank(
    scores, positions, ids, row_size, kept, k, values, indices,
    TILE: tl.constexpr, OTHERS: tl.constexpr, HAS_IDS: tl.constexpr,
):  # fmt: skip
    """Writes the kept entries of a query to the places of their ranks, fillers to the rest.

    An entry's rank is the number of better ones, so there is no sort: k^2 compares a query, 10^6 at k = 1000.
    """
    query = tl.program_id(0).to(tl.int64)
    place = tl.program_id(1) * TILE + tl.arange(0, TILE)
    n = tl.load(kept + query)
    row = query * row_size
    mine = tl.load(scores + row + place, mask=place < n, other=float("nan"))
    position = tl.load(positions + row + place, mask=place < n, other=0)
    tie = _ties(position, ids, place < n, HAS_IDS)
    better = tl.zeros((TILE,), tl.int32)
    for begin in range(0, n, OTHERS):
        other = begin + tl.arange(0, OTHERS)
        score = tl.load(scores + row + other, mask=other < n, other=float("nan"))
        other_position = tl.load(positions + row + other, mask=other < n, other=0)
        other_tie = _ties(other_position, ids, other < n, HAS_IDS)
        wins = (score[None, :] > mine[:, None]) | (
            (score[None, :] == mine[:, None]) & (other_tie[None, :] < tie[:, None])
        )
        better += tl.sum(wins.to(tl.int32), 1)
    found = place < n
    to = query * k + tl.where(found, better, place)
    tl.store(values + to, tl.where(found, mine, -float("inf")), mask=place < k)
    tl.store(indices + to, tl.where(found, position.to(tl.int64) & 0xFFFFFFFF, -1), mask=place < k)
