"""Triton kernels that select candidates: a threshold from a sample, the k best of a list, their order.

A candidate is a score and a position (uint32 in an int32). Lists of candidates lie in global memory; a NaN score marks
a dropped entry, since a NaN score is never returned. Entries are ordered by (score descending, tie ascending); the tie
is the external id, or the position where there are no ids, so no two entries compare equal.

The r-th best entry is found by bisection, first on the bits of the scores, then, among equal scores, on the ties: at
most 32 passes over the list, and 32 more (63 with ids) only where equal scores lie on both sides of the border. A pass
costs one comparison and one addition per entry. There is no sort and so no register is spilled: a bitonic sort of
64 x 128 keys takes all 255 registers and spills 191 (compiled for sm_80).
"""

import triton
import triton.language as tl

LAST_TIE = tl.constexpr((1 << 63) - 1)  # every score reaches the threshold (-inf, LAST_TIE)
POSITION_BITS = tl.constexpr(0xFFFFFFFF)  # a position is an uint32


@triton.jit
def _ordered(score):
    """int32 in the order of the scores."""
    bits = score.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _score_of(ordered):
    """The score that `_ordered` maps to `ordered`."""
    return (ordered ^ ((ordered >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _ties(positions, ids, mask):
    """The tie of each entry: its external id, or its position."""
    position = positions.to(tl.int64) & POSITION_BITS
    if ids is not None:
        return tl.load(ids + position, mask=mask, other=0)
    else:
        return position


@triton.jit
def _load_scores(scores, start, begin, n, TILE: tl.constexpr):
    """(R, TILE) scores of the lists that start at `start`, from entry `begin` on; NaN beyond their n entries."""
    entry = begin + tl.arange(0, TILE)[None, :]
    return tl.load(scores + start[:, None] + entry, mask=entry < n[:, None], other=float("nan"))


@triton.jit
def kth_best(entries, ids, start, n, r, R: tl.constexpr, TILE: tl.constexpr):
    """Score and tie of the r-th best of n entries, and the number of valid ones, for the R lists that start at `start`.

    A list with fewer than r valid entries gets the threshold that every score reaches.
    """
    valid, least, most = _range_of_scores(entries, start, n, R, TILE)
    enough = valid >= r
    border, reached, above = _bisect_scores(entries, start, n, r, enough, valid, least, most, R, TILE)
    split = enough & (reached > r)  # entries equal to the border lie on both sides of it
    tie = _bisect_ties(entries, ids, start, n, border, r - above, split, R, TILE)
    return tl.where(enough, border, -float("inf")), tl.where(split, tie, LAST_TIE), valid


@triton.jit
def _range_of_scores(entries, start, n, R: tl.constexpr, TILE: tl.constexpr):
    """The number of valid entries of R lists, their lowest and their highest score."""
    valid = tl.zeros((R,), tl.int32)
    least = tl.full((R,), float("inf"), tl.float32)
    most = tl.full((R,), -float("inf"), tl.float32)
    for begin in range(0, tl.max(n, 0), TILE):
        found = _load_scores(entries.scores, start, begin, n, TILE)
        number = found == found
        valid += tl.sum(number.to(tl.int32), 1)
        least = tl.minimum(least, tl.min(tl.where(number, found, float("inf")), 1))
        most = tl.maximum(most, tl.max(tl.where(number, found, -float("inf")), 1))
    return valid, least, most


@triton.jit
def _bisect_scores(entries, start, n, r, enough, valid, least, most, R: tl.constexpr, TILE: tl.constexpr):
    """The r-th best score of R lists with `enough` entries; how many entries reach it, and how many are above it."""
    longest = tl.max(n, 0)
    low = tl.where(enough, _ordered(least), 0).to(tl.int64)
    high = tl.where(enough, _ordered(most), 0).to(tl.int64)
    reached = valid  # entries that reach low: at least r
    above = tl.zeros((R,), tl.int32)  # entries above high: fewer than r
    while tl.max(high - low, 0) > 0:
        middle = low + ((high - low + 1) >> 1)
        score = _score_of(middle.to(tl.int32))
        count = tl.zeros((R,), tl.int32)
        for begin in range(0, longest, TILE):
            found = _load_scores(entries.scores, start, begin, n, TILE)
            count += tl.sum((found >= score[:, None]).to(tl.int32), 1)
        up = (count >= r) & (high > low)
        down = (count < r) & (high > low)
        low = tl.where(up, middle, low)
        reached = tl.where(up, count, reached)
        high = tl.where(down, middle - 1, high)
        above = tl.where(down, count, above)
    return _score_of(low.to(tl.int32)), reached, above


@triton.jit
def _bisect_ties(entries, ids, start, n, border, need, split, R: tl.constexpr, TILE: tl.constexpr):
    """The `need`-th smallest tie among the entries equal to `border`, for the lists where `split`."""
    longest = tl.max(n, 0)
    first = tl.zeros((R,), tl.int64)
    last = tl.where(split, POSITION_BITS if ids is None else LAST_TIE, 0).to(tl.int64)
    while tl.max(last - first, 0) > 0:
        middle = first + ((last - first) >> 1)
        count = tl.zeros((R,), tl.int32)
        for begin in range(0, longest, TILE):
            same = _load_scores(entries.scores, start, begin, n, TILE) == border[:, None]
            entry = start[:, None] + begin + tl.arange(0, TILE)[None, :]
            position = tl.load(entries.positions + entry, mask=same, other=0)
            count += tl.sum((same & (_ties(position, ids, same) <= middle[:, None])).to(tl.int32), 1)
        last = tl.where(split & (count >= need), middle, last)
        first = tl.where(split & (count < need), middle + 1, first)
    return last


@triton.jit
def reaches(scores, ties, score, tie):
    """Whether (scores, ties) are at least as good as (score, tie)."""
    return (scores > score) | ((scores == score) & (ties <= tie))


@triton.jit
def compact(lists, ids, start, n, score, tie, target, to, R: tl.constexpr, TILE: tl.constexpr):
    """Copies the entries of R lists that reach (score, tie) to `target` from `to` on, in order; returns their number.

    A list may be compacted in place: an entry never moves up, and a tile is read before it is written.
    """
    entry = tl.arange(0, TILE)[None, :]
    moved = tl.zeros((R,), tl.int32)
    for begin in range(0, tl.max(n, 0), TILE):
        inside = begin + entry < n[:, None]
        found = _load_scores(lists.scores, start, begin, n, TILE)
        position = tl.load(lists.positions + start[:, None] + begin + entry, mask=inside, other=0)
        keep = reaches(found, _ties(position, ids, inside), score[:, None], tie[:, None])
        slot = moved[:, None] + tl.cumsum(keep.to(tl.int32), 1) - 1
        tl.debug_barrier()
        tl.store(target.scores + to[:, None] + slot, found, mask=keep)
        tl.store(target.positions + to[:, None] + slot, position, mask=keep)
        moved += tl.sum(keep.to(tl.int32), 1)
    tl.debug_barrier()
    return moved


@triton.jit
def _excluded_range(exclude, query, query_mask):
    """Begin and end of the ids that a query excludes, clamped to [0, number] whatever the offsets hold."""
    first = tl.load(exclude.offsets + query, mask=query_mask, other=0)
    last = tl.load(exclude.offsets + query + 1, mask=query_mask, other=0)
    first = tl.minimum(tl.maximum(first, 0), exclude.number)
    return first, tl.minimum(tl.maximum(last, first), exclude.number)


@triton.jit
def drop_excluded(lists, ids, start, n, exclude, query, query_mask, R: tl.constexpr, TILE: tl.constexpr):
    """Sets the scores of excluded entries of R lists to NaN, comparing every entry with every excluded id."""
    entry = tl.arange(0, TILE)[None, :]
    first, last = _excluded_range(exclude, query, query_mask)
    nothing = tl.full((R, TILE), float("nan"), tl.float32)
    for begin in range(0, tl.max(n, 0), TILE):
        inside = begin + entry < n[:, None]
        position = tl.load(lists.positions + start[:, None] + begin + entry, mask=inside, other=0)
        ties = _ties(position, ids, inside)
        drop = tl.zeros((R, TILE), tl.int1)
        for skip in range(0, tl.max(last - first, 0), 4):
            for one in tl.static_range(4):  # four loads in flight
                listed = tl.load(exclude.ids + first + skip + one, mask=first + skip + one < last, other=-1)
                drop |= ties == listed[:, None]
        tl.store(lists.scores + start[:, None] + begin + entry, nothing, mask=inside & drop)
    tl.debug_barrier()


@triton.jit
def threshold(
    sampled, ids, rate, exclude, lists, progress, all_pending, padded, R: tl.constexpr, TILE: tl.constexpr
):  # fmt: skip
    """Begins a search: sets the threshold of each query and empties its list.

    Of the m = k + excluded best rows of the table, a sample of one row in `rate` holds about m / rate. The r-th best of
    the sample, with r = m / rate + 5 sqrt(m / rate) + 6 rounded up, is below the m-th best row with a probability of
    1 - 1e-6. Without a sample (no groups) every score passes. The queries that pad the batch to `padded` let no score
    pass.
    """
    query = tl.program_id(0) * R + tl.arange(0, R)
    query_mask = query < progress.number
    wanted = tl.full((R,), 1.0, tl.float32) * lists.first
    if exclude.ids is not None:
        first, last = _excluded_range(exclude, query, query_mask)
        wanted += (last - first).to(tl.float32)
    share = wanted / rate
    r = (share + 5 * tl.sqrt(share) + 7).to(tl.int32)
    start = query.to(tl.int64) * sampled.groups
    score, tie, _ = kth_best(sampled, ids, start, tl.where(query_mask, sampled.groups, 0), r, R, TILE)
    tl.store(lists.score + query, tl.where(query_mask, score, float("inf")), mask=query < padded)
    tl.store(lists.tie + query, tl.where(query_mask, tie, -1), mask=query < padded)
    tl.store(lists.count + query, tl.zeros((R,), tl.int32), mask=query_mask)
    tl.store(progress.kept + query, tl.zeros((R,), tl.int32), mask=query_mask)
    tl.store(progress.pending + query, tl.zeros((R,), tl.int32) + all_pending, mask=query_mask)


@triton.jit
def select(
    lists, ids, exclude, room, progress, R: tl.constexpr, TILE: tl.constexpr, COLLECTED: tl.constexpr
):  # fmt: skip
    """Keeps the k best entries of each list at its beginning, or marks its query as pending; k = `lists.first`.

    The first k entries of a list hold the `kept` best of earlier chunks. Candidates follow: `count` from `scan`, of
    which `room` are stored, or (COLLECTED, pending queries only) `room` from `collect`. Those from `scan` include the k
    best if none was lost and at least k are left, or if every score passed the threshold. Otherwise the query is
    pending, and its next threshold is the k-th best stored entry, or, if fewer are stored, the one that every score
    reaches.
    """
    k = lists.first
    query = tl.program_id(0) * R + tl.arange(0, R)
    query_mask = query < progress.number
    before = tl.load(progress.kept + query, mask=query_mask, other=0)
    if COLLECTED:
        query_mask &= tl.load(progress.pending + query, mask=query_mask, other=0) > 0
        emitted = tl.zeros((R,), tl.int64) + room
    else:
        emitted = tl.load(lists.count + query, mask=query_mask, other=0).to(tl.uint32).to(tl.int64)
    start = query.to(tl.int64) * lists.size
    n = tl.where(query_mask, k + tl.minimum(emitted, room), 0).to(tl.int32)
    _clear_gap(lists, start, before, query_mask, R, TILE)
    if exclude.ids is not None:
        drop_excluded(lists, ids, start, n, exclude, query, query_mask, R, TILE)
    score, tie, valid = kth_best(lists, ids, start, n, tl.zeros((R,), tl.int32) + k, R, TILE)
    if not COLLECTED:
        old_score = tl.load(lists.score + query, mask=query_mask, other=0.0)
        old_tie = tl.load(lists.tie + query, mask=query_mask, other=0)
        all_passed = (old_score == -float("inf")) & (old_tie == LAST_TIE)
        failed = (emitted > room) | ((valid < k) & ~all_passed)
        tl.store(progress.pending + query, failed.to(tl.int32), mask=query_mask)
        tl.store(lists.count + query, tl.zeros((R,), tl.int32), mask=query_mask)
        n = tl.where(failed, 0, n)
        done = query_mask & ~failed
    else:
        done = query_mask
    tl.debug_barrier()  # every warp has read the thresholds before one warp stores the next
    tl.store(lists.score + query, score, mask=query_mask)
    tl.store(lists.tie + query, tie, mask=query_mask)
    moved = compact(lists, ids, start, n, score, tie, lists, start, R, TILE)
    tl.store(progress.kept + query, moved, mask=done)


@triton.jit
def _clear_gap(lists, start, kept, query_mask, R: tl.constexpr, TILE: tl.constexpr):
    """Sets the entries between the `kept` ones and the first candidate of R lists to NaN."""
    entry = tl.arange(0, TILE)[None, :]
    nothing = tl.full((R, TILE), float("nan"), tl.float32)
    for begin in range(0, lists.first, TILE):
        gap = query_mask[:, None] & (begin + entry >= kept[:, None]) & (begin + entry < lists.first)
        tl.store(lists.scores + start[:, None] + begin + entry, nothing, mask=gap)
        tl.store(lists.positions + start[:, None] + begin + entry, tl.zeros((R, TILE), tl.int32), mask=gap)
    tl.debug_barrier()


@triton.jit
def rank(lists, ids, kept, values, indices, TILE: tl.constexpr, OTHERS: tl.constexpr):
    """Writes the kept entries of a query in order, then fillers (-inf, -1) up to k = `lists.first`.

    An entry's rank is the number of better entries, so there is no sort: k^2 comparisons per query, 10^6 at k = 1000.
    """
    k = lists.first
    query = tl.program_id(0).to(tl.int64)
    entry = tl.program_id(1) * TILE + tl.arange(0, TILE)
    n = tl.load(kept + query)
    found = entry < n
    start = query * lists.size
    score = tl.load(lists.scores + start + entry, mask=found, other=float("nan"))
    position = tl.load(lists.positions + start + entry, mask=found, other=0)
    tie = _ties(position, ids, found)
    better = tl.zeros((TILE,), tl.int32)
    for begin in range(0, n, OTHERS):
        other = begin + tl.arange(0, OTHERS)
        other_score = tl.load(lists.scores + start + other, mask=other < n, other=float("nan"))
        other_position = tl.load(lists.positions + start + other, mask=other < n, other=0)
        other_tie = _ties(other_position, ids, other < n)
        wins = (other_score[None, :] > score[:, None]) | (
            (other_score[None, :] == score[:, None]) & (other_tie[None, :] < tie[:, None])
        )
        better += tl.sum(wins.to(tl.int32), 1)
    to = query * k + tl.where(found, better, entry)
    tl.store(values + to, tl.where(found, score, -float("inf")), mask=entry < k)
    tl.store(indices + to, tl.where(found, position.to(tl.int64) & POSITION_BITS, -1), mask=entry < k)
