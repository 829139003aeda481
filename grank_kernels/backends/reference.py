"""Plain torch on any device: the definition, the oracle of the tests, and what runs where nothing faster can."""

import torch
from torch.nn import functional as F

from grank_kernels.quantise import quantise

SEGMENT = 128  # dimensions summed before the partial sum is added to the total
CHUNK_SCORES = 1 << 22  # scores held at a time


def unavailable() -> str | None:
    """Why no op of this backend can run here."""
    return None


def mips_topk_unsupported(queries: torch.Tensor, items: torch.Tensor) -> str | None:
    """Why `mips_topk` cannot run for these tensors."""
    if items.device != queries.device:
        return f"queries are on {queries.device} and items on {items.device}"
    return None


def mips_topk(
    queries: torch.Tensor,
    items: torch.Tensor,
    row_scale: torch.Tensor | None,
    ids: torch.Tensor | None,
    k: int,
    exclude_offsets: torch.Tensor | None,
    exclude_ids: torch.Tensor | None,
    allow: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The k best rows by (score, id), chunk by chunk: `values` (B, k) float32, `positions` (B, k) int64."""
    B, N = len(queries), len(items)
    device = queries.device
    excluded = _excluded_positions(exclude_offsets, exclude_ids, ids, B, N)
    values = torch.empty(B, 0, dtype=torch.float32, device=device)
    positions = torch.empty(B, 0, dtype=torch.int64, device=device)
    eligible = torch.empty(B, 0, dtype=torch.bool, device=device)
    step = max(1, CHUNK_SCORES // max(B, 1))
    for start in range(0, N, step):
        stop = min(N, start + step)
        scores = _scores(queries, items[start:stop], None if row_scale is None else row_scale[start:stop])
        allowed = ~scores.isnan()
        if allow is not None:
            allowed &= allow[..., start:stop]
        if excluded is not None:
            query, position = excluded
            inside = (position >= start) & (position < stop)
            allowed[query[inside], position[inside] - start] = False
        values = torch.cat([values, scores.masked_fill(~allowed, -torch.inf) + 0.0], 1)  # -0.0 becomes 0.0
        positions = torch.cat([positions, torch.arange(start, stop, device=device).expand(B, -1)], 1)
        eligible = torch.cat([eligible, allowed], 1)
        order = _best_first(values, eligible, positions if ids is None else ids[positions])[:, :k]
        values, positions, eligible = (x.gather(1, order) for x in (values, positions, eligible))
    positions = positions.masked_fill(~eligible, -1)
    missing = (0, k - values.shape[1])
    return F.pad(values, missing, value=-torch.inf), F.pad(positions, missing, value=-1)


def _scores(queries: torch.Tensor, rows: torch.Tensor, row_scale: torch.Tensor | None) -> torch.Tensor:
    """(B, n) float32, each a function of its query and its row alone, bit for bit."""
    queries = queries.float()
    if row_scale is not None:
        numbers, query_scale = quantise(queries)
        sums = numbers.double() @ rows.double().T  # integers below 2^53: exact in any order
        return sums.float() * (query_scale[:, None] * row_scale)
    columns = rows.T.float().contiguous()
    total = torch.zeros(len(queries), len(rows), dtype=torch.float32, device=queries.device)
    for begin in range(0, queries.shape[1], SEGMENT):
        partial = torch.zeros_like(total)
        for j in range(begin, min(begin + SEGMENT, queries.shape[1])):
            partial += queries[:, j, None] * columns[j]
        total += partial
    return total


def _best_first(values: torch.Tensor, eligible: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """(B, n) order by (eligible first, score descending, id ascending): stable sorts from the last key to the first."""
    order = ids.argsort(dim=1, stable=True)
    order = order.gather(1, values.gather(1, order).argsort(dim=1, descending=True, stable=True))
    return order.gather(1, eligible.gather(1, order).argsort(dim=1, descending=True, stable=True))


def _excluded_positions(
    offsets: torch.Tensor | None, excluded: torch.Tensor | None, ids: torch.Tensor | None, B: int, N: int
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """The (query, position) pairs that are excluded; ids that no row has are left out."""
    if offsets is None or excluded is None:
        return None
    offsets, excluded = offsets.contiguous(), excluded.contiguous()  # searchsorted warns otherwise
    if offsets.device.type == "cpu":
        check_exclude(offsets, excluded, None if ids is not None else N)
    entry = torch.arange(len(excluded), device=excluded.device)
    query = torch.searchsorted(offsets, entry, right=True) - 1
    known = (query >= 0) & (query < B) & (excluded >= 0)
    if ids is None:
        known &= excluded < N
        return query[known], excluded[known]
    by_id, position = ids.sort()
    place = torch.searchsorted(by_id, excluded).clamp(max=max(N - 1, 0))
    known &= by_id[place] == excluded if N else torch.zeros_like(known)
    return query[known], position[place[known]]


def check_exclude(offsets: torch.Tensor, excluded: torch.Tensor, limit: int | None) -> None:
    """What only the data can tell: offsets that lead outside the ids, and ids outside [-1, limit)."""
    first, last = int(offsets[0]), int(offsets[-1])
    if first < 0 or last > len(excluded):
        raise ValueError(f"exclude: offsets run from {first} to {last}; they take 0 to {len(excluded)}")
    if bool((offsets.diff() < 0).any()):
        raise ValueError("exclude: offsets must not decrease")
    used = excluded[first:last]
    wrong = used[(used < -1) | (used >= limit)] if limit is not None else used[used < -1]
    if len(wrong):
        top = "2^63" if limit is None else limit
        raise ValueError(f"exclude: id {int(wrong[0])} is out of range; it takes ids in [-1, {top}), -1 for none")
