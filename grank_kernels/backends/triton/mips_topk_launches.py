"""The searches of the Triton backend as sequences of kernel launches. Imports Triton; imported by the first search."""

import contextlib
from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import triton.language as tl

from grank_kernels.backends.triton import mips_topk_kernels as kernels
from grank_kernels.backends.triton import selection
from grank_kernels.backends.triton.mips_topk_arguments import (
    Allow,
    Exclude,
    Listed,
    Lists,
    ProductShape,
    Progress,
    Queries,
    Rows,
    Sample,
)
from grank_kernels.backends.triton.mips_topk_plan import (
    CertifiedPlans,
    Device,
    Plan,
    Tile,
    make_certified_plans,
    make_plan,
    power_of_2,
    step_of_queries,
)
from grank_kernels.backends.triton.streaming import Chunk, chunk_rows, chunks
from grank_kernels.common.checks import round_up

_TYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.int8: tl.int8}
_SELECT_TILE = 1024  # entries that `threshold` and `select` look at together
_WARPS = 4  # of kernels without matrix products


def options(amd: bool) -> dict[str, Any]:
    """Compiler options beside warps and stages.

    float32 products are fused multiply-adds, stated here since Triton's default is about to change. ptxas on its own
    spills 40 registers of `collect` to stay at 128; allowed all 255, it uses 194 and spills none. On AMD a single MFMA
    shape for all tiles keeps a single order of accumulation.
    """
    return {"enable_fp_fusion": True, **({"matrix_instr_nonkdim": 16} if amd else {"maxnreg": 255})}


@dataclass(frozen=True)
class Launch:
    """One launch of a kernel.

    Attributes:
        kernel: the Triton function.
        grid: programs along each axis.
        arguments: by parameter name: groups of mips_topk_arguments, tensors, numbers; None for an absent tensor.
        warps: warps per program.
        stages: stages of the software pipeline.
    """

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    warps: int = _WARPS
    stages: int = 1

    def run(self) -> None:
        """Enqueues the launch on the current stream."""
        self.kernel[self.grid](
            **self.arguments, num_warps=self.warps, num_stages=self.stages, **options(torch.version.hip is not None)
        )


@dataclass(frozen=True)
class Problem:
    """The validated arguments of the backend's `mips_topk`, and the dtype of its products.

    In a search of a certified copy the queries are int8 with `query_scale` and `query_radius`, and rows are ordered by
    the upper bounds of their scores.
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
        """The problem for a slice of the queries."""
        allow, offsets = self.allow, self.exclude_offsets
        return Problem(
            self.queries[part], self.items, self.row_scale, self.ids, self.k,
            None if offsets is None else offsets[part.start : part.stop + 1], self.exclude_ids,
            allow[part] if allow is not None and allow.dim() == 2 else allow, self.compute,
            *(x if x is None else x[part] for x in (self.query_scale, self.query_radius)),
        )  # fmt: skip


class Search:
    """The buffers of one search, and the launches that read and write them.

    Attributes:
        queries: the query vectors as the kernels multiply them.
        lists: one list of candidates per query; its first k entries are the best so far.
        progress: how many of these are valid, and which queries `collect` must search again.
    """

    def __init__(self, problem: Problem, plan: Plan, device: Device) -> None:
        self.problem, self.plan, self.device = problem, plan, device
        p, (B, d) = problem, problem.queries.shape
        data, scale = p.queries, p.query_scale
        if self.quantises:
            data, scale = self._empty(torch.int8, B, d), self._empty(torch.float32, B)
        self.queries = Queries(data, data.stride(0), data.stride(1), B, scale, p.query_radius)
        padded = round_up(B, plan.tile.queries)
        count, kept, pending = self._empty(torch.int32, 3, B)
        self.lists = self._lists(
            B, p.k + plan.room, p.k, count, self._empty(torch.float32, padded), self._empty(torch.int64, padded)
        )
        self.progress = Progress(kept, pending, B)
        self.sampled = Sample(
            self._empty(torch.float32, B, plan.groups), self._empty(torch.int32, B, plan.groups),
            plan.groups, plan.sampled,
        )  # fmt: skip
        number = plan.collected * round_up(B, plan.collect_tile.queries)
        thresholds = self._empty(torch.float32, number), self._empty(torch.int64, number)
        self.collected = self._lists(
            number, plan.list_size, tl.constexpr(0), self._empty(torch.int32, number), *thresholds
        )  # fmt: skip
        self.allow = Allow(None, 0, 0)
        if p.allow is not None:
            row_stride = p.allow.stride(0) if p.allow.dim() == 2 else 0
            self.allow = Allow(p.allow.view(torch.uint8), row_stride, p.allow.stride(-1))
        self.exclude = Exclude(p.exclude_offsets, p.exclude_ids, 0 if p.exclude_ids is None else len(p.exclude_ids))

    @property
    def quantises(self) -> bool:
        """Whether the queries are floats to be multiplied as int8."""
        return self.problem.compute == torch.int8 and self.problem.query_scale is None

    def _empty(self, dtype: torch.dtype, *shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=self.problem.queries.device)

    def _lists(self, number: int, size: int, first: Any, *state: torch.Tensor) -> Lists:
        scores, positions = self._empty(torch.float32, number, size), self._empty(torch.int32, number, size)
        return Lists(scores, positions, size, first, *state)

    def _rows(self, chunk: Chunk) -> Rows:
        rows = chunk.rows
        return Rows(rows, rows.stride(0), len(rows), chunk.row_scale, chunk.row_error, chunk.base, self.problem.ids)

    def _shape(self, tile: Tile) -> ProductShape:
        d = self.problem.queries.shape[1]
        return ProductShape(d, tile.depth, tile.items, tile.queries, _TYPES[self.problem.compute])

    def _scoring(self, kernel: Any, tile: Tile, splits: int, chunk: Chunk, **arguments: Any) -> Launch:
        """A launch of `splits` programs along the rows for each tile of queries."""
        scored = {"queries": self.queries, "rows": self._rows(chunk), **arguments, "shape": self._shape(tile)}
        return Launch(kernel, (-(-self.queries.number // tile.queries), splits), scored, tile.warps, tile.stages)

    def quantise(self) -> Launch:
        """int8 queries from the float ones."""
        p, (B, d) = self.problem, self.problem.queries.shape
        floats = Queries(p.queries, p.queries.stride(0), p.queries.stride(1), None, None, None)
        block = min(1024, max(16, power_of_2(d)))
        arguments = {"queries": floats, "quantised": self.queries._replace(number=None), "d": d, "BLOCK": block}
        return Launch(kernels.quantise, (B,), arguments)

    def sample(self, chunk: Chunk) -> Launch:
        """The best of each group of sampled rows."""
        tile = self.plan.sample_tile
        groups = self.plan.groups // tile.items
        return self._scoring(kernels.sample, tile, groups, chunk, allow=self.allow, sampled=self.sampled)

    def threshold(self, N: int) -> Launch:
        """The first thresholds: from the sample, or none."""
        plan, rows, padded = self.plan, self.device.rows, len(self.lists.score)
        arguments = {
            "sampled": self.sampled, "ids": self.problem.ids, "rate": N / max(1, plan.sampled),
            "exclude": self.exclude, "lists": self.lists, "progress": self.progress,
            "all_pending": int(plan.splits == 0), "padded": padded, "R": rows, "TILE": _SELECT_TILE,
        }  # fmt: skip
        return Launch(selection.threshold, (-(-padded // rows),), arguments)

    def scan(self, chunk: Chunk) -> Launch:
        """Candidates: every score that reaches its query's threshold."""
        return self._scoring(
            kernels.scan, self.plan.tile, self.plan.splits, chunk, allow=self.allow, lists=self.lists
        )  # fmt: skip

    def rescore(self, listed: "Search", chunk: Chunk) -> Launch:
        """Candidates: the rows that a search of the certified copy found, scored exactly."""
        tile, found = self.plan.collect_tile, listed.lists
        bounded = Listed(found.positions, found.size, listed.progress.kept, found.score, listed.queries.radius)
        launch = self._scoring(kernels.rescore, tile, 1, chunk, listed=bounded, lists=self.lists)
        return replace(launch, grid=(self.queries.number, -(-self.plan.room // tile.items)))

    def select(self, room: int, collected: bool) -> Launch:
        """The k best of the candidates, `room` of which are stored at most."""
        rows = self.device.rows
        arguments = {
            "lists": self.lists, "ids": self.problem.ids, "exclude": self.exclude, "room": room,
            "progress": self.progress, "R": rows, "TILE": _SELECT_TILE, "COLLECTED": collected,
        }  # fmt: skip
        return Launch(selection.select, (-(-self.queries.number // rows),), arguments)

    def collect(self, chunk: Chunk) -> Launch:
        """Candidates of the pending queries: the k best rows of each split."""
        lists, entries = self.device.cut
        return self._scoring(
            kernels.collect, self.plan.collect_tile, self.plan.collected, chunk, allow=self.allow,
            exclude=self.exclude, pending=self.progress.pending, lists=self.collected, best=self.lists,
            BLOCK=self.plan.block, R=lists, TILE=entries,
        )  # fmt: skip

    def rank(self, values: torch.Tensor, indices: torch.Tensor) -> Launch:
        """The k best in order."""
        entries, others = self.device.rank
        arguments = {
            "lists": self.lists, "ids": self.problem.ids, "kept": self.progress.kept, "values": values,
            "indices": indices, "TILE": entries, "OTHERS": others,
        }  # fmt: skip
        return Launch(selection.rank, (self.queries.number, -(-self.problem.k // entries)), arguments)

    def best(self, table: Iterable[Chunk], listed: "Search | None" = None) -> Iterator[Launch]:
        """Launches that find the k best, unordered.

        threshold (from a sample, or none) -> scan, or rescore what is listed -> select -> collect the queries whose
        threshold failed -> select those; for small k: threshold (none) -> collect -> select. int8 queries are quantised
        first. With `rank` that is 8 launches at most for a table in one chunk; every further chunk goes on from the k
        best so far and takes 2 to 4.
        """
        plan = self.plan
        if self.quantises:
            yield self.quantise()
        for chunk in table:
            if chunk.base == 0:
                if plan.sampled:
                    yield self.sample(chunk)
                yield self.threshold(len(chunk.rows))
            if listed is not None:
                yield self.rescore(listed, chunk)
                yield self.select(plan.room, False)
            elif plan.splits:
                yield self.scan(chunk)
                yield self.select(plan.room, False)
            if plan.collected:
                yield self.collect(chunk)
                yield self.select(plan.collected * self.problem.k, True)


def launches(
    problem: Problem, table: Iterable[Chunk], plan: Plan, device: Device, values: torch.Tensor, positions: torch.Tensor
) -> Iterator[Launch]:
    """The launches of one search, in order; buffers are allocated when the first is requested."""
    search = Search(problem, plan, device)
    yield from search.best(table)
    yield search.rank(values, positions)


def certified_launches(
    problem: Problem, copy: Problem, chunk: Chunk, plans: CertifiedPlans, device: Device,
    values: torch.Tensor, positions: torch.Tensor,
) -> Generator[Launch, None, torch.Tensor]:  # fmt: skip
    """The launches of one search of a table with a certified copy, `chunk`; 12 at most.

    The rows with the largest upper bounds are searched for and rescored. If the bounds show that no other row reaches
    the k-th best score, they hold the k best rows; otherwise `collect` searches the rows themselves, as it does when a
    sampled threshold fails.

    Returns:
        The number of rows rescored per query, (B,) int64.
    """
    coarse = Search(copy, plans.copy, device)
    yield from coarse.best([chunk])
    exact = Search(problem, plans.rescore, device)
    yield from exact.best([Chunk(0, problem.items, None)], coarse)
    yield exact.rank(values, positions)
    rescored: torch.Tensor = coarse.progress.kept.long().where(exact.progress.pending == 0, len(problem.items))
    return rescored


def search(problem: Problem, device: Device, values: torch.Tensor, positions: torch.Tensor) -> None:
    """Runs a search, in steps of as many queries as fit the workspace, into `values` and `positions`."""
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
