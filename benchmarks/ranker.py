"""What the benchmarks of the Ranker's two ops share: the device, memory, timing, and what is written of a case."""

import ctypes
import gc
import time
from collections.abc import Callable
from typing import Any

import torch

from grank_kernels.backends import cpu

Run = Callable[[], torch.Tensor]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SECONDS_A_CASE = 2.0
MB = 1e6


def synchronised(run: Run) -> Run:
    """A call that returns when its result is there."""

    def wait() -> torch.Tensor:
        result = run()
        torch.cuda.synchronize()
        return result

    return run if DEVICE == "cpu" else wait


def as_graph(run: Run) -> Run:
    """The same launches replayed as one CUDA graph."""
    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = run()

    def replay() -> torch.Tensor:
        graph.replay()
        return result

    return replay


def extra_bytes(run: Run) -> int:
    """Peak memory of a call, its result included, over what was in use before (on a CPU of the process)."""
    gc.collect()
    if DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    ctypes.CDLL(None).malloc_trim(0)  # or what was freed before would be taken again and not be counted
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the peak is now what is in use
    before = _status("VmRSS")
    run()
    return _status("VmHWM") - before


def _status(field: str) -> int:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(field))


def check(
    got: torch.Tensor, exact: torch.Tensor, plain: torch.Tensor, dtype: torch.dtype, roundings: float = 1.0
) -> float:
    """The largest error; at most twice that of plain torch in that dtype, and some roundings of the largest result."""
    error, lost = (float((x.double().cpu() - exact).abs().max()) for x in (got, plain))
    most = 2 * lost + roundings * torch.finfo(dtype).eps * float(exact.abs().max())
    assert error <= most, f"an error of {error:.2g}, at most {most:.2g} was allowed"
    return error


def measure(benchmark: Any, run: Run, *, nbytes: int, operations: int, **facts: Any) -> None:
    """Times a call that has been checked; facts are `op`, `contender`, `case`, `dtype` and `error`."""
    run = synchronised(run)
    memory = extra_bytes(run)
    start = time.perf_counter()
    run()
    rounds = int(SECONDS_A_CASE / (time.perf_counter() - start))
    benchmark.group = f"{facts['op']} {facts['case']}"
    benchmark.pedantic(run, rounds=max(3, min(50, rounds)))
    if benchmark.stats is None:  # --benchmark-disable: the answers are checked, nothing is timed
        return
    median = benchmark.stats.stats.median
    benchmark.extra_info |= facts | {
        "label": "measured",
        "bytes": nbytes,
        "operations": operations,
        "extra bytes": memory,
        "GB/s": nbytes / median / 1e9,
        "Gop/s": operations / median / 1e9,
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if DEVICE == "cuda" else cpu.isa(),
    }
    print(
        f"{facts['op']} {facts['case']} {facts['contender']}: {median * 1e3:.3g} ms measured, {memory / MB:.1f} MB "
        f"extra, {nbytes / MB:.1f} MB read or written at least, {operations / median / 1e9:.0f} Gop/s, "
        f"error {facts['error']:.2g}"
    )
