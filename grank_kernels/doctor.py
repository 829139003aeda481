"""`show_config`: versions, devices and the state of every backend."""

import platform
from importlib.util import find_spec

import numpy as np
import torch

from grank_kernels._version import __version__
from grank_kernels.backends import BACKENDS, cpu

OPS = ("mips_topk", "candidate_cross_attention", "score_candidates", "corpus_cross_entropy", "sample_negatives")


def _cuda_module() -> str:
    if find_spec("grank_kernels._cuda") is None:
        return "not built: there was no nvcc where the package was installed"
    try:
        from grank_kernels import _cuda
    except ImportError as error:
        return f"could not be loaded: {error}"
    return f"compiled for {', '.join(_cuda.architectures())}"


def show_config() -> str:
    """Versions, devices and, for every backend, whether it can run or why not: a text for bug reports."""
    lines = [
        f"grank_kernels {__version__}",
        f"torch {torch.__version__}, numpy {np.__version__}, Python {platform.python_version()}",
        f"processor: {platform.machine()}, {torch.get_num_threads()} threads; {torch.cuda.device_count()} CUDA devices",
    ]
    for name, module in BACKENDS.items():
        ops = ", ".join(op for op in OPS if hasattr(module, op))
        lines.append(f"backend {name}: {module.unavailable() or f'can run {ops}'}")
    lines.append(f"cuda module: {_cuda_module()}")
    if cpu.unavailable() is None:
        sets = ", ".join(isa + ("" if here else " (not on this processor)") for isa, here in cpu.isas().items())
        try:
            lines.append(f"cpu instruction set: {cpu.isa()}, of {sets}; GRANK_CPU_ISA chooses another")
        except ValueError as error:
            lines.append(f"cpu instruction set: none, every search will raise: {error}")
    return "\n".join(lines)
