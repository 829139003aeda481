"""Runs compiled kernels in the emulator: tensors in, tensors and the emulator's reports out."""

import ctypes
import re
import subprocess
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Any

import torch

from .build import ROOT, build

GUARD_BYTES = 4096  # before and after every tensor, all bits set: NaN as float, -1 as integer
ALIGNMENT = 256  # of cudaMalloc
PRIMITIVES = "emulated_primitives.h"  # inlined into kernels, so left out of reported source lines


class Rounding(IntEnum):
    """How mma adds: sequentially in float32, or in groups with truncation, as published for A100 (8) and H100 (16).

    The last two also add the documented errors of exp2, log2 and rcp. They vary what a result may depend on and do not
    reproduce the bits of a GPU.
    """

    SEQUENTIAL = 0
    GROUPS_OF_8 = 1
    GROUPS_OF_16 = 2


@dataclass(frozen=True)
class Settings:
    """Schedule: threads in order and copies complete at their wait; with a seed, both at random.

    `preempt` is the probability of a thread switch at a memory access.
    """

    seed: int = 0
    preempt: float = 0.0
    rounding: Rounding = Rounding.SEQUENTIAL


@dataclass
class Output:
    """A tensor that a kernel writes. Unless `initialised`, reading an element before writing it is reported.

    The kernel gets memory with all bits set (NaN or -1), which is copied to the tensor after the run.
    """

    tensor: torch.Tensor
    initialised: bool = False

    @classmethod
    def empty(cls, *shape: int, dtype: torch.dtype = torch.float32) -> "Output":
        return cls(torch.empty(shape, dtype=dtype))


@dataclass(frozen=True)
class Report:
    """One finding of a checker: its kind, and a text with thread, memory and source lines."""

    kind: str
    text: str

    def __str__(self) -> str:
        return f"{self.kind}: {self.text}"


class EmulationError(AssertionError):
    """The emulator reported errors, which are in `reports`."""

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
    """Counts of a run. Memory traffic is counted in the checked build only."""

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
        checked: check every memory access for races, bounds, alignment, uninitialised memory and copies in flight, and
            count the traffic. Three times slower.
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
            arguments: in the order of the function's parameters; their names are used in reports. A tensor or array is
                copied, with its strides, to guarded memory, an `Output` also back; None becomes a null pointer, an int
                an int64_t, a float a float.

        Raises:
            EmulationError: a checker reported an error.
        """
        self._library.emulation_forget()
        config = _Config(settings.seed, settings.preempt, settings.rounding)
        self._library.emulation_reset(ctypes.byref(config))
        buffers: dict[str, _Guarded] = {}
        values: list[Any] = []
        for name, argument in arguments.items():
            if argument is None:
                values.append(ctypes.c_void_p(None))
            elif isinstance(argument, int):
                values.append(ctypes.c_int64(argument))
            elif isinstance(argument, float):
                values.append(ctypes.c_float(argument))
            else:
                output = argument if isinstance(argument, Output) else Output(torch.as_tensor(argument), True)
                buffers[name] = _Guarded(output)
                values.append(ctypes.c_void_p(buffers[name].bytes.data_ptr()))
                if self.checked:
                    size = len(buffers[name].bytes)
                    self._library.emulation_buffer(values[-1], size, name.encode(), output.initialised)
        getattr(self._library, entry)(*values)
        reports = [
            Report(
                self._library.emulation_report_kind(i).decode(),
                self._with_lines(self._library.emulation_report_text(i).decode()),
            )
            for i in range(self._library.emulation_num_reports())
        ]
        reports += [
            Report("guard", f"bytes around {name} were changed") for name, buffer in buffers.items() if buffer.broken()
        ]
        if reports:
            raise EmulationError(reports)
        for name, argument in arguments.items():
            if isinstance(argument, Output):
                buffers[name].copy_to(argument.tensor)
        return Counters.from_buffer_copy(self._library.emulation_counters().contents)

    def _with_lines(self, text: str) -> str:
        return re.sub(r"\{@([0-9a-f]+)\}", lambda match: "at " + self._lines(int(match[1], 16) - 1), text)

    def _lines(self, offset: int) -> str:
        """file:line of the code in the project, innermost first where functions were inlined."""
        command = ["addr2line", "-i", "-e", str(self._path), hex(offset)]
        frames = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("\n")
        places = [Path(frame.split(" ")[0]) for frame in frames if frame.startswith(str(ROOT))]
        return " < ".join(dict.fromkeys(place.name for place in places if PRIMITIVES not in place.name))


class _Guarded:
    """The memory of a tensor, from its first element to its last, with guards around it."""

    def __init__(self, output: Output) -> None:
        tensor = output.tensor
        span = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        size = span * tensor.element_size() if tensor.numel() else 0
        self._memory = torch.full((GUARD_BYTES + size + GUARD_BYTES + ALIGNMENT,), 0xFF, dtype=torch.uint8)
        self._begin = GUARD_BYTES + -(self._memory.data_ptr() + GUARD_BYTES) % ALIGNMENT
        self.bytes = self._memory[self._begin : self._begin + size]
        if output.initialised and size:
            self.bytes.copy_(tensor.detach().as_strided((span,), (1,)).view(torch.uint8))

    def copy_to(self, tensor: torch.Tensor) -> None:
        if tensor.numel():
            tensor.copy_(self.bytes.view(tensor.dtype).as_strided(tensor.shape, tensor.stride()))

    def broken(self) -> bool:
        after = self._begin + len(self.bytes)
        return bool((self._memory[: self._begin] != 0xFF).any() or (self._memory[after:] != 0xFF).any())
