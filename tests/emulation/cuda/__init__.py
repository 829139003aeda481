"""CUDA kernels on the CPU: the very source files, compiled by the host's compiler, one fiber for every CUDA thread."""

from .emulator import Counters, EmulationError, Emulator, Output, Report, Rounding, Settings

__all__ = ["Counters", "EmulationError", "Emulator", "Output", "Report", "Rounding", "Settings"]
