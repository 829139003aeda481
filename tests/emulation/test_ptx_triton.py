"""Whole searches of the Triton backend in the PTX simulator.

Runs Triton's PTX for sm_80 (mma.sync, ldmatrix, cp.async) and sm_90a (wgmma), with every access checked and warps in
adversarial order. Results have the reference's bits.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
import torch
from emulation.ptx import Coverage, PtxError

from grank_kernels.backends import reference
from grank_kernels.backends.problems import MipsTopkProblem

pytest.importorskip("triton", reason="Triton is not installed")

from emulation.ptx.mutations import mutants
from emulation.ptx.triton_device import Key, Program, Programs, TritonDevice

from grank_kernels.backends.triton import mips_topk_launches
from grank_kernels.backends.triton.mips_topk_launches import Launch
from grank_kernels.backends.triton.mips_topk_plan import Device, make_plan
from grank_kernels.backends.triton.streaming import Chunk

TARGETS = ["sm_80", "sm_90"]


@pytest.fixture(scope="module")
def programs() -> Iterator[Programs]:
    """Compiled kernels, shared by the tests of this file."""
    programs = Programs()
    yield programs
    programs.compiler.close()


@dataclass(frozen=True)
class Search:
    """B queries over N rows of integers in [-most, most]; rows per chunk; changed fields of the plan."""

    B: int
    N: int
    k: int
    d: int = 64
    dtype: torch.dtype = torch.float16
    most: int = 3
    filters: bool = False
    chunk: int | None = None
    plan: dict[str, Any] = field(default_factory=dict)

    def problem(self) -> mips_topk_launches.Problem:
        draw = torch.Generator().manual_seed(self.N + self.k)

        def integers(rows: int, most: int, dtype: torch.dtype) -> torch.Tensor:
            return torch.randint(-most, most + 1, (rows, self.d), generator=draw).to(dtype)

        int8 = self.dtype == torch.int8
        queries = torch.randn(self.B, self.d, generator=draw) if int8 else integers(self.B, self.most, self.dtype)
        items = integers(self.N, 127 if int8 else self.most, self.dtype)
        row_scale = torch.rand(self.N, generator=draw) + 0.1 if int8 else None
        ids = offsets = excluded = allow = None
        if self.filters:
            ids = torch.randperm(3 * self.N, generator=draw)[: self.N]
            excluded = ids[torch.randint(self.N, (self.B * 9,), generator=draw)]
            offsets = torch.arange(0, 9 * self.B + 1, 9)
            allow = torch.rand(self.N, generator=draw) < 0.8
        return mips_topk_launches.Problem(queries, items, row_scale, ids, self.k, offsets, excluded, allow, self.dtype)

    def table(self, problem: mips_topk_launches.Problem) -> list[Chunk]:
        size, scale = self.chunk or self.N, problem.row_scale
        parts = [slice(base, base + size) for base in range(0, self.N, size)]
        return [Chunk(part.start, problem.items[part], None if scale is None else scale[part]) for part in parts]


def run(search: Search, device: TritonDevice) -> tuple[torch.Tensor, torch.Tensor]:
    """Runs all launches of the search, in order."""
    values, positions, works = launches_of(search, device)
    for work in works:
        device.run(work)
    return values, positions


def launches_of(search: Search, device: TritonDevice) -> tuple[torch.Tensor, torch.Tensor, Iterator[Launch]]:
    """Launches for a device of one multiprocessor, so that a program has several tiles."""
    problem, target = search.problem(), Device(device.target, processors=1, shared=166912, small=256, block=2)
    excluded = 9 if search.filters else 0
    N = search.chunk or search.N
    plan = make_plan(target, search.B, N, search.d, search.k, problem.compute, excluded)
    values = device.memory.torch.empty(search.B, search.k, dtype=torch.float32)
    positions = device.memory.torch.empty(search.B, search.k, dtype=torch.int64)
    plan = replace(plan, **search.plan)
    works = mips_topk_launches.launches(problem, search.table(problem), plan, target, values, positions)
    return values, positions, allocating(works, device)


def allocating(works: Iterator[Launch], device: TritonDevice) -> Iterator[Launch]:
    """The launches, with their allocations in simulated memory."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mips_topk_launches, "torch", device.memory.torch)
        yield from works


def check(search: Search, device: TritonDevice) -> None:
    values, positions = run(search, device)
    p = search.problem()
    expected = reference.mips_topk(
        MipsTopkProblem(p.queries, p.items, p.row_scale, p.ids, p.k, p.exclude_offsets, p.exclude_ids, p.allow)
    )
    torch.testing.assert_close((values, positions), expected, rtol=0, atol=0)


TIES = Search(5, 1500, 20)  # `collect` shortens a list several times, between equal scores
SAMPLE = Search(5, 700, 70, most=9, plan={"sampled": 300, "groups": 128})  # several rounds of the sample
OVERFLOW = Search(3, 700, 70, most=0, plan={"room": 160})  # all scores equal, candidates lost: `collect` runs
CHUNKS = Search(5, 1100, 70, chunk=600)  # the second chunk starts with the threshold of the first
SEARCHES = [TIES, SAMPLE, OVERFLOW, CHUNKS]


def with_filters(search: Search) -> Search:
    return replace(search, filters=True)


FAMILIES = {
    "float16": SEARCHES,
    "int8": [replace(x, dtype=torch.int8) for x in SEARCHES],
    "float16 filters": [replace(x, filters=True) for x in SEARCHES],
    "bfloat16 d=200": [replace(x, dtype=torch.bfloat16, d=200) for x in SEARCHES],
    "float32 d=40": [replace(x, dtype=torch.float32, d=40) for x in SEARCHES],
    "float16 B=125": [replace(x, B=125) for x in SEARCHES],
    "int8 filters": [replace(x, dtype=torch.int8, filters=True) for x in SEARCHES],
}
QUICK = [("float16", "sm_90"), ("int8", "sm_80")]
SCORING = {"sample", "scan", "collect"}
ALL = SCORING | {"threshold", "select", "rank"}
COVERED = {
    "float16": ALL,
    "float16 filters": ALL,
    "float16 B=125": {"sample", "scan"},
}  # else SCORING: the later kernels do not depend on the precision, and TIES executes all their branches


@pytest.mark.parametrize(
    ("family", "target"),
    [pytest.param(x, t, marks=[pytest.mark.slow] * ((x, t) not in QUICK)) for x in FAMILIES for t in TARGETS],
)
def test_searches(family: str, target: str, programs: Programs) -> None:
    """Results equal the reference, no check fails, and nearly every instruction is executed.

    Triton compiles a kernel once per set of arguments divisible by 16; only the variant with most executions counts.
    """
    coverage: dict[Key, Coverage] = {}
    for seed, search in enumerate(FAMILIES[family]):
        device = TritonDevice(target, programs, seed or None)
        device.coverage = coverage
        check(search, device)
    fractions: dict[tuple, float] = {}
    for (configuration, _), each in coverage.items():
        fractions[configuration] = max(fractions.get(configuration, 0), each.fraction)
    assert {name for _, name, *_ in fractions} >= ALL
    for (_, name, *_), fraction in fractions.items():
        if name in COVERED.get(family, SCORING):
            assert fraction >= 0.9, name


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("seed", range(4))
def test_searches_in_other_orders(seed: int, target: str, programs: Programs) -> None:
    for search in SEARCHES:
        check(search, TritonDevice(target, programs, 100 + seed))


@pytest.mark.parametrize("target", TARGETS)
def test_the_scan_moves_every_row_once(target: str, programs: Programs) -> None:
    """16-byte asynchronous copies of whole sectors, no bank conflicts, no superfluous products."""
    search = Search(5, 1500, 70)
    device = TritonDevice(target, programs)
    run(search, device)
    (scan,) = [run for run in device.runs if run.kernel.name == "scan"]
    tiles, items, queries = 12, 128, 16
    counters = scan.counters
    assert counters["cp_async_bytes"] == search.N * search.d * 2
    assert scan.executed("cp.async.cg.shared.global") * 32 * 16 >= counters["cp_async_bytes"]  # the others are zeros
    assert counters["cp_async_sectors"] * 32 <= 1.1 * counters["cp_async_bytes"]
    assert counters["matrix_wavefronts"] == counters["matrix_wavefronts_ideal"]
    warp_products = tiles * (items // 16) * (search.d // 16)  # 16 rows, 16 deep, all 16 queries
    assert counters["mma" if target == "sm_80" else "wgmma"] == warp_products * (
        queries // 8 if target == "sm_80" else 1
    )


@pytest.mark.parametrize("target", [pytest.param("sm_80", marks=pytest.mark.slow), "sm_90"])
def test_rows_beyond_32_bits(target: str, programs: Programs) -> None:
    """A sample of 4 * 10^9 rows, all stored as one row (stride 0): drawing rows takes 64-bit arithmetic."""
    N, size, groups = 4_000_000_000, 300, 128
    problem = replace(Search(1, 1, 70).problem(), items=torch.ones(1, 64, dtype=torch.float16).expand(N, 64))
    device, target_device = TritonDevice(target, programs), Device(target, 1, 166912)
    plan = replace(make_plan(target_device, 1, N, 64, 70, torch.float16, 0), sampled=size, groups=groups, room=1024)
    output = device.memory.torch.empty(1, 70, dtype=torch.float32), device.memory.torch.empty(1, 70, dtype=torch.int64)
    sample = next(
        allocating(
            mips_topk_launches.launches(problem, [Chunk(0, problem.items, None)], plan, target_device, *output), device
        )
    )
    device.run(sample)
    width, longer = N // size, N % size
    drawn = []
    for i in range(groups):  # the first round: later ones are no better
        mixed = (i + 1) * 0x9E3779B1 % 2**32
        drawn.append(i * width + min(i, longer) + (mixed * (width + (i < longer)) >> 32))
    found = sample.arguments["sampled"].positions.numpy().view(np.uint32)
    np.testing.assert_array_equal(found[0, :groups], drawn)


# ---- mutations: a deleted barrier or wait is reported


@pytest.mark.parametrize("target", ["sm_80", pytest.param("sm_90", marks=pytest.mark.slow)])
def test_deleted_barriers_are_reported(target: str, programs: Programs) -> None:
    """Deletes each barrier, wait and fence of `scan` in turn."""
    device = TritonDevice(target, programs)
    _, _, works = launches_of(Search(5, 1500, 70), device)
    scan = next(work for work in works if work.kernel.fn.__name__ == "scan" or device.run(work))
    _, program, arguments = device.prepare(scan)

    def candidates(changed: Program, seed: int | None) -> list[list[tuple[int, float]]]:
        """Candidates of each query sorted by position, since their order is undefined."""
        memory = device.memory.copy()
        changed.run(scan, arguments, memory, seed)
        lists = scan.arguments["lists"]
        found = (memory.content(x).tolist() for x in (lists.count, lists.positions, lists.scores))
        k = lists.first
        return [
            sorted(zip(row[k : k + n], scores[k : k + n], strict=True)) for n, row, scores in zip(*found, strict=True)
        ]

    expected = candidates(program, None)
    assert min(map(len, expected)) > 70
    noticed, unnoticed = [], []
    for order, ptx in mutants(program.compiled.ptx):
        changed = program.changed(ptx)
        try:
            same = all(candidates(changed, seed) == expected for seed in (None, 1))
        except PtxError:
            same = False
        (unnoticed if same else noticed).append(order)
    # Not reported: back-to-back barriers, and the last wait after the loop, when nothing is in flight.
    assert len(noticed) >= 0.6 * (len(noticed) + len(unnoticed)), unnoticed
    kinds = {"bar.sync", "cp.async.wait_group"} | (
        {"wgmma.wait_group", "fence.proxy.async"} if target == "sm_90" else set()
    )
    assert set(noticed) == kinds
