"""The CUDA backend on CPU tensors: the unchanged launcher calls kernels that run in the emulator.

Inside `with_emulator(...)` it is the backend "emulated": `EmulatedModule` replaces the compiled module and receives
tensors instead of addresses.
"""

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from emulation.cuda.build import ROOT
from emulation.cuda.emulator import Counters, Emulator, Output, Settings
from memory import poisoned

from grank_kernels.backends import BACKENDS, cuda

ON_A_GPU = [pytest.mark.gpu, pytest.mark.skipif(cuda.unavailable() is not None, reason=str(cuda.unavailable()))]
BACKENDS_OF_CUDA = ["emulated", pytest.param("cuda", marks=ON_A_GPU)]
HALVES = (torch.float16, torch.bfloat16)
KERNELS = ("score_candidates", "candidate_cross_attention", "candidate_cross_attention_backward")
OUTPUTS = {  # positions in the argument lists of grank_kernels/_cuda.pyi
    "score_candidates": (20,),
    "candidate_cross_attention": (16, 17),
    "candidate_cross_attention_backward": (20, 21, 22, 23, 24),
}


@cache
def emulator(checked: bool, *instead: Path) -> Emulator:
    """The emulator of all kernels; `instead` replaces kernel files of the same name."""
    files = {f"{kernel}.cu": ROOT / "csrc" / "cuda" / f"{kernel}.cu" for kernel in KERNELS}
    files |= {path.name: path for path in instead}
    entries = Path(__file__).with_name("csrc") / "cuda_kernels.cpp"
    return Emulator("kernels", entries, *files.values(), checked=checked)


class EmulatedModule:
    """The interface of grank_kernels/_cuda.pyi; keeps the counters of the last call."""

    def __init__(self, emulator: Emulator, settings: Settings, plan: tuple[int, int]) -> None:
        self.emulator, self.settings, self.plan = emulator, settings, plan
        self.counters = Counters()

    def CandidateCrossAttention(self, *arguments: Any) -> tuple[Any, ...]:  # noqa: N802
        return arguments

    def score_candidates(self, *arguments: Any) -> None:
        self._run("score_candidates", (*arguments, *self.plan))

    def candidate_cross_attention(self, problem: tuple[Any, ...], *arguments: Any) -> None:
        self._run("candidate_cross_attention", (*problem, *arguments))

    def candidate_cross_attention_backward(self, problem: tuple[Any, ...], *arguments: Any) -> None:
        self._run("candidate_cross_attention_backward", (*problem, *arguments))

    def _run(self, kernel: str, arguments: tuple[Any, ...]) -> None:
        given = dict(enumerate(arguments))
        for i in OUTPUTS[kernel]:
            if given[i] is not None:
                given[i] = Output(given[i], initialised=not bool(given[i].isnan().any()))  # without NaN: has content
        named = {f"argument {i}": x for i, x in given.items()}
        self.counters = self.emulator.run(f"emulated_{kernel}", self.settings, **named)


@contextmanager
def with_emulator(
    *,
    checked: bool = False,
    settings: Settings | None = None,
    plan: tuple[int, int] = (0, 0),
    instead: Collection[Path] = (),
) -> Iterator[EmulatedModule]:
    """Adds the backend "emulated". `plan`: stages and tiles per block of score_candidates, 0 for its default."""
    module = EmulatedModule(emulator(checked, *instead), settings or Settings(), plan)
    with poisoned(), standing_in(module, torch):
        yield module


@contextmanager
def standing_in(module: Any, allocating: ModuleType) -> Iterator[None]:
    """Adds the backend "emulated": the CUDA backend with another native module."""

    @contextmanager
    def no_stream(device: torch.device) -> Iterator[None]:
        yield None

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(BACKENDS, "emulated", cuda)
        patch.setattr(cuda, "_cuda", module)
        patch.setattr(cuda, "torch", allocating)
        patch.setattr(cuda, "_address", lambda tensor: tensor)
        patch.setattr(cuda, "_stream_of", no_stream)
        patch.setattr(cuda, "_device_unsupported", lambda name, x: None)
        yield
