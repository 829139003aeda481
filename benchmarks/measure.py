"""Timing of every benchmark, and the facts recorded per case.

Methods take turns: within a case each is timed `TURNS` times in a few rounds, one method after the other, so that other
load on the machine affects all of them. A report pools the rounds of all turns of a case.
"""

import gc
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch

from benchmarks import limits
from grank_kernels.backends import cpu

T = TypeVar("T")
TURNS = range(3)
SECONDS_A_TURN = 0.2
MB = 1e6


class Latest(Generic[T]):
    """A cache of one entry, freed before the next one is made: each may take gigabytes."""

    def __init__(self, make: Callable[..., T]) -> None:
        self.make = make
        self.kept: tuple[tuple[Any, ...], T] | None = None

    def __call__(self, *key: Any) -> T:
        if self.kept is None or self.kept[0] != key:
            self.kept = None
            gc.collect()
            self.kept = key, self.make(*key)
        return self.kept[1]


def available_bytes() -> int:
    """Memory available without swapping."""
    return kilobytes(Path("/proc/meminfo"), "MemAvailable") * 1024


def kilobytes(path: Path, field: str) -> int:
    """The number in a line such as `VmRSS:  123 kB`."""
    return next(int(line.split()[1]) for line in path.read_text().splitlines() if line.startswith(field))


def measure(
    benchmark: Any, run: Callable[[], object], *, device: str, nbytes: int, operations: int, **facts: Any
) -> None:
    """Times one turn of a call whose result has been checked.

    Args:
        benchmark: the fixture of pytest-benchmark.
        run: the call.
        device: `cpu` or `cuda`.
        nbytes: lower bound of the bytes that the call moves.
        operations: multiplications and additions.
        facts: `op`, `method`, `case`, `dtype` and further parameters of the case.
    """
    run = limits.finished(run, device)
    start = time.perf_counter()
    run()
    rounds = int(SECONDS_A_TURN / (time.perf_counter() - start))
    benchmark.group = f"{facts['op']} {facts['case']}"
    benchmark.pedantic(run, rounds=max(1, min(25, rounds)))
    if benchmark.stats is None:  # --benchmark-disable: the answers are checked, nothing is timed
        return
    median = benchmark.stats.stats.median
    benchmark.extra_info |= facts | {
        "label": "measured",
        "device": device if device == "cpu" else torch.cuda.get_device_name(),
        "isa": cpu.isa(),
        "threads": torch.get_num_threads(),
        "bytes": nbytes,
        "operations": operations,
    }
    shown = "".join(f", {name} {facts[name]:.4g}" for name in ("recall", "error") if name in facts)
    print(
        f"{facts['op']} {facts['case']} {facts['method']}: {median * 1e3:.3g} ms measured, {nbytes / MB:.1f} MB at "
        f"{nbytes / median / 1e9:.1f} GB/s, {operations / median / 1e9:.0f} Gop/s{shown}"
    )
