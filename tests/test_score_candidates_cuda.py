"""The contract of score_candidates, kept by the CUDA kernels: the tests of test_score_candidates.py in the emulator."""

from collections.abc import Iterator
from functools import partial

import pytest
import test_score_candidates as contract
import torch
from emulated_cuda import HALVES, contract_of, with_emulator

LEFT_OUT = {
    "test_other_widths",  # the kernels have 16, 32, 64 and 128
    "test_tables_of_another_precision_than_the_rest",  # int8 or the keys'
    "test_candidates_do_not_see_each_other",  # likewise
    "test_layouts",  # with a table that is not contiguous
    "test_compile_for_export",  # float32
    "test_whatever_the_process_has_set",  # the emulator itself makes tensors
    "test_whatever_hypothesis_comes_up_with",  # brings its own backends
}
globals().update(contract_of(contract, LEFT_OUT))
pytestmark = contract.pytestmark


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setattr(contract, "scoring", partial(contract.scoring, dtype=torch.float16))  # where a test names none
    with with_emulator():
        yield "emulated"


@pytest.fixture(params=HALVES, ids=lambda dtype: str(dtype)[6:])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param  # type: ignore[no-any-return]
