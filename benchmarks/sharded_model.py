"""Derived costs of a search over G shards: `python -m benchmarks.sharded_model`, see docs/scaling_figures.md.

`benchmarks/sharded.py` and the tests compare the bytes with the exchanged bytes. Times are derived from rates;
`benchmarks/sharded.py` compares them with measured times:

    scan      max(bytes of a shard / memory, 2 B n d / arithmetic); in parallel, 56 bytes of arguments per rank
    exchange  a ring: G - 1 steps of (latency + message / bandwidth)
    merge     entries of all lists, B G s, each `merge` seconds; one query per core in parallel

A tree of fan-in f has ceil(log_f G) levels up, each with f - 1 messages and a merge of f lists, and as many down.
"""

import math
from typing import NamedTuple

from benchmarks.gpus import CARDS
from grank_kernels.distributed.sharded_table import short_list

WORD = 8
ARGUMENTS = 7 * WORD


class Host(NamedTuple):
    """The machine of one shard: rates per second, `latency` and `merge` in seconds."""

    name: str
    memory: float
    arithmetic: float
    latency: float
    bandwidth: float
    merge: float
    cores: int = 1


HOSTS = (
    # Memory: 65% of 8 channels of DDR5-4800. Arithmetic: 915 Gop/s of int8 per core, measured for two
    # (docs/benchmarks.md). Network: 25 Gbit/s, 30 us per message over TCP (assumed). Merge: measured by sharded.py.
    Host("64-core server, 25 Gbit/s", 0.65 * 307e9, 64 * 915e9, 30e-6, 25e9 / 8, 26e-9, 64),
    # Memory: 80% of the datasheet's rate. Arithmetic: half of its int8 rate. Network: 400
    # Gbit/s, 10 us per message (assumed). Merge: 2 ns per entry (assumed), for radix sorts.
    Host("H100, 400 Gbit/s", 0.8 * CARDS["H100"].read, 0.5 * 1979e12, 10e-6, 400e9 / 8, 2e-9),
)


class Cost(NamedTuple):
    """Costs after the scan: bytes received per rank, and seconds."""

    received: int
    exchange: float
    merge: float

    def search(self, scan: float) -> float:
        """Seconds of the whole search."""
        return scan + self.exchange + self.merge


def message(B: int, s: int) -> int:
    """Bytes of a message: B lists of s ids and scores, and a failure flag."""
    return WORD * (1 + B * s + math.ceil(B * s / 2))


def received(B: int, k: int, G: int, completed: int = 0) -> int:
    """Bytes received per rank in a search with a second exchange for `completed` queries."""
    s = short_list(k, G)
    rest = message(completed, k - s) if completed else 0
    return (G - 1) * (ARGUMENTS + message(B, s) + rest)


def scan(host: Host, B: int, rows: float, dim: int, row_bytes: int) -> float:
    """Seconds of a search of one shard."""
    return max(rows * row_bytes / host.memory, 2 * B * rows * dim / host.arithmetic)


def ring(host: Host, G: int, nbytes: int) -> float:
    """Seconds of an all-gather of messages of `nbytes` by a ring."""
    return (G - 1) * (host.latency + nbytes / host.bandwidth)


def merging(host: Host, B: int, entries: int) -> float:
    """Seconds of a merge of `entries` entries per query."""
    return math.ceil(B / host.cores) * entries * host.merge


def flat(host: Host, B: int, k: int, G: int, scan: float) -> Cost:
    """One all-gather and one merge, plus the arguments' all-gather as far as it exceeds the scan."""
    s = short_list(k, G)
    exchange = max(0.0, ring(host, G, ARGUMENTS) - scan) + ring(host, G, message(B, s))
    return Cost(received(B, k, G), exchange, merging(host, B, G * s))


def tree(host: Host, B: int, k: int, G: int, fan_in: int) -> Cost:
    """A tree of merges: lists are merged on the way up, and the result is sent down."""
    nbytes, exchange, merge, below = 0, 0.0, 0.0, 1
    while below < G:
        lists = min(fan_in, math.ceil(G / below))
        s = short_list(k, math.ceil(G / below))
        up_and_down = (lists - 1) * message(B, s) + message(B, k)
        nbytes += up_and_down
        exchange += 2 * host.latency + up_and_down / host.bandwidth
        merge += merging(host, B, lists * s)
        below *= fan_in
    return Cost(nbytes, exchange, merge)


def best_tree(host: Host, B: int, k: int, G: int) -> tuple[int, Cost]:
    """The fan-in of the fastest tree, and its cost."""
    return min(((f, tree(host, B, k, G, f)) for f in (2, 4, 8, 16, 32, 64)), key=lambda of: of[1].search(0))


def tree_pays_from(host: Host, B: int, k: int, scan: float, share: float) -> int | None:
    """Least power of two G for which a tree saves more than a share of the search; None if not below 2^16."""
    for G in (2**power for power in range(1, 16)):
        if best_tree(host, B, k, G)[1].search(scan) < (1 - share) * flat(host, B, k, G, scan).search(scan):
            return G
    return None


def table(header: list[str], rows: list[list[object]]) -> str:
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def main() -> None:
    shards = (2, 8, 64, 512, 1000)
    print("Bytes that a rank receives a query, counted (all k of every shard in brackets):\n")
    rows = [
        [k, *(f"{received(1, k, G):_} ({(G - 1) * (ARGUMENTS + message(1, k)):_})" for G in shards)]
        for k in (100, 1000)
    ]
    print(table(["k", *(f"G = {G}" for G in shards)], rows))
    n, dim, k = 10**9, 64, 1000
    for host in HOSTS:
        print(f"\n{host.name}: milliseconds, derived; {n:_} int8 rows of {dim} a shard, k = {k}:\n")
        lines: list[list[object]] = []
        for B in (1, 16, 256):
            searched = scan(host, B, n, dim, dim + 4)
            for G in (8, 64, 512, 1000):
                cost, (fan_in, other) = flat(host, B, k, G, searched), best_tree(host, B, k, G)
                times = (searched, cost.exchange, cost.merge, other.search(0))
                efficiency = f"{100 * searched / cost.search(searched):.0f}%"
                pays = tree_pays_from(host, B, k, searched, 0.1) if G == 1000 else ""
                lines.append([f"B = {B}, G = {G}", *(f"{1e3 * t:.3g}" for t in times), fan_in, efficiency, pays])
        header = [
            "",
            "scan",
            "exchange",
            "merge",
            "both by a tree",
            "its fan-in",
            "efficiency",
            "tree saves 10% from G",
        ]
        print(table(header, lines))


if __name__ == "__main__":
    main()
