"""Runs compiled kernels in the emulator: tensors in, tensors out, and what the emulator has to say about it."""

import ctypes
import re
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Any

import torch

from .build import ROOT, build

GUARD_BYTES = 4096  # around every tensor; all bits set, so NaN, or -1
ALIGNMENT = 256  # what cudaMalloc gives
PRIMITIVES = "emulated_primitives.h"  # inlined into kernels; not where to look


class Rounding(IntEnum):
    """How mma adds: one after another in float32, or in groups with truncation, as measured on A100 (8) and H100 (16).

    The last two also put exp2, log2 and rcp off by their documented errors. They say what a result may depend on; they
    do not claim to be the bits of a GPU.
    """

    SEQUENTIAL = 0
    GROUPS_OF_8 = 1
    GROUPS_OF_16 = 2


@dataclass(frozen=True)
class Settings:
    """Threads run in order and copies land when they are waited for; with a seed, both at random.

    `preempt` is the probability that another thread goes on at a memory access.
    """

    seed: int = 0
    preempt: float = 0.0
    rounding: Rounding = Rounding.SEQUENTIAL


class Output:
    """A tensor for a kernel to write: full of NaN (-1 for integers), and nothing may read it before it is written.

    With a `fill` it can be read from the start.
    """

    def __init__(self, shape: Sequence[int], dtype: torch.dtype, fill: float | None = None) -> None:
        self.initialised = fill is not None
        self.tensor = _guarded(tuple(shape), dtype)
        if fill is not None:
            self.tensor.fill_(fill)


@dataclass(frozen=True)
class Report:
    """What a checker found: its kind, and a text with the thread, the memory and the source lines."""

    kind: str
    text: str

    def __str__(self) -> str:
        return f"{self.kind}: {self.text}"


class EmulationError(AssertionError):
    """The emulator has found something; `reports` says what."""

    def __init__(self, reports: list[Report]) -> None:
        super().__init__("\n".join(map(str, reports)))
        self.reports = reports


class Traffic(ctypes.Structure):
    """One kind of memory traffic; transactions are sectors of 32 bytes, or wavefronts in shared memory."""

    _fields_ = [(field, ctypes.c_uint64) for field in ("requests", "bytes", "transactions", "ideal")]
    requests: int
    bytes: int
    transactions: int
    ideal: int


TRAFFIC = ("global_load", "global_store", "shared_load", "shared_store", "copy_source", "copy_target", "ldmatrix")


class Counters(ctypes.Structure):
    """What a run did. Memory traffic is counted in the checked build alone."""

    _fields_ = [(kind, Traffic) for kind in TRAFFIC] + [
        (field, ctypes.c_uint64) for field in ("mma", "barriers", "atomics", "blocks")
    ]
    global_load: Traffic
    global_store: Traffic
    shared_load: Traffic
    shared_store: Traffic
    copy_source: Traffic
    copy_target: Traffic
    ldmatrix: Traffic
    mma: int
    barriers: int
    atomics: int
    blocks: int


class _Config(ctypes.Structure):
    _fields_ = [("seed", ctypes.c_uint64), ("preempt", ctypes.c_double), ("rounding", ctypes.c_int)]


class Emulator:
    """Kernels and their entry points, `extern "C"` functions of pointers, int64_t and float, as one library.

    Args:
        name: of the library.
        sources: .cu and .cpp files.
        checked: watch every memory access: races, bounds, alignment, memory that is read before it is written, copies
            in flight; and count the traffic. Three times slower.
    """

    def __init__(self, name: str, *sources: Path, checked: bool) -> None:
        self.checked = checked
        self._path = build(name, sources, checked=checked)
        self._library = ctypes.CDLL(str(self._path))
        self._library.emulation_counters.restype = ctypes.POINTER(Counters)
        self._library.emulation_report_kind.restype = ctypes.c_char_p
        self._library.emulation_report_text.restype = ctypes.c_char_p

    def run(self, entry: str, settings: Settings = Settings(), /, **arguments: Any) -> Counters:
        """Calls an entry point.

        Args:
            entry: name of the function.
            settings: how to run it.
            arguments: in the order of the function's parameters. Tensors and arrays are copied to guarded memory;
                an `Output` is filled in place; None is a null pointer; int is int64_t; float is float. The names are
                for the reports.

        Raises:
            EmulationError: for whatever a checker found.
        """
        self._library.emulation_forget()
        config = _Config(settings.seed, settings.preempt, settings.rounding)
        self._library.emulation_reset(ctypes.byref(config))
        buffers: dict[str, torch.Tensor] = {}
        values: list[Any] = []
        for name, argument in arguments.items():
            if argument is None:
                values.append(ctypes.c_void_p(None))
            elif isinstance(argument, int):
                values.append(ctypes.c_int64(argument))
            elif isinstance(argument, float):
                values.append(ctypes.c_float(argument))
            else:
                buffers[name] = _input(argument) if not isinstance(argument, Output) else argument.tensor
                values.append(ctypes.c_void_p(buffers[name].data_ptr()))
                if self.checked:
                    initialised = not isinstance(argument, Output) or argument.initialised
                    self._library.emulation_buffer(values[-1], _bytes(buffers[name]), name.encode(), initialised)
        getattr(self._library, entry)(*values)
        reports = [
            Report(
                self._library.emulation_report_kind(i).decode(),
                self._with_lines(self._library.emulation_report_text(i).decode()),
            )
            for i in range(self._library.emulation_num_reports())
        ]
        reports += [Report("guard", f"bytes around {name} were changed") for name in buffers if _changed(buffers[name])]
        if reports:
            raise EmulationError(reports)
        return Counters.from_buffer_copy(self._library.emulation_counters().contents)

    def _with_lines(self, text: str) -> str:
        return re.sub(r"\{@([0-9a-f]+)\}", lambda match: "at " + self._lines(int(match[1], 16) - 1), text)

    def _lines(self, offset: int) -> str:
        """file:line of the code in the project, innermost first where functions were inlined."""
        command = ["addr2line", "-i", "-e", str(self._path), hex(offset)]
        frames = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("\n")
        places = [Path(frame.split(" ")[0]) for frame in frames if frame.startswith(str(ROOT))]
        return " < ".join(dict.fromkeys(place.name for place in places if PRIMITIVES not in place.name))


def _guarded(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """A tensor of set bits, with guards around it."""
    size = torch.Size(shape).numel() * dtype.itemsize
    memory = torch.full((GUARD_BYTES + size + GUARD_BYTES + ALIGNMENT,), 0xFF, dtype=torch.uint8)
    begin = GUARD_BYTES + -(memory.data_ptr() + GUARD_BYTES) % ALIGNMENT
    return memory[begin : begin + size].view(dtype).view(shape)


def _input(values: Any) -> torch.Tensor:
    tensor = torch.as_tensor(values)
    return _guarded(tuple(tensor.shape), tensor.dtype).copy_(tensor)


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _changed(tensor: torch.Tensor) -> bool:
    memory = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())
    begin = tensor.storage_offset() * tensor.element_size()
    return bool((memory[:begin] != 0xFF).any() or (memory[begin + _bytes(tensor) :] != 0xFF).any())
