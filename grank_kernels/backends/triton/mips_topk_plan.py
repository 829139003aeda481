"""The plan of a search: tile shapes, grids and buffer sizes, from the device and the shapes alone.

Nothing here reads data or imports Triton.
"""

import math
from dataclasses import dataclass, replace

import torch

from grank_kernels.common.checks import round_up

_WORKSPACE = 1 << 30  # bytes of candidates; queries whose candidates exceed it are searched in steps
_LISTS_MEMORY = 1 << 28  # bytes of the lists of `collect`


@dataclass(frozen=True)
class Device:
    """The properties of a GPU that a plan depends on.

    Attributes:
        name: "sm_80", "sm_90", "sm_100", "gfx942", or "interpreter".
        processors: multiprocessors or compute units.
        shared: bytes of shared memory per program.
        small: most rows of a table that is emitted whole, without a threshold.
        rows: queries per program of `threshold` and `select`.
        block: most tiles that `collect` scans before it checks its lists.
        cut: lists that `collect` cuts together, and entries of each that it reads at a time.
        rank: entries that a program of `rank` places, and entries it compares them with at a time.
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
    """Shape of a product (rows, queries, columns), warps per program, and stages of the software pipeline."""

    items: int
    queries: int
    depth: int
    warps: int
    stages: int


def choose_tile(device: Device, d: int, compute: torch.dtype, B: int, most: int, warps: int = 4) -> Tile:
    """The tile for rows of width d, products in `compute` and B queries, with at most `most` queries.

    items: 128 rows, two 64-row products of a warp group on sm_90; 64 in float32, which has no tensor cores.
    queries: as few as the batch needs, since the rest is padding; as many as fit registers (on gfx942: its 64 KB of
    shared memory).
    depth: the whole row up to 256 bytes, so that the loop over tiles has no inner loop and its loads run ahead of the
    products; wider rows in pieces of 128 bytes, and float32 in pieces of 64, since its operands pass through registers.
    It depends on d and `compute` alone, and so does the order of accumulation.
    stages: the rows of three tiles in shared memory, or of two where three do not fit.
    """
    width = max(16 if compute.itemsize > 1 else 32, power_of_2(d))
    needed = max(16, power_of_2(B))
    if device.name == "interpreter":  # one shape for every product: one BLAS kernel, one order of addition
        return Tile(256, 16, min(width, 256), 4, 1)
    if compute == torch.float32:
        queries = min(64, most, needed)  # 8 warps: with 4, sm_90 spills; gfx942 has twice the threads in a warp
        return Tile(64, queries, 16, 8 if queries == 64 and device.name != "gfx942" else 4, 3)
    row = width * compute.itemsize
    if row > 256:
        row, most = 128, min(most, 64)  # a piece of the queries is held in registers too
    if device.name == "gfx942":
        most = min(most, 32 if compute == torch.int8 else 64)
    queries = min(most, needed)
    stages = 3 if (3 * 128 + queries) * row <= device.shared else 2
    return Tile(128, queries, row // compute.itemsize, 8 if queries >= 64 else warps, stages)


@dataclass(frozen=True)
class Plan:
    """The plan of one step of a search: B queries, N rows.

    Attributes:
        tile: of `scan`; no other tile has more queries.
        sample_tile: of `sample`.
        collect_tile: of `collect`.
        sampled: rows in the sample; 0: every score passes the first threshold.
        groups: groups of sampled rows; the best score of each is kept per query.
        splits: programs along the rows in `scan`; 0: `collect` does the whole search.
        collected: programs along the rows in `collect`; 0: no threshold can fail.
        block: most tiles that `collect` scans before it checks its lists.
        list_size: entries of a list of `collect`, at least k + block * items.
        room: candidates per query beside the k best of earlier chunks.
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

    Small k and few queries: one pass of `collect`; every 16 queries read the rows from L2 once more, and cutting lists
    costs as much as a sample. Small tables: every score is emitted. Otherwise: a sample of 1/64 of the rows, at least
    8192, whose r-th best score is the threshold. r N / sampled candidates are expected; 6 queries in a million have
    more than (r + 6 sqrt(r)) N / sampled, which is the room, and are searched again by `collect`.
    """
    tile = choose_tile(device, d, compute, B, 128)
    samples = choose_tile(device, d, compute, B, 64)  # `sample` keeps two more numbers per score
    lists = choose_tile(device, d, compute, B, 16, warps=8)
    tiles = -(-N // tile.items)
    block = min(tiles, device.block)
    list_size = round_up(k + block * lists.items, 64)
    lists_tiles = -(-B // lists.queries)

    def splits(programs: int, query_tiles: int) -> int:
        return max(1, min(tiles, programs // query_tiles))

    waves = 4 * device.processors  # several programs per processor even out their run times
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
    collected = _collect_splits(device, B, N, k, lists, list_size)
    return Plan(tile, samples, lists, sampled, groups, scanned, collected, block, list_size, max(room, collected * k))


@dataclass(frozen=True)
class CertifiedPlans:
    """The plans of a certified search.

    Attributes:
        copy: the search of the int8 copy for the rows with the largest upper bounds.
        rescore: the search of these rows for the k best: no sample, no scan; `collect` where the bounds do not suffice.
    """

    copy: Plan
    rescore: Plan


def listed_rows(k: int) -> int:
    """Rows rescored per query; in Gaussian tables the upper bounds of 1.3 to 2 k rows reach the k-th best score."""
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
    collected = _collect_splits(device, B, N, k, lists, list_size)
    rescore = replace(
        exact, sampled=0, groups=0, splits=1, collected=collected, block=block, list_size=list_size,
        room=max(listed, collected * k),
    )  # fmt: skip
    copy = make_plan(device, B, N, d, listed, torch.int8, excluded)
    samples = choose_tile(
        device, d, torch.int8, B, 16
    )  # with a row's error beside its scale, more queries spill registers
    return CertifiedPlans(replace(copy, sample_tile=samples), rescore)


def _collect_splits(device: Device, B: int, N: int, k: int, lists: Tile, list_size: int) -> int:
    """Programs along the rows in a `collect` for failed thresholds: as many as `_LISTS_MEMORY` has memory for lists."""
    lists_tiles = -(-B // lists.queries)
    affordable = _LISTS_MEMORY // (8 * lists_tiles * lists.queries * (list_size + k))
    programs = max(1, min(2 * device.processors, affordable * lists_tiles))
    return max(1, min(-(-N // lists.items), programs // lists_tiles))


def step_of_queries(device: Device, B: int, N: int, d: int, k: int, compute: torch.dtype, excluded: int) -> int:
    """Queries per step, so that their candidates fit the workspace."""
    plan = make_plan(device, B, N, d, k, compute, excluded)
    step = max(1, _WORKSPACE // (8 * (k + plan.room + plan.groups)))
    return min(B, max(plan.tile.queries, step // plan.tile.queries * plan.tile.queries))


def power_of_2(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << max(0, n - 1).bit_length()
