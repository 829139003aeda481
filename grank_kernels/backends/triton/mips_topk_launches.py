"""A search as a list of launches. Imports Triton; imported when the first search needs it."""

import contextlib
from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import triton.language as tl

from grank_kernels.backends.triton import mips_topk_kernels as kernels
from grank_kernels.backends.triton import selection
from grank_kernels.backends.triton.mips_topk_plan import (
    CertifiedPlans,
    Device,
    Plan,
    make_certified_plans,
    make_plan,
    step_of_queries,
)
from grank_kernels.backends.triton.streaming import Chunk, chunk_rows, chunks

_TYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.int8: tl.int8}


def options(amd: bool) -> dict[str, Any]:
    """Options of the compiler, beside warps and stages.

    float32 products are fused multiply-adds, which is stated here since Triton's default is about to change. ptxas,
    left to itself, spills 40 registers of `collect` to keep to 128; told that it may use all, it takes 194 and spills
    none. On AMD one shape of MFMA for all tiles keeps one order of accumulation.
    """
    return {"enable_fp_fusion": True, **({"matrix_instr_nonkdim": 16} if amd else {"maxnreg": 255})}


@dataclass(frozen=True)
class Launch:
    """One launch of a kernel.

    Attributes:
        kernel: the function.
        grid: programs along each axis.
        arguments: tensors (their addresses are passed), numbers, or None where the kernel has no use for one.
        constants: what it is compiled for.
        warps: warps a program.
        stages: stages of the software pipeline.
    """

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    constants: dict[str, Any]
    warps: int
    stages: int

    def run(self) -> None:
        """Enqueues it on the current stream."""
        self.kernel[self.grid](
            **self.arguments, **self.constants, num_warps=self.warps, num_stages=self.stages,
            **options(torch.version.hip is not None),
        )  # fmt: skip


@dataclass(frozen=True)
class Problem:
    """What is searched: the arguments of the backend's `mips_topk`, checked, and how products are computed.

    Of the certified copy of float rows `query_scale` and `query_radius` are given, and the queries are int8: what the
    search then goes by is the upper bound of a score.
    """

    queries: torch.Tensor
    items: torch.Tensor
    row_scale: torch.Tensor | None
    ids: torch.Tensor | None
    k: int
    exclude_offsets: torch.Tensor | None
    exclude_ids: torch.Tensor | None
    allow: torch.Tensor | None
    compute: torch.dtype
    query_scale: torch.Tensor | None = None
    query_radius: torch.Tensor | None = None

    def of_queries(self, part: slice) -> "Problem":
        """The same for some of the queries."""
        allow, offsets = self.allow, self.exclude_offsets
        return Problem(
            self.queries[part], self.items, self.row_scale, self.ids, self.k,
            None if offsets is None else offsets[part.start : part.stop + 1], self.exclude_ids,
            allow[part] if allow is not None and allow.dim() == 2 else allow, self.compute,
            *(x if x is None else x[part] for x in (self.query_scale, self.query_radius)),
        )  # fmt: skip


@dataclass(frozen=True)
class Found:
    """The k best candidates of every query, in any order, and how they were found.

    Attributes:
        scores: (B, row_size); the first `kept` of a row count.
        positions: (B, row_size) of the rows.
        kept: (B,).
        threshold: (B,) or more, the score of the k-th best; -inf where there are fewer.
        pending: (B,), 1 of queries that `collect` had to search for.
        radius: (B,), where the scores are upper bounds.
    """

    scores: torch.Tensor
    positions: torch.Tensor
    kept: torch.Tensor
    threshold: torch.Tensor
    pending: torch.Tensor
    radius: torch.Tensor | None


def launches(
    problem: Problem, table: Iterable[Chunk], plan: Plan, device: Device, values: torch.Tensor, positions: torch.Tensor
) -> Iterator[Launch]:
    """The launches of one search, in order; buffers are allocated on the way."""
    found = yield from _best(problem, table, plan, device)
    yield _rank(problem, found, device, values, positions)


def certified_launches(
    problem: Problem, copy: Problem, chunk: Chunk, plans: CertifiedPlans, device: Device,
    values: torch.Tensor, positions: torch.Tensor,
) -> Generator[Launch, None, torch.Tensor]:  # fmt: skip
    """The same of a table with a certified copy, `chunk`: its best rows by upper bound are searched for, and rescored.

    If these are all that reach the k-th best score, as the bounds show, they hold the k best rows; otherwise `collect`
    searches the rows themselves, as it does when a sampled threshold fails. 12 launches at most. Returns how many rows
    were rescored, (B,) int64.
    """
    listed = yield from _best(copy, [chunk], plans.copy, device)
    found = yield from _best(problem, [Chunk(0, problem.items, None)], plans.rescore, device, listed)
    yield _rank(problem, found, device, values, positions)
    return listed.kept.long().where(found.pending == 0, len(problem.items))


def _rank(problem: Problem, found: Found, device: Device, values: torch.Tensor, positions: torch.Tensor) -> Launch:
    B, row_size = found.scores.shape
    return Launch(
        selection.rank, (B, -(-problem.k // device.rank[0])),
        {"scores": found.scores, "positions": found.positions, "ids": problem.ids, "row_size": row_size,
         "kept": found.kept, "k": problem.k, "values": values, "indices": positions},
        {"TILE": device.rank[0], "OTHERS": device.rank[1], "HAS_IDS": problem.ids is not None}, 4, 1,
    )  # fmt: skip


def _best(
    problem: Problem, table: Iterable[Chunk], plan: Plan, device: Device, listed: Found | None = None
) -> Generator[Launch, None, Found]:
    """Launches that find the k best.

    threshold (from a sample, or none) -> scan and emit, or rescore what is listed -> select -> collect what failed ->
    select that; or, for small k, threshold (none) -> collect -> select. int8 queries are quantised first. With `rank`
    these are 8 at most, for a table in one chunk. Later chunks go on from the k best so far and their threshold, by 2
    to 4 launches each.
    """
    p, k = problem, problem.k
    B, d = p.queries.shape

    def empty(*shape: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=p.queries.device)

    def candidates(*shape: int) -> tuple[torch.Tensor, torch.Tensor]:
        return empty(*shape, dtype=torch.float32), empty(*shape, dtype=torch.int32)

    has_ids, has_allow, has_exclude = p.ids is not None, p.allow is not None, p.exclude_ids is not None
    queries, query_scale = p.queries, p.query_scale
    if p.compute == torch.int8 and query_scale is None:
        queries, query_scale = empty(B, d, dtype=torch.int8), empty(B, dtype=torch.float32)
        yield Launch(
            kernels.quantise, (B,),
            {"queries": p.queries, "row_stride": p.queries.stride(0), "column_stride": p.queries.stride(1), "d": d,
             "numbers": queries, "scales": query_scale},
            {"D": min(1024, 1 << max(4, (d - 1).bit_length()))}, 4, 1,
        )  # fmt: skip
    allow = p.allow if p.allow is None else p.allow.view(torch.uint8)
    scoring = {
        "queries": queries, "q_row": queries.stride(0), "q_column": queries.stride(1), "query_scale": query_scale,
        "query_radius": p.query_radius, "B": B,
        "allow": allow, "allow_row": 0 if allow is None or allow.dim() == 1 else allow.stride(0),
        "allow_column": 0 if allow is None else allow.stride(-1),
    }  # fmt: skip
    excluding = {
        "exclude_offsets": p.exclude_offsets, "exclude_ids": p.exclude_ids,
        "E": 0 if p.exclude_ids is None else len(p.exclude_ids),
    }  # fmt: skip

    def shape_of(tile: Any) -> dict[str, Any]:
        return {
            "D": d, "DEPTH": tile.depth, "ITEMS": tile.items, "QUERIES": tile.queries,
            "COMPUTE": _TYPES[p.compute], "BOUNDED": p.query_radius is not None, "HAS_ALLOW": has_allow,
        }  # fmt: skip

    row_size = k + plan.room
    scores, places = candidates(B, row_size)
    padded = -(-B // plan.tile.queries) * plan.tile.queries
    score, tie = empty(padded, dtype=torch.float32), empty(padded, dtype=torch.int64)
    count, kept, pending = empty(3, B, dtype=torch.int32)
    per_query = {"R": device.rows, "TILE": 1024, "HAS_IDS": has_ids, "HAS_EXCLUDE": has_exclude}
    query_programs = (-(-B // device.rows),)

    def threshold(N: int) -> Launch:
        return Launch(
            selection.threshold, (-(-padded // device.rows),),
            {"scores": sampled_scores, "positions": sampled_places, "ids": p.ids, "groups": plan.groups,
             "rate": N / max(1, plan.sampled), "k": k, "exclude_offsets": p.exclude_offsets, "E": excluding["E"],
             "B": B, "to_score": score, "to_tie": tie, "count": count, "kept": kept, "pending": pending,
             "all_pending": int(plan.splits == 0), "padded": padded},
            per_query, 4, 1,
        )  # fmt: skip

    def select(room: int, collected: bool) -> Launch:
        return Launch(
            selection.select, query_programs,
            {"scores": scores, "positions": places, "ids": p.ids, "row_size": row_size, "room": room, "k": k,
             **excluding, "B": B, "to_score": score, "to_tie": tie, "count": count, "kept": kept, "pending": pending},
            {**per_query, "COLLECTED": collected}, 4, 1,
        )  # fmt: skip

    def rescore(listed: Found, rows: torch.Tensor) -> Launch:
        tile, listed_size = plan.collect_tile, listed.positions.shape[1]
        return Launch(
            kernels.rescore, (B, -(-plan.room // tile.items)),
            {"queries": queries, "q_row": queries.stride(0), "q_column": queries.stride(1), "B": B, "items": rows,
             "item_stride": rows.stride(0), "listed": listed.positions, "listed_size": listed_size,
             "listed_count": listed.kept, "bound": listed.threshold, "query_radius": listed.radius,
             "to_score": score, "count": count, **row},
            {name: value for name, value in shape_of(tile).items() if name not in ("BOUNDED", "HAS_ALLOW")},
            tile.warps, tile.stages,
        )  # fmt: skip

    sampled_scores, sampled_places = candidates(B, plan.groups)
    lists = plan.collected * -(-B // plan.collect_tile.queries) * plan.collect_tile.queries
    list_scores, list_places = candidates(lists, plan.list_size)
    listing = {
        "list_count": empty(lists, dtype=torch.int32), "list_score": empty(lists, dtype=torch.float32),
        "list_tie": empty(lists, dtype=torch.int64), "list_scores": list_scores, "list_positions": list_places,
        "list_size": plan.list_size,
    }  # fmt: skip
    limits = {"threshold_score": score, "threshold_tie": tie}
    row = {"to_scores": scores, "to_positions": places, "row_size": row_size, "k": k}
    for base, rows, row_scale, row_error in table:
        N = len(rows)
        part = {"items": rows, "item_stride": rows.stride(0), "row_scale": row_scale, "row_error": row_error, "N": N}
        if base == 0:
            tile = plan.sample_tile
            if plan.sampled:
                yield Launch(
                    kernels.sample, (-(-B // tile.queries), plan.groups // tile.items),
                    {**scoring, **part, "size": plan.sampled, "to_scores": sampled_scores,
                     "to_positions": sampled_places, "groups": plan.groups},
                    shape_of(tile), tile.warps, tile.stages,
                )  # fmt: skip
            yield threshold(N)
        if listed is not None:
            yield rescore(listed, rows)
            yield select(plan.room, False)
        elif plan.splits:
            tile = plan.tile
            yield Launch(
                kernels.scan, (-(-B // tile.queries), plan.splits),
                {**scoring, **part, "base": base, "ids": p.ids, **limits, "count": count, **row},
                {**shape_of(tile), "HAS_IDS": has_ids}, tile.warps, tile.stages,
            )  # fmt: skip
            yield select(plan.room, False)
        if plan.collected:
            tile = plan.collect_tile
            yield Launch(
                kernels.collect, (-(-B // tile.queries), plan.collected),
                {**scoring, **part, "base": base, "ids": p.ids, **excluding, **limits, "pending": pending, **listing,
                 **row},
                {**shape_of(tile), "BLOCK": plan.block, "R": device.cut[0], "TILE": device.cut[1],
                 "HAS_IDS": has_ids, "HAS_EXCLUDE": has_exclude},
                tile.warps, tile.stages,
            )  # fmt: skip
            yield select(plan.collected * k, True)

    return Found(scores, places, kept, score, pending, p.query_radius)


def search(problem: Problem, device: Device, values: torch.Tensor, positions: torch.Tensor) -> None:
    """Runs a search, in as many steps as the workspace asks for."""
    p = problem
    B, d = p.queries.shape
    excluded = 0 if p.exclude_ids is None else -(-len(p.exclude_ids) // B)
    N = len(p.items) if p.items.device == p.queries.device else chunk_rows(p.items)
    for part in _steps(B, step_of_queries(device, B, N, d, p.k, p.compute, excluded)):
        some = p.of_queries(part)
        plan = make_plan(device, len(some.queries), N, d, p.k, p.compute, excluded)
        table = chunks(p.items, p.row_scale, p.queries.device)
        with _on(p.queries.device):
            for launch in launches(some, table, plan, device, values[part], positions[part]):
                launch.run()


def certified_search(
    problem: Problem, copy: Problem, row_error: torch.Tensor, device: Device,
    values: torch.Tensor, positions: torch.Tensor, rescored: torch.Tensor,
) -> None:  # fmt: skip
    """Runs a search of a table with a certified copy."""
    p = problem
    (B, d), N = p.queries.shape, len(p.items)
    excluded = 0 if p.exclude_ids is None else -(-len(p.exclude_ids) // B)
    chunk = Chunk(0, copy.items, copy.row_scale, row_error)
    for part in _steps(B, step_of_queries(device, B, N, d, copy.k, copy.compute, excluded)):
        some = p.of_queries(part)
        plans = make_certified_plans(device, len(some.queries), N, d, p.k, p.compute, excluded)
        with _on(p.queries.device):
            steps = certified_launches(some, copy.of_queries(part), chunk, plans, device, values[part], positions[part])
            try:
                while True:
                    next(steps).run()
            except StopIteration as end:
                rescored[part] = end.value


def _steps(B: int, step: int) -> Iterator[slice]:
    for begin in range(0, B, step):
        yield slice(begin, min(B, begin + step))


def _on(device: torch.device) -> Any:
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
