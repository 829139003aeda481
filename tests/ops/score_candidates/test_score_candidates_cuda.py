"""The tests of score_candidates's contract, run on the CUDA kernels in the emulator and on a GPU."""

from collections.abc import Iterator
from contextlib import nullcontext
from functools import partial

import pytest
import test_score_candidates_compile as compiling
import test_score_candidates_errors as errors
import test_score_candidates_inputs as inputs
import test_score_candidates_lse as lse
import test_score_candidates_scores as scores
import torch
from emulated_cuda import BACKENDS_OF_CUDA, HALVES, with_emulator
from oracle import contract_of

LEFT_OUT = {
    "test_default_backend",  # the default for CPU tensors is cpu
    "test_other_widths",  # the kernels support 16, 32, 64 and 128
    "test_tables_of_another_dtype_than_the_keys",  # the kernels take tables of int8 or of the keys' dtype
    "test_candidates_do_not_see_each_other",  # uses a table of another dtype
    "test_layouts",  # has a table that is not contiguous
    "test_compile_for_export",  # uses float32
    "test_global_modes_of_torch",  # the emulator allocates tensors, which the modes affect
    "test_hypothesis_problems",  # has its own list of backends
}
CONTRACT = (scores, inputs, lse, errors, compiling)
globals().update(contract_of(CONTRACT, LEFT_OUT))
pytestmark = scores.pytestmark


@pytest.fixture(params=BACKENDS_OF_CUDA)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    in_half = partial(scores.scoring, dtype=torch.float16)  # unless a test names the dtype
    for module in CONTRACT:
        monkeypatch.setattr(module, "scoring", in_half, raising=False)
    with with_emulator() if request.param == "emulated" else nullcontext():
        yield request.param


@pytest.fixture(params=HALVES, ids=lambda dtype: str(dtype)[6:])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param  # type: ignore[no-any-return]
