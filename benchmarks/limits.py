"""What this machine can do, measured in the same run as the searches: `python benchmarks/limits.py`.

Read bandwidth is the best of several ways to read a buffer once with all threads, so it is a lower bound of what the
memory gives. The matmul rates are those of torch's own libraries on a large square problem: a lead, not a peak. float16
is left out: torch has no fast float16 matmul on most CPUs, and `mips_topk` multiplies float16 rows in float32.
"""

import time
from collections.abc import Callable

import torch


def best_seconds(run: Callable[[], object], *, budget: float = 0.1) -> float:
    """The shortest of the runs that a budget of seconds allows, at least five, the first of which does not count."""
    run()
    times: list[float] = []
    while len(times) < 5 or sum(times) < budget:
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times)


def read_bandwidth(nbytes: int) -> float:
    """GB/s of reading a buffer of about that size once; a buffer that fits in a cache measures that cache."""
    width = 64
    matrix = torch.ones(max(1, nbytes // (4 * width)), width)
    flat, vector = matrix.view(-1), torch.ones(width)
    halves, half_vector = matrix.view(torch.bfloat16).view(-1, 2 * width), torch.ones(2 * width, dtype=torch.bfloat16)
    words = flat.view(torch.int64) if flat.numel() % 2 == 0 else flat
    probes: list[Callable[[], object]] = [
        flat.sum,
        flat.amax,
        words.amax,
        lambda: matrix @ vector,
        lambda: halves @ half_vector,
    ]
    return flat.nbytes / min(map(best_seconds, probes)) / 1e9


def matmul_rate(dtype: torch.dtype, size: int = 1536) -> float:
    """Gop/s of a square matrix product, a multiplication and an addition counted as two."""
    if dtype == torch.int8:
        a = torch.ones(size, size, dtype=dtype)
        seconds = best_seconds(lambda: torch._int_mm(a, a))
    else:
        b = torch.ones(size, size, dtype=dtype)
        seconds = best_seconds(lambda: b @ b)
    return 2 * size**3 / seconds / 1e9


if __name__ == "__main__":
    print(f"{torch.get_num_threads()} threads, all figures measured")
    for megabytes in (1, 16, 64, 128, 256):
        print(f"read {megabytes:4d} MB: {read_bandwidth(megabytes * 10**6):8.1f} GB/s")
    for dtype in (torch.float32, torch.bfloat16, torch.int8):
        print(f"matmul {str(dtype).removeprefix('torch.'):9s}: {matmul_rate(dtype):8.0f} Gop/s")
