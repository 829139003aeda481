"""A search of a table larger than memory, on disk: `python -m benchmarks.billion --rows 1000000000 --dir DIR`.

Writes a table of int8 rows in parts (20 bytes per row of 16 numbers: 20 GB for a billion), reads the file and searches
the table, each with an empty and with a warm page cache, and compares the result with planted neighbours and with
NumPy, which reads the file independently. Then the file is removed.

Rates are bytes of the file per second. `read` reads the same bytes sequentially into one buffer of 16 MB.
"""

import argparse
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch

import grank_kernels as gk

PART = 1 << 20  # rows
PLANTED = 5  # neighbours of each query


class Rows:
    """Gaussian rows as a function of their position, and planted neighbours of every query.

    A part is a pool of rows with permuted columns and random signs. The neighbours of a query are multiples of it, 10
    times as long as other rows, in slightly descending order.
    """

    def __init__(self, num_rows: int, dim: int, num_queries: int) -> None:
        self.num_rows, self.dim = num_rows, dim
        self._random = torch.Generator().manual_seed(1)
        self._pool = torch.randn(PART, dim, generator=self._random)
        self.queries = torch.randn(num_queries, dim, generator=self._random)
        spread = torch.randperm(num_rows // PLANTED, generator=self._random)[:num_queries]
        self.planted = spread[:, None] + torch.arange(PLANTED) * (num_rows // PLANTED)  # (B, PLANTED) positions

    def part(self, start: int) -> torch.Tensor:
        """The part that begins at row `start`, a multiple of `PART`."""
        random = torch.Generator().manual_seed(start + 2)
        columns = torch.randperm(self.dim, generator=random)
        signs = torch.randint(0, 2, (self.dim,), generator=random) * 2.0 - 1
        rows = self._pool[: self.num_rows - start, columns] * signs
        for rank in range(PLANTED):
            for query, position in zip(self.queries, self.planted[:, rank].tolist(), strict=True):
                if start <= position < start + len(rows):
                    rows[position - start] = query * (10 - 0.2 * rank)
        return rows

    def parts(self) -> Iterator[torch.Tensor]:
        """All parts."""
        return (self.part(start) for start in range(0, self.num_rows, PART))


def forget(path: Path) -> None:
    """Drops a file from the page cache."""
    file = os.open(path, os.O_RDONLY)
    os.fsync(file)
    os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(file)


def read(path: Path) -> None:
    """Reads every byte of a file sequentially."""
    buffer = bytearray(1 << 24)
    with open(path, "rb", buffering=0) as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_SEQUENTIAL)
        while file.readinto(buffer):
            pass


def seconds(run: Callable[[], object]) -> float:
    """Duration of one call."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def anonymous_megabytes() -> float:
    """Anonymous memory of this process, in MB."""
    with open("/proc/self/status") as file:
        return int(next(line for line in file if line.startswith("RssAnon")).split()[1]) / 1000


def check(rows: Rows, top: gk.TopK, sample: float) -> int:
    """Compares a result with NumPy over a sample of the parts; returns the number of rows checked."""
    if not torch.equal(top.indices[:, :PLANTED], rows.planted):
        raise AssertionError("the planted neighbours are not the first of the result")
    queries = rows.queries.numpy()
    query_scale = np.abs(queries).max(1) / np.float32(127)
    query_numbers = np.rint(queries / query_scale[:, None])
    values, ids = top.values.numpy(), top.indices.numpy()
    starts = range(0, rows.num_rows, PART)
    starts = starts[:: max(1, round(1 / sample))]
    looked_at = 0
    for start in starts:
        part = rows.part(start).numpy()
        scale = np.abs(part).max(1) / np.float32(127)
        sums = query_numbers @ np.rint(part / scale[:, None]).T  # integers below 2^24: exact
        scores = sums.astype(np.float32) * (query_scale[:, None] * scale)
        for b in range(len(queries)):
            here = (ids[b] >= start) & (ids[b] < start + len(part))
            if not np.array_equal(scores[b, ids[b, here] - start], values[b, here]):
                raise AssertionError(f"scores of query {b} differ in the part at {start}")
            better = np.flatnonzero(scores[b] > values[b, -1]) + start
            if not np.isin(better, ids[b]).all():
                raise AssertionError(f"query {b} misses a row of the part at {start}")
        looked_at += len(part)
    return looked_at


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000_000)
    parser.add_argument("--dim", type=int, default=16)
    parser.add_argument("--queries", type=int, nargs="+", default=[1, 16], help="batch sizes")
    parser.add_argument("--k", type=int, default=100)
    parser.add_argument("--sample", type=float, default=0.02, help="share of the rows that NumPy checks")
    parser.add_argument("--dir", type=Path, required=True, help="folder for the file")
    parser.add_argument("--keep", action="store_true", help="keep the file, and reuse it if it exists")
    options = parser.parse_args()

    rows = Rows(options.rows, options.dim, max(options.queries))
    path = options.dir / f"table_{options.rows}x{options.dim}_{max(options.queries)}"  # B changes the planted rows
    try:
        if not path.exists():
            took = seconds(lambda: gk.ItemTable.write(path, rows.parts(), num_rows=options.rows, dtype=torch.int8))
            print(f"written: {path.stat().st_size / 1e9:.2f} GB, {took:.0f} s", flush=True)
        size = path.stat().st_size
        print(gk.ItemTable.load(path, mmap=True, verify=False), f"{torch.get_num_threads()} threads", flush=True)
        for cache in ("cold", "warm"):
            if cache == "cold":
                forget(path)
            took = seconds(lambda: read(path))
            print(f"{cache}: read {took:.2f} s, {size / took / 1e9:.2f} GB/s", flush=True)
            for B in options.queries:
                if cache == "cold":
                    forget(path)
                table = gk.ItemTable.load(path, mmap=True, verify=False)  # mapped again: pages in use cannot be dropped
                queries, before, start = rows.queries[:B], anonymous_megabytes(), time.perf_counter()
                top = gk.mips_topk(queries, table, options.k)
                took, more = time.perf_counter() - start, anonymous_megabytes() - before
                rate = f"{took:.2f} s, {size / took / 1e9:.2f} GB/s"
                print(f"{cache}: search of {B} queries {rate}, {more:.1f} MB more in memory", flush=True)
                del table
        looked_at = check(rows, top, options.sample)
        print(f"correct: planted neighbours found, {looked_at} rows compared with NumPy", flush=True)
    finally:
        if not options.keep:
            path.unlink(missing_ok=True)


if __name__ == "__main__":
    main()
