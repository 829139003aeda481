"""Shared by the benchmarks of the Ranker's two ops: device, CUDA graphs, peak memory, check of a result."""

import ctypes
import gc
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.measure import kilobytes

Run = Callable[[], torch.Tensor]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PROCESS = Path("/proc/self/status")


def as_graph(run: Run) -> Run:
    """The same launches as one CUDA graph."""
    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = run()

    def replay() -> torch.Tensor:
        graph.replay()
        return result

    return replay


def extra_bytes(run: Run) -> int:
    """Peak memory of a call with its result, beyond the memory in use before (on a CPU: of the process)."""
    gc.collect()
    if DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    ctypes.CDLL(None).malloc_trim(0)  # otherwise the call reuses freed memory, which is not counted
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = kilobytes(PROCESS, "VmRSS")
    run()
    return 1024 * (kilobytes(PROCESS, "VmHWM") - before)


def check(
    got: torch.Tensor, exact: torch.Tensor, plain: torch.Tensor, dtype: torch.dtype, roundings: float = 1.0
) -> float:
    """The largest error, checked to be at most twice that of plain torch in that dtype plus some roundings."""
    error, lost = (float((x.double().cpu() - exact).abs().max()) for x in (got, plain))
    most = 2 * lost + roundings * torch.finfo(dtype).eps * float(exact.abs().max())
    assert error <= most, f"an error of {error:.2g}, at most {most:.2g} was allowed"
    return error
