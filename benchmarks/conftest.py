"""Options, machine and limits of a run: `pytest benchmarks --benchmark-only [--bench-n ROWS] [--bench-d WIDTH]`."""

import importlib.metadata
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch

import grank_kernels as gk
from benchmarks import limits

PACKAGES = ("torch", "numpy", "triton", "faiss-cpu", "faiss-gpu", "cuvs", "scann", "usearch", "hnswlib")


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("benchmark sizes")
    group.addoption("--bench-n", type=int, default=1_000_000, help="rows of the item table (default: %(default)s)")
    group.addoption("--bench-d", type=int, default=64, help="embedding width (default: %(default)s)")
    group.addoption("--bench-run", type=Path, help="folder of a run of GRank, whose vectors are searched too")
    group.addoption("--bench-gpu-n", type=int, default=10_000_000, help="rows on a GPU (default: %(default)s)")
    group.addoption("--bench-gpu-d", type=int, default=128, help="embedding width on a GPU (default: %(default)s)")


def pytest_benchmark_update_machine_info(machine_info: dict[str, Any]) -> None:
    machine_info["grank_kernels"] = gk.show_config()
    machine_info["threads"] = torch.get_num_threads()
    machine_info["versions"] = {}
    for package in PACKAGES:
        try:
            machine_info["versions"][package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            machine_info["versions"][package] = None


def pytest_benchmark_update_json(output_json: dict[str, Any]) -> None:
    """Adds the machine's limits, measured in the same process as the methods."""
    output_json["limits"] = limits.measured()


@pytest.fixture(scope="session")
def read_limit() -> Callable[[int, str], float]:
    """Read bandwidth in GB/s for a number of bytes on a device, measured once per run."""
    return lru_cache(maxsize=None)(limits.read_bandwidth)
