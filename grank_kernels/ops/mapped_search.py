"""`mips_topk` over a table in a file: part by part, while the next part is read ahead.

Parts are searched by the op for tables in memory, which reads their bytes once, from the page cache. The process
allocates memory for nine lists of k places a query, however long the table. A score depends on its query and row alone,
so the merged results of the parts are those of the whole table.
"""

from collections.abc import Callable, Iterator

import torch

from grank_kernels.backends.problems import MipsTopkProblem
from grank_kernels.table.mapping import Mapping, streamed

PART_BYTES = 1 << 26  # every part is searched for k rows: small ones would be sorted, and merged, more than scanned
_MERGED = 8  # lists merged at once
_LAST = torch.iinfo(torch.int64).max
_SIGN_BIT = torch.iinfo(torch.int32).min

Search = Callable[[MipsTopkProblem], tuple[torch.Tensor, torch.Tensor]]


def search(
    op: Search, mapping: Mapping, problem: MipsTopkProblem, progress: Callable[[int, int], object] | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Values and ids (B, k) of all rows of the problem, which are in `mapping`.

    Args:
        op: searches one part: a backend's `mips_topk`, or the torch op.
        mapping: the mapped file.
        problem: of the whole table.
        progress: called after every part with (rows done, rows in all).
    """
    queries, rows, row_scale, ids, k, _, excluded, allow = problem
    columns = [x for x in (rows, row_scale, ids) if x is not None]

    def read_ahead(part: slice) -> None:
        for x in columns:
            mapping.read_ahead(x[part])

    lists: list[tuple[torch.Tensor, torch.Tensor]] = []  # scores and ids, in the order of the table
    for part in streamed(_parts(rows, k), read_ahead):
        here = problem._replace(
            items=rows[part],
            row_scale=None if row_scale is None else row_scale[part],
            ids=None if ids is None else ids[part],
            exclude_ids=excluded if ids is not None or excluded is None else within(excluded, part),
            allow=None if allow is None else allow[..., part],
        )
        best, positions = op(here)
        own = positions + part.start if here.ids is None else here.ids[positions.clamp(min=0)]
        lists.append((best, own.where(positions >= 0, -1)))
        if len(lists) > _MERGED:
            lists = [_merged(lists, k, ids is None)]
        if progress is not None:
            progress(part.stop, len(rows))
    if not lists:
        return queries.new_empty(len(queries), 0, dtype=torch.float32), queries.new_empty(
            len(queries), 0, dtype=torch.int64
        )
    return lists[0] if len(lists) == 1 else _merged(lists, k, ids is None)


def _merged(
    lists: list[tuple[torch.Tensor, torch.Tensor]], k: int, by_position: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """The first k of several sorted lists; `by_position`: ids are positions, and ascend from list to list."""
    values, ids = (torch.cat(columns, 1) for columns in zip(*lists, strict=True))
    if not by_position:
        return best_of(values, ids, k)
    # Fillers have the lowest key there is, and stand behind rows of score -infinity.
    keys = order_key(values).long() * 2 + (ids >= 0)
    order = keys.argsort(dim=1, descending=True, stable=True)[:, :k]
    return values.gather(1, order), ids.gather(1, order)


def _parts(rows: torch.Tensor, k: int) -> Iterator[slice]:
    """Slices of `PART_BYTES` of rows, of 4 k rows at least."""
    step = max(1, PART_BYTES // max(1, rows.shape[1] * rows.itemsize), 4 * k)
    for start in range(0, len(rows), step):
        yield slice(start, min(start + step, len(rows)))


def within(excluded: torch.Tensor, part: slice) -> torch.Tensor:
    """Positions relative to the start of a part; -1 for positions outside it."""
    shifted: torch.Tensor = excluded - part.start
    return shifted.masked_fill((shifted < 0) | (excluded >= part.stop), -1)


def best_of(values: torch.Tensor, ids: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The first k of every row by (score descending, id ascending); fillers (-infinity, -1) come last."""
    order = ids.where(ids >= 0, _LAST).argsort(dim=1, stable=True)
    order = order.gather(1, order_key(values).gather(1, order).argsort(dim=1, descending=True, stable=True))[:, :k]
    return values.gather(1, order), ids.gather(1, order)


def order_key(values: torch.Tensor) -> torch.Tensor:
    """Int32 keys in the order of float32 scores without NaN, equal where the scores are.

    Comparing floats would take subnormal scores for 0 in a process that has called `torch.set_flush_denormal(True)`.
    """
    bits = values.view(torch.int32)
    return torch.where(bits < 0, _SIGN_BIT - bits, bits)  # -0.0 is the sign bit alone, and becomes 0
