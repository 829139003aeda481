"""A search over shards beside one process with as many threads: `python -m benchmarks.sharded --ranks 1 2 4 8`.

Starts, for every number of ranks, so many processes with a thread each over gloo, and measures a whole search and its
parts: the search of a shard, the exchange alone (the same messages), the merge alone; and the search of the whole table
by one process with as many threads as all ranks have, while the others wait. Every result is compared with that of the
one table, and the bytes exchanged with those of the model on paper. Medians; methods take turns, each with caches
that hold other memory than the rows.

What the model predicts stands beside: the search of one process divided among the cores there are, and exchange and
merge at the rates measured with two ranks.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

import grank_kernels as gk
from benchmarks.sharded_model import ARGUMENTS, WORD, Host, flat, message, received, table
from grank_kernels.distributed.sharded_table import merge, short_list


def seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def rank_main(options: argparse.Namespace) -> None:
    """One rank; the first one writes what it measured."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, G = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(1)
    rows = torch.randn(options.rows, options.dim)
    dtype = getattr(torch, options.dtype)
    one = gk.ItemTable.from_rows(rows, dtype=dtype) if rank == 0 else None
    local = gk.ItemTable.from_rows(rows[len(rows) * rank // G : len(rows) * (rank + 1) // G], dtype=dtype)
    sharded = gk.ShardedItemTable(local)
    measured, other = [], torch.zeros(1 << 24)
    for B in options.queries:
        for k in options.k:
            queries, s = torch.randn(B, options.dim), short_list(k, G)
            lists = torch.randn(B, G, s).sort(dim=2, descending=True).values.reshape(B, -1)
            ids = torch.randint(0, 1 << 40, lists.shape)

            def exchange(nbytes: int = message(B, s)) -> None:
                for size in (ARGUMENTS // WORD, nbytes // WORD):
                    x = torch.zeros(size, dtype=torch.int64)
                    dist.all_gather(list(x.new_empty((G, size))), x)

            def whole(queries: torch.Tensor = queries, k: int = k) -> gk.TopK | None:
                if one is None:
                    return None
                torch.set_num_threads(G)
                top = gk.mips_topk(queries, one, k)
                torch.set_num_threads(1)
                return top

            methods: dict[str, Callable[[], object]] = {
                "search": lambda queries=queries, k=k: gk.mips_topk(queries, sharded, k),
                "shard": lambda queries=queries, k=k: gk.mips_topk(queries, local, k),
                "exchange": exchange,
                "merge": lambda lists=lists, ids=ids, k=k: merge(lists, ids, k),
                "one process": whole,
            }
            before = sharded.bytes_received
            top, want = gk.mips_topk(queries, sharded, k), whole()
            nbytes = sharded.bytes_received - before
            if nbytes != received(B, k, G):
                raise AssertionError(f"{nbytes} bytes exchanged, the model says {received(B, k, G)}")
            if want is not None and not (
                torch.equal(top.values, want.values) and torch.equal(top.indices, want.indices)
            ):
                raise AssertionError("the result is not that of one table")
            times: dict[str, list[float]] = {name: [] for name in methods}
            for _ in range(options.rounds):
                for name, run in methods.items():
                    other += 1
                    dist.barrier()
                    times[name].append(seconds(run))
            medians = {name: statistics.median(of) for name, of in times.items()}
            measured.append({"B": B, "k": k, "G": G, "bytes": nbytes, "entries": lists.numel(), **medians})
    if rank == 0:
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
    """Latency and bandwidth by least squares, and the cost of an entry merged, of what two ranks measured."""
    nbytes = torch.tensor([[2.0, case["bytes"]] for case in of_two], dtype=torch.float64)
    times = torch.tensor([case["exchange"] for case in of_two], dtype=torch.float64)
    weights = (1 / times)[:, None]  # relative errors count
    latency, by_byte = torch.linalg.lstsq(nbytes * weights, (times * weights[:, 0])[:, None]).solution[:, 0].tolist()
    merged = sum(case["merge"] for case in of_two) / sum(case["entries"] for case in of_two)
    return Host("this machine", 0, 0, latency, 1 / by_byte, merged)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--rows", type=int, default=400_000)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--queries", type=int, nargs="+", default=[1, 256], help="searched together")
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
            scan, crowded = single["shard"] / min(G, cores), G / min(G, cores)  # all ranks merge, on these cores
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
