"""How a search is cut into launches: tile shapes by device, width and batch, buffers and grids by the shapes alone.

Nothing here looks at data, and nothing imports Triton.
"""

import math
from dataclasses import dataclass, replace

import torch

from grank_kernels.common.checks import round_up

_WORKSPACE = 1 << 30  # bytes of candidates; more queries than fit are searched in steps
_RESCUE = 1 << 28  # bytes of lists for queries whose threshold failed


@dataclass(frozen=True)
class Device:
    """What a plan depends on.

    Attributes:
        name: "sm_80", "sm_90", "sm_100", "gfx942", or "interpreter".
        processors: multiprocessors or compute units.
        shared: bytes of shared memory a program can have.
        small: tables of at most so many rows are emitted whole, without a threshold.
        rows: queries a program of `threshold` and `select`.
        block: tiles that `collect` scans between two looks at its lists, at most.
        cut: lists that it cuts together, and entries of each that it looks at together.
        rank: entries that a program of `rank` places, and those that it compares them with at a time.
    """

    name: str
    processors: int
    shared: int
    small: int = 4096
    rows: int = 1
    block: int = 16
    cut: tuple[int, int] = (8, 64)
    rank: tuple[int, int] = (128, 32)


INTERPRETER = Device(
    "interpreter", processors=1, shared=1 << 30, small=256, rows=8, block=2, cut=(16, 1024), rank=(512, 512)
)


@dataclass(frozen=True)
class Tile:
    """Shape of a product and how it is run: rows, queries, columns; warps, stages of the pipeline."""

    items: int
    queries: int
    depth: int
    warps: int
    stages: int


def choose_tile(device: Device, d: int, compute: torch.dtype, B: int, most: int, warps: int = 4) -> Tile:
    """The tile for a width, a precision of products and a batch, of at most so many queries.

    items: 128 rows, two 64-row products of a warp group on sm_90; 64 in float32, which has no tensor cores.
    queries: as few as the batch needs, since each pads the product; as many as registers (and gfx942's 64 KB of shared
    memory) hold.
    depth: the whole row up to 256 bytes, so that the loop over tiles has no inner loop and its loads run ahead of the
    products; wider rows in pieces of 128 bytes, and float32 in 64, for its operands pass through registers. It depends
    on d and the precision alone, as the order of accumulation does.
    stages: three of a tile's rows in shared memory, or two where they do not fit.
    """
    width = max(16 if compute.itemsize > 1 else 32, power_of_2(d))
    needed = max(16, power_of_2(B))
    if device.name == "interpreter":  # one shape for all, so that one BLAS kernel multiplies all
        return Tile(256, 16, min(width, 256), 4, 1)
    if compute == torch.float32:
        return Tile(64, min(64, most, needed), 16, 4, 3)
    row = width * compute.itemsize
    if row > 256:
        row, most = 128, min(most, 64)  # pieces of the queries take registers too
    if device.name == "gfx942":
        most = min(most, 32 if compute == torch.int8 else 64)
    queries = min(most, needed)
    stages = 3 if (3 * 128 + queries) * row <= device.shared else 2
    return Tile(128, queries, row // compute.itemsize, 8 if queries >= 64 else warps, stages)


@dataclass(frozen=True)
class Plan:
    """One step of a search: B queries, N rows.

    Attributes:
        tile: of `scan`; its width in queries is the largest.
        sample_tile: of `sample`.
        collect_tile: of `collect`.
        sampled: rows in the sample, 0 for a search without a threshold.
        groups: maxima of the sample a query.
        splits: programs along the rows in `scan`; 0 where `collect` does all.
        collected: programs along the rows in `collect`; 0 where nothing can fail.
        block: tiles that `collect` scans between two looks at its lists, at most.
        list_size: entries of a list of `collect`, k + block * items.
        room: candidates a query beside the k best of earlier chunks.
    """

    tile: Tile
    sample_tile: Tile
    collect_tile: Tile
    sampled: int
    groups: int
    splits: int
    collected: int
    block: int
    list_size: int
    room: int


def make_plan(device: Device, B: int, N: int, d: int, k: int, compute: torch.dtype, excluded: int) -> Plan:
    """The plan for B queries that exclude `excluded` ids each, over a table (or its first chunk) of N rows.

    Three ways. `collect` alone, one pass, for small k and few queries: every 16 queries read the rows from L2 once
    more, and cutting lists costs as much as a sample does. Small tables are emitted whole. All else is sampled: 1/64 of
    the rows, at least 8192, whose r-th best is the threshold. So r N / sampled candidates are expected, and more than
    (r + 6 sqrt(r)) N / sampled, which is the room, for 6 queries in a million; `collect` stands by for these.
    """
    tile = choose_tile(device, d, compute, B, 128)
    samples = choose_tile(device, d, compute, B, 64)  # which has two more numbers a score
    lists = choose_tile(device, d, compute, B, 16, warps=8)
    tiles = -(-N // tile.items)
    block = min(tiles, device.block)
    list_size = round_up(k + block * lists.items, 64)
    lists_tiles = -(-B // lists.queries)

    def splits(programs: int, query_tiles: int) -> int:
        return max(1, min(tiles, programs // query_tiles))

    waves = 4 * device.processors  # programs of a few sizes keep all processors busy to the end
    if (k <= 32 and B <= 32) or (k <= 64 and B <= 16):
        collected = splits(waves, lists_tiles)
        return Plan(tile, samples, lists, 0, 0, 0, collected, block, list_size, collected * k)
    scanned = splits(waves, -(-B // tile.queries))
    if max(device.small, 2 * k) >= N:
        return Plan(tile, samples, lists, 0, 0, scanned, 0, 0, 0, N)
    sampled = max(N // 64, min(N // 4, 8192))
    share = (k + excluded) * sampled / N
    r = share + 5 * math.sqrt(share) + 7
    groups = round_up(min(sampled, max(8192, 4 * int(r))), samples.items)
    room = power_of_2(max(1024, math.ceil((r + 6 * math.sqrt(r)) * N / sampled)))
    collected = _rescuers(device, B, N, k, lists, list_size)
    return Plan(tile, samples, lists, sampled, groups, scanned, collected, block, list_size, max(room, collected * k))


@dataclass(frozen=True)
class CertifiedPlans:
    """A search of a certified copy for the rows of largest upper bounds, then of these rows for the k best.

    Attributes:
        copy: of the first.
        rescore: of the second: no sample, no scan, `collect` where the bounds do not suffice.
    """

    copy: Plan
    rescore: Plan


def listed_rows(k: int) -> int:
    """How many rows are rescored: of Gaussian tables 1.3 to 2 k reach the k-th best score by their upper bound."""
    return 2 * k + 64


def make_certified_plans(
    device: Device, B: int, N: int, d: int, k: int, compute: torch.dtype, excluded: int
) -> CertifiedPlans:
    """The plans for B queries that exclude `excluded` ids each, over a table of N rows and its copy."""
    listed = listed_rows(k)
    exact = make_plan(device, B, N, d, k, compute, excluded)
    lists = exact.collect_tile
    block = min(-(-N // lists.items), device.block)
    list_size = round_up(k + block * lists.items, 64)
    collected = _rescuers(device, B, N, k, lists, list_size)
    rescore = replace(
        exact, sampled=0, groups=0, splits=1, collected=collected, block=block, list_size=list_size,
        room=max(listed, collected * k),
    )  # fmt: skip
    copy = make_plan(device, B, N, d, listed, torch.int8, excluded)
    samples = choose_tile(device, d, torch.int8, B, 16)  # a row's error beside its scale: for more queries it spills
    return CertifiedPlans(replace(copy, sample_tile=samples), rescore)


def _rescuers(device: Device, B: int, N: int, k: int, lists: Tile, list_size: int) -> int:
    """Programs along the rows in a `collect` that stands by: few enough for the memory of their lists."""
    lists_tiles = -(-B // lists.queries)
    affordable = _RESCUE // (8 * lists_tiles * lists.queries * (list_size + k))
    programs = max(1, min(2 * device.processors, affordable * lists_tiles))
    return max(1, min(-(-N // lists.items), programs // lists_tiles))


def step_of_queries(device: Device, B: int, N: int, d: int, k: int, compute: torch.dtype, excluded: int) -> int:
    """How many queries to search at a time, so that the candidates fit the workspace."""
    plan = make_plan(device, B, N, d, k, compute, excluded)
    step = max(1, _WORKSPACE // (8 * (k + plan.room + plan.groups)))
    return min(B, max(plan.tile.queries, step // plan.tile.queries * plan.tile.queries))


def power_of_2(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << max(0, n - 1).bit_length()
