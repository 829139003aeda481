"""Sharded searches beside one process with as many threads: `python -m benchmarks.sharded --ranks 1 2 4 8`.

For every number of ranks G, starts G processes of one thread each over gloo, and measures a whole search and its parts:
the search of a shard, the exchange (of equal messages), the merge; and the search of the whole table by one process
with G threads while the other ranks wait. Results are compared with those of one table, and the bytes exchanged with
the model (sharded_model.py). Times are medians; methods alternate, and caches are flushed before each.

The prediction beside them is the search of one process divided by the number of cores, plus exchange and merge at the
rates measured with two ranks.
"""

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist

import grank_kernels as gk
from benchmarks.sharded_model import ARGUMENTS, WORD, Host, flat, message, received, table
from grank_kernels.distributed.sharded_table import merge, short_list


def seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


class Shards(NamedTuple):
    """The table of one rank: its shard, the sharded table, and on rank 0 the whole table."""

    local: gk.ItemTable
    sharded: gk.ShardedItemTable
    one: gk.ItemTable | None

    @classmethod
    def made(cls, options: argparse.Namespace) -> "Shards":
        rank, G = dist.get_rank(), dist.get_world_size()
        rows, dtype = torch.randn(options.rows, options.dim), getattr(torch, options.dtype)
        one = gk.ItemTable.from_rows(rows, dtype=dtype) if rank == 0 else None
        local = gk.ItemTable.from_rows(rows[len(rows) * rank // G : len(rows) * (rank + 1) // G], dtype=dtype)
        return cls(local, gk.ShardedItemTable(local), one)

    def search_one(self, queries: torch.Tensor, k: int) -> gk.TopK | None:
        """The search of the whole table with one thread per rank; None on other ranks than 0."""
        if self.one is None:
            return None
        torch.set_num_threads(dist.get_world_size())
        top = gk.mips_topk(queries, self.one, k)
        torch.set_num_threads(1)
        return top

    def checked_bytes(self, queries: torch.Tensor, k: int) -> int:
        """Bytes received in a search, after a comparison of them and of the result."""
        before = self.sharded.bytes_received
        top, want = gk.mips_topk(queries, self.sharded, k), self.search_one(queries, k)
        nbytes, model = self.sharded.bytes_received - before, received(len(queries), k, dist.get_world_size())
        if nbytes != model:
            raise AssertionError(f"the search exchanged {nbytes} bytes, the model has {model}")
        if want is not None and not (torch.equal(top.values, want.values) and torch.equal(top.indices, want.indices)):
            raise AssertionError("the result differs from that of one table")
        return nbytes


def exchange(nbytes: int) -> None:
    """The messages of a search: arguments, then lists of `nbytes`."""
    for size in (ARGUMENTS // WORD, nbytes // WORD):
        x = torch.zeros(size, dtype=torch.int64)
        dist.all_gather(list(x.new_empty((dist.get_world_size(), size))), x)


def medians(methods: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median seconds of every method; methods alternate, with flushed caches."""
    times: dict[str, list[float]] = {name: [] for name in methods}
    other = torch.zeros(1 << 24)
    for _ in range(rounds):
        for name, run in methods.items():
            other += 1
            dist.barrier()
            times[name].append(seconds(run))
    return {name: statistics.median(of) for name, of in times.items()}


def rank_main(options: argparse.Namespace) -> None:
    """The main function of a rank; rank 0 writes the measurements."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    G = dist.get_world_size()
    torch.manual_seed(1)
    shards = Shards.made(options)
    measured = []
    for B, k in itertools.product(options.queries, options.k):
        queries, s = torch.randn(B, options.dim), short_list(k, G)
        lists = torch.randn(B, G, s).sort(dim=2, descending=True).values.reshape(B, -1)
        ids = torch.randint(0, 1 << 40, lists.shape)
        nbytes = shards.checked_bytes(queries, k)
        methods: dict[str, Callable[[], object]] = {
            "search": partial(gk.mips_topk, queries, shards.sharded, k),
            "shard": partial(gk.mips_topk, queries, shards.local, k),
            "exchange": partial(exchange, message(B, s)),
            "merge": partial(merge, lists, ids, k),
            "one process": partial(shards.search_one, queries, k),
        }
        facts = {"B": B, "k": k, "G": G, "bytes": nbytes, "entries": lists.numel()}
        measured.append(facts | medians(methods, options.rounds))
    if dist.get_rank() == 0:
        options.results.write_text(json.dumps(measured))
    dist.destroy_process_group()


def launched(G: int, options: argparse.Namespace, arguments: list[str]) -> list[dict[str, float]]:
    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder) / "results"
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={G}"]
        command = [*torchrun, "-m", "benchmarks.sharded", *arguments, "--results", str(results)]
        subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        return list(json.loads(results.read_text()))


def rates(of_two: list[dict[str, float]]) -> Host:
    """Latency and bandwidth by least squares, and the cost per merged entry, from the times of two ranks."""
    nbytes = torch.tensor([[2.0, case["bytes"]] for case in of_two], dtype=torch.float64)
    times = torch.tensor([case["exchange"] for case in of_two], dtype=torch.float64)
    weights = (1 / times)[:, None]  # minimises relative errors
    latency, by_byte = torch.linalg.lstsq(nbytes * weights, (times * weights[:, 0])[:, None]).solution[:, 0].tolist()
    merged = sum(case["merge"] for case in of_two) / sum(case["entries"] for case in of_two)
    return Host("this machine", 0, 0, latency, 1 / by_byte, merged)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--rows", type=int, default=400_000)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--queries", type=int, nargs="+", default=[1, 256], help="batch sizes")
    parser.add_argument("--k", type=int, nargs="+", default=[100, 1000])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--results", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.results is not None:
        rank_main(options)
        return
    of_ranks = {G: launched(G, options, sys.argv[1:]) for G in sorted({1, 2, *options.ranks})}
    host, cores = rates(of_ranks[2]), len(os.sched_getaffinity(0))
    print(f"{options.rows:_} x {options.dim} {options.dtype}, {cores} cores, torch {torch.__version__}; measured, ms")
    print(f"with 2 ranks: latency {1e6 * host.latency:.0f} us, {host.bandwidth / 1e9:.2f} GB/s, ", end="")
    print(f"merge {1e9 * host.merge:.0f} ns an entry\n")
    lines: list[list[object]] = []
    for G, cases in of_ranks.items():
        for case, single in zip(cases, of_ranks[1], strict=True):
            B, k = int(case["B"]), int(case["k"])
            scan, crowded = single["shard"] / min(G, cores), G / min(G, cores)  # all ranks merge and share the cores
            after = flat(host, B, k, G, scan)
            predicted = scan + after.exchange + after.merge * crowded
            parts = [case[name] for name in ("one process", "search", "shard", "exchange", "merge")]
            efficiency = f"{100 * case['one process'] / case['search']:.0f}%"
            numbers = [f"{1e3 * t:.3g}" for t in (*parts, predicted)]
            lines.append([f"G = {G}, B = {B}, k = {k}", f"{int(case['bytes']):_}", *numbers, efficiency])
    header = ["", "bytes", "one process", "sharded", "its shard", "exchange", "merge", "predicted", "efficiency"]
    print(table(header, lines))


if __name__ == "__main__":
    main()
