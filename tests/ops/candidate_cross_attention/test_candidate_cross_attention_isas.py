"""The tests of candidate_cross_attention's contract under every instruction set but the active one."""

from collections.abc import Iterator

import pytest
import test_candidate_cross_attention_gradients as gradients
import test_candidate_cross_attention_inputs as inputs
import test_candidate_cross_attention_privacy as privacy
import test_candidate_cross_attention_scores as scores
from oracle import contract_of, inactive, isas

from grank_kernels.backends import cpu

LEFT_OUT = {"test_hypothesis_problems", "test_no_second_derivative"}
globals().update(contract_of((scores, privacy, inputs, gradients), LEFT_OUT))
pytestmark = scores.pytestmark


@pytest.fixture(params=inactive(isas()))
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    with cpu.using_isa(request.param):
        yield "cpu"
