"""Cost of updates, and of searches of an updated table: `python -m benchmarks.table_updates`.

Upserts replace random rows. Most append to the log; some compact the table, i.e. move all rows to a new log, and take
longest. One search follows each upsert, so each search makes a new row mask.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch

import grank_kernels as gk


def milliseconds(run: Callable[[], object]) -> float:
    """Duration of one call."""
    start = time.perf_counter()
    run()
    return (time.perf_counter() - start) * 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[100_000, 1_000_000])
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 1000, 20_000], help="rows per upsert")
    parser.add_argument("--updates", type=int, default=60)
    options = parser.parse_args()

    queries = torch.randn(1, options.dim)
    print(f"float16 rows of {options.dim}, one query, k = 100, {torch.get_num_threads()} threads; milliseconds")
    for N in options.rows:
        for batch in options.batches:
            table = gk.ItemTable.from_rows(torch.randn(N, options.dim), dtype=torch.float16)
            fresh = statistics.median(milliseconds(lambda: gk.mips_topk(queries, table, 100)) for _ in range(20))  # noqa: B023
            first = milliseconds(lambda: table.upsert(torch.arange(batch), torch.randn(batch, options.dim)))  # noqa: B023
            upserts, searches = [], []
            for _ in range(options.updates):
                ids, rows = torch.randperm(N)[:batch], torch.randn(batch, options.dim)
                upserts.append(milliseconds(lambda: table.upsert(ids, rows)))  # noqa: B023  runs now
                searches.append(milliseconds(lambda: gk.mips_topk(queries, table, 100)))  # noqa: B023
            print(
                f"N = {N}, {batch} rows: upsert {statistics.median(upserts):.3f} (mean {statistics.mean(upserts):.3f}, "
                f"longest {max(upserts):.1f}, the first {first:.1f}); search {statistics.median(searches):.2f}, "
                f"without updates {fresh:.2f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
