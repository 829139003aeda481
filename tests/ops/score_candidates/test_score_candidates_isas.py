"""The tests of score_candidates' contract under every instruction set but the active one."""

from collections.abc import Iterator

import pytest
import test_score_candidates_inputs as inputs
import test_score_candidates_lse as lse
import test_score_candidates_scores as scores
from oracle import contract_of, inactive, isas

from grank_kernels.backends import cpu

LEFT_OUT = {"test_hypothesis_problems"}
globals().update(contract_of((scores, inputs, lse), LEFT_OUT))
pytestmark = scores.pytestmark


@pytest.fixture(params=inactive(isas()))
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    with cpu.using_isa(request.param):
        yield "cpu"
