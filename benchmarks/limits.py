"""Read bandwidth and multiply rates of this machine, measured in the same run as the searches.

`python -m benchmarks.limits` prints them. Read bandwidth is the best of several ways to read a buffer once with all
threads, so a lower bound. The matmul rates are those of torch's libraries on a large square problem, not a peak.
float16 is left out: torch has no fast float16 matmul on most CPUs, and `mips_topk` multiplies float16 rows in float32.
"""

import time
from collections.abc import Callable

import torch

SIZES = {"cpu": 1536, "cuda": 8192}  # rows of the square matrices
PROBE_BYTES = 256 * 10**6  # larger buffers are read at the same rate
MULTIPLIED = {"cpu": (torch.float32, torch.bfloat16, torch.int8)}
MULTIPLIED["cuda"] = (*MULTIPLIED["cpu"], torch.float16)
READ_MB = {"cpu": (1, 16, 64, 128, 256), "cuda": (64, 256, 1024, 4096)}


def finished(run: Callable[[], object], device: str) -> Callable[[], object]:
    """`run`, followed by a device synchronisation."""
    if device == "cpu":
        return run

    def run_and_wait() -> object:
        result = run()
        torch.cuda.synchronize()
        return result

    return run_and_wait


def best_seconds(run: Callable[[], object], device: str = "cpu", *, budget: float = 0.1) -> float:
    """Shortest time of the runs within a budget of seconds: at least five, after one warm-up."""
    run = finished(run, device)
    run()
    times: list[float] = []
    while len(times) < 5 or sum(times) < budget:
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times)


def read_bandwidth(nbytes: int, device: str = "cpu") -> float:
    """GB/s of reading a buffer of about `nbytes` once; a buffer that fits in a cache measures the cache."""
    width = 64
    matrix = torch.ones(max(1, nbytes // (4 * width)), width, device=device)
    flat, vector = matrix.view(-1), torch.ones(width, device=device)
    halves = matrix.view(torch.bfloat16).view(-1, 2 * width)
    half_vector = torch.ones(2 * width, dtype=torch.bfloat16, device=device)
    words = flat.view(torch.int64) if flat.numel() % 2 == 0 else flat
    probes: list[Callable[[], object]] = [
        flat.sum,
        flat.amax,
        words.amax,
        lambda: matrix @ vector,
        lambda: halves @ half_vector,
    ]
    return flat.nbytes / min(best_seconds(probe, device) for probe in probes) / 1e9


def matmul_rate(dtype: torch.dtype, device: str = "cpu") -> float:
    """Gop/s of a square matrix product, a multiplication and an addition counted as two."""
    size = SIZES[device]
    a = torch.ones(size, size, dtype=dtype, device=device)
    multiply = torch._int_mm if dtype == torch.int8 else torch.matmul
    return 2 * size**3 / best_seconds(lambda: multiply(a, a.T), device) / 1e9  # int8 needs this layout on a GPU


def measured() -> dict[str, dict[str, dict[str, float]]]:
    """By device: read bandwidth in GB/s by buffer size, matmul rate in Gop/s by dtype."""
    return {
        device: {
            "read GB/s": {f"{mb} MB": read_bandwidth(mb * 10**6, device) for mb in READ_MB[device]},
            "matmul Gop/s": {str(t).removeprefix("torch."): matmul_rate(t, device) for t in MULTIPLIED[device]},
        }
        for device in ("cpu", "cuda")[: 1 + torch.cuda.is_available()]
    }


def main() -> None:
    print(f"{torch.get_num_threads()} threads, all figures measured")
    for device, kinds in measured().items():
        for kind, rates in kinds.items():
            for name, rate in rates.items():
                print(f"{device} {kind} {name:>9}: {rate:8.1f}")


if __name__ == "__main__":
    main()
