"""The tests of candidate_cross_attention's contract, run on the CUDA kernels in the emulator and on a GPU."""

from collections.abc import Iterator
from contextlib import nullcontext
from functools import partial

import pytest
import test_candidate_cross_attention_compile as compiling
import test_candidate_cross_attention_errors as errors
import test_candidate_cross_attention_gradients as gradients
import test_candidate_cross_attention_inputs as inputs
import test_candidate_cross_attention_privacy as privacy
import test_candidate_cross_attention_scores as scores
import torch
from emulated_cuda import BACKENDS_OF_CUDA, HALVES, with_emulator
from oracle import contract_of

LEFT_OUT = {
    "test_default_backend",  # the default for CPU tensors is cpu
    "test_width_zero",  # not one of the widths that the kernels support
    "test_other_widths",  # the kernels support 16, 32, 64 and 128
    "test_compile_for_export",  # uses float32
    "test_compile_inductor",  # uses float32; in float16 inductor rounds differently around the op
    "test_global_modes_of_torch",  # the emulator allocates tensors, which the modes affect
    "test_hypothesis_problems",  # has its own list of backends
}
CONTRACT = (scores, privacy, inputs, gradients, errors, compiling)
globals().update(contract_of(CONTRACT, LEFT_OUT))
pytestmark = scores.pytestmark


@pytest.fixture(params=BACKENDS_OF_CUDA)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    in_half = partial(scores.attention, dtype=torch.float16)  # unless a test names the dtype
    for module in CONTRACT:
        monkeypatch.setattr(module, "attention", in_half, raising=False)
    with with_emulator() if request.param == "emulated" else nullcontext():
        yield request.param


@pytest.fixture(params=HALVES, ids=lambda dtype: str(dtype)[6:])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param  # type: ignore[no-any-return]
