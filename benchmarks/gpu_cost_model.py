"""Cost model of a search on a GPU: bytes, operations and launches per phase, and the roofline time of each.

python -m benchmarks.gpu_cost_model [-N ROWS] [-d WIDTH] [-k K] [--dtype DTYPE] [-B BATCH ...] [--json FILE]
python -m benchmarks.gpu_cost_model --codegen FILE

The second form takes the rows of `python -m benchmarks.gpu_codegen --json FILE` and prints the cost of GRank's Ranker.

Every figure is derived: counts from the Triton backend's plan for a shape, times from the datasheets in gpus.py. The
time of a phase is the longest of

- bytes moved / memory bandwidth,
- multiply-adds / peak rate of the matrix unit (of the FMA units for float32),
- bytes read from the cache / 64 bytes per clock and multiprocessor; a phase with few programs has few multiprocessors.

The counts are checked against runs of the kernels in Triton's interpreter (tests/benchmarks/test_gpu_cost_model.py).
The times are lower bounds: they leave out latencies, barriers and the gaps between launches.
"""

import argparse
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.gpus import ARCHITECTURES, CARDS, Card
from grank_kernels.backends.triton.mips_topk_plan import Device, Plan, Tile, make_plan

CACHE_BYTES_A_CLOCK = 64  # read from L2, per multiprocessor
CANDIDATE = 4 + 4  # score, position
PASSES = 32 + 3  # most passes of `kth_best` over its entries: range, bits of a score, border


class Search(NamedTuple):
    """B queries over N rows of width d; queries have the rows' dtype, or float16 if the rows are int8."""

    B: int
    N: int
    d: int
    k: int
    dtype: torch.dtype

    @property
    def scale_bytes(self) -> int:
        """Bytes of the scale of a row or a query."""
        return 4 if self.dtype == torch.int8 else 0

    @property
    def row_bytes(self) -> int:
        return self.d * self.dtype.itemsize + self.scale_bytes

    def plan(self, device: Device) -> Plan:
        return make_plan(device, self.B, self.N, self.d, self.k, self.dtype, 0)


class Phase(NamedTuple):
    """One launch.

    Attributes:
        name: name of the kernel.
        programs: size of the grid.
        item_bytes: bytes of rows read from memory, each row once.
        other_bytes: bytes of queries, candidates and results, read and written.
        item_loads: bytes of rows loaded by all programs; from L2 after the first load of a row.
        other_loads: bytes of everything else loaded by all programs.
        multiply_adds: number including the padding of tiles.
    """

    name: str
    programs: int
    item_bytes: float = 0
    other_bytes: float = 0
    item_loads: float = 0
    other_loads: float = 0
    multiply_adds: float = 0

    def seconds(self, card: Card, dtype: torch.dtype) -> float:
        """Roofline time on a card."""
        busy = min(self.programs, card.sms)
        cache = (self.item_loads + self.other_loads) / (busy * CACHE_BYTES_A_CLOCK * card.clock)
        name = str(dtype).removeprefix("torch.")
        return max(card.seconds(self.item_bytes + self.other_bytes, self.multiply_adds, name), cache)


def sample_rank(search: Search, plan: Plan) -> float:
    """Expected rank, within the sample, of the row that becomes the threshold.

    The kernel takes the r-th best of the maxima of groups. In the s best rows of the sample G (1 - (1 - 1/G)^s)
    different groups are expected; that is r for s = log(1 - r/G) / log(1 - 1/G).
    """
    share = search.k * plan.sampled / search.N
    r, groups = int(share + 5 * math.sqrt(share) + 7), min(plan.groups, plan.sampled)
    if groups == plan.sampled:
        return r
    return math.log1p(-r / groups) / math.log1p(-1 / groups)


def emitted(search: Search, plan: Plan) -> tuple[float, float]:
    """Candidates per query that `scan` emits: mean and standard deviation, for rows in random order.

    The number of rows that beat the s-th best of a sample of n has a negative hypergeometric distribution with mean
    s (N + 1) / (n + 1).
    """
    if not plan.sampled:
        return search.N, 0.0
    s, n, N = sample_rank(search, plan), plan.sampled, search.N
    mean = s * (N + 1) / (n + 1)
    return mean, math.sqrt(mean * (N - n) / (n + 2) * (1 - s / (n + 1)))


def hits_a_tile(search: Search, plan: Plan) -> float:
    """Candidates per tile of `scan`, each of which leaves the hot path that gpu_codegen counts."""
    return emitted(search, plan)[0] / search.N * plan.tile.items * plan.tile.queries if plan.splits else 0.0


def phases(search: Search, device: Device) -> Iterator[Phase]:
    """Launches of a search that runs in one step, in order."""
    (B, _, d, k, dtype), plan = search, search.plan(device)
    query_programs = -(-B // device.rows)
    if dtype == torch.int8:  # float16 queries are read twice
        yield Phase("quantise", B, other_bytes=B * d * (2 + 1) + 4 * B, other_loads=2 * 2 * B * d)
    if plan.sampled:
        groups = plan.groups
        tiles = -(-plan.sampled // groups) * (groups // plan.sample_tile.items)
        yield _scores(search, "sample", plan.sample_tile, groups // plan.sample_tile.items, plan.sampled, tiles, groups)
    sampled = 4 * B * plan.groups  # the scores
    yield Phase("threshold", query_programs, other_bytes=sampled, other_loads=sampled * PASSES)
    if plan.splits:
        found = emitted(search, plan)[0]
        tiles = -(-search.N // plan.tile.items)
        yield _scores(search, "scan", plan.tile, plan.splits, search.N, tiles, found)
        yield _select(search, query_programs, k + found)
    if plan.collected and plan.splits:  # both launches run, without a query to collect for
        yield Phase("collect", plan.collected * -(-B // plan.collect_tile.queries), other_loads=4 * B * plan.collected)
        yield Phase("select", query_programs, other_loads=4 * B)
    elif plan.collected:
        tiles = -(-search.N // plan.collect_tile.items)
        yield _scores(search, "collect", plan.collect_tile, plan.collected, search.N, tiles, plan.collected * k)
        yield _select(search, query_programs, k + plan.collected * k)
    blocks = -(-k // 128)
    answer = B * k * (4 + 8)
    yield Phase("rank", B * blocks, other_bytes=B * k * CANDIDATE + answer, other_loads=B * blocks * k * CANDIDATE)


def _scores(search: Search, name: str, tile: Tile, splits: int, rows: int, tiles: int, written: float) -> Phase:
    """A kernel that scores `rows` rows, cut into `tiles`; `splits` programs share them for every tile of queries."""
    query_tiles = -(-search.B // tile.queries)
    steps = -(-search.d // tile.depth)
    query_bytes = search.B * search.d * search.dtype.itemsize
    first = splits * search.B * (min(search.d, tile.depth) * search.dtype.itemsize + search.scale_bytes)
    return Phase(
        name,
        programs=query_tiles * splits,
        item_bytes=rows * search.row_bytes,
        other_bytes=query_bytes + CANDIDATE * search.B * written,
        item_loads=query_tiles * rows * search.row_bytes,
        other_loads=first
        + (tiles * query_bytes if steps > 1 else 0),  # pieces of the queries are loaded with each tile
        multiply_adds=tiles * tile.items * query_tiles * tile.queries * steps * tile.depth,
    )


def _select(search: Search, programs: int, entries: float) -> Phase:
    moved = CANDIDATE * search.B * entries
    kept = CANDIDATE * search.B * search.k
    return Phase("select", programs, other_bytes=moved + kept, other_loads=4 * search.B * entries * PASSES + moved)


class Ranking(NamedTuple):
    """`score_candidates` in 16 bits: C candidates of each of B users, L keys of width d with values of width h."""

    B: int
    C: int
    L: int
    d: int
    h: int

    @property
    def least_bytes(self) -> int:
        """Ids, rows and histories read once, scores written once."""
        return self.B * (self.C * (8 + 2 * self.d + 4) + 2 * self.L * (self.d + self.h)) + 2 * self.d * self.h

    @property
    def copied_bytes(self) -> int:
        """Bytes copied by all blocks, one history per 64 candidates (confirmed by the kernel's emulator test)."""
        return 2 * self.B * (self.C * self.d + -(-self.C // 64) * (self.L * (self.d + self.h) + self.d * self.h))

    @property
    def multiply_adds(self) -> int:
        """Logits, weighted values, and the product with item_weight."""
        return self.B * self.C * (self.L * (self.d + self.h) + self.d * self.h)

    def report(self, card: Card, row: dict[str, Any]) -> dict[str, Any]:
        """Roofline on a card, and the share of it that the compiled kernel (a row of gpu_codegen) can reach."""
        architecture = ARCHITECTURES[card.architecture]
        clocks = card.sms * card.clock  # per second, summed over the multiprocessors
        roofline = {
            "memory": self.least_bytes / card.read,
            "products": self.multiply_adds / (architecture.fma["float16"] * clocks),
            "exponentials": self.B * self.C * self.L / (architecture.special * clocks),
        }
        pairs = self.B * (-(-self.C // 64) * 64) * (-(-self.L // 64) * 64)
        instructions = row["matrix_per_score"] + row["other_per_score"]
        limits = roofline | {
            "cache": self.copied_bytes / (CACHE_BYTES_A_CLOCK * clocks),
            "issue": pairs * instructions / (architecture.lanes * clocks),
        }
        blocks, at_once = self.B * -(-self.C // 64), row["blocks_per_sm"] * card.sms
        waves = -(-blocks // at_once) * at_once / blocks
        return {
            "label": "derived",
            "bytes a candidate": self.copied_bytes / (self.B * self.C),
            "least bytes a candidate": self.least_bytes / (self.B * self.C),
            "limits, seconds": limits,
            "last wave": waves,
            "share of the roofline, at most": max(roofline.values()) / (max(limits.values()) * waves),
        }


def report(search: Search) -> dict[str, Any]:
    """Counts and times of a search on every NVIDIA card."""
    cards = {}
    for name, card in CARDS.items():
        device = Device(card.architecture, card.sms, ARCHITECTURES[card.architecture].shared - 1024)
        found = list(phases(search, device))
        times = [phase.seconds(card, search.dtype) for phase in found]
        items = search.N * search.row_bytes
        bound = card.seconds(items, search.B * search.N * search.d, str(search.dtype).removeprefix("torch."))
        cards[name] = {
            "launches": len(found),
            "bytes": sum(phase.item_bytes + phase.other_bytes for phase in found),
            "multiply_adds": sum(phase.multiply_adds for phase in found),
            "seconds": sum(times),
            "seconds of reading and multiplying once": bound,
            "hits a tile": hits_a_tile(search, search.plan(device)),
            "share": _by_name(found, [time / sum(times) for time in times]),
            "phases": [phase._asdict() for phase in found],
        }
    return {
        "label": "derived",
        **search._asdict(),
        "dtype": str(search.dtype).removeprefix("torch."),
        "emitted": emitted(search, search.plan(Device("sm_90", 132, 227 * 1024)))[0],
        "cards": cards,
    }


def _by_name(found: list[Phase], values: list[float]) -> dict[str, float]:
    total: dict[str, float] = {}
    for phase, value in zip(found, values, strict=True):
        total[phase.name] = total.get(phase.name, 0) + value
    return total


def rank(rows: list[dict[str, Any]]) -> None:
    """Prints the limits of GRank's Ranker for the compiled float16 kernels."""
    rows = [r for r in rows if (r["kernel"], r["configuration"]) == ("score_candidates", "float16 128 128")]
    print("score_candidates C=2000 L=1000 d=h=128 float16, microseconds, all derived:")
    for row in rows:
        for name, card in CARDS.items():
            for B in (1, 8, 32) if card.architecture == row["target"] else ():
                made = Ranking(B, C=2000, L=1000, d=128, h=128).report(card, row)
                limits = ", ".join(f"{limit} {s * 1e6:.1f}" for limit, s in made["limits, seconds"].items())
                print(
                    f"  {name} B={B:2d}: {limits}, times {made['last wave']:.2f} for the last wave: "
                    f"at most {made['share of the roofline, at most']:.0%} of the roofline; "
                    f"{made['bytes a candidate']:.0f} bytes a candidate, {made['least bytes a candidate']:.0f} at least"
                )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-N", type=int, default=10_000_000)
    parser.add_argument("-d", type=int, default=128)
    parser.add_argument("-k", type=int, default=500)
    parser.add_argument("-B", type=int, nargs="*", default=[1, 16, 64, 256, 1024])
    parser.add_argument("--dtype", choices=["float32", "float16", "bfloat16", "int8"], default="float16")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--codegen", type=Path)
    arguments = parser.parse_args()
    if arguments.codegen:
        rank(json.loads(arguments.codegen.read_text())["rows"])
        return
    dtype = getattr(torch, arguments.dtype)
    made = [report(Search(B, arguments.N, arguments.d, arguments.k, dtype)) for B in arguments.B]
    for search in made:
        print(f"B={search['B']} N={search['N']:_} d={search['d']} k={search['k']} {search['dtype']}, all derived:")
        for name, card in search["cards"].items():
            share = ", ".join(f"{phase} {part:.0%}" for phase, part in card["share"].items())
            print(
                f"  {name:6s} {card['seconds'] * 1e3:8.3f} ms, {card['bytes'] / 1e9:.3f} GB, "
                f"{2 * card['multiply_adds'] / 1e12:.2f} Tflop, {card['launches']} launches: {share}; "
                f"{card['hits a tile']:.2g} hits a tile"
            )
    if arguments.json:
        arguments.json.write_text(json.dumps(made, indent=1) + "\n")


if __name__ == "__main__":
    main()
