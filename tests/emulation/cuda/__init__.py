"""CUDA emulator: kernel sources compiled by the host's compiler and run on the CPU, one fiber per CUDA thread."""

from .emulator import Counters, EmulationError, Emulator, Output, Report, Rounding, Settings

__all__ = ["Counters", "EmulationError", "Emulator", "Output", "Report", "Rounding", "Settings"]
