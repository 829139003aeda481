"""The contract of corpus_cross_entropy under each instruction set other than the one in use."""

from collections.abc import Iterator

import pytest
import test_corpus_cross_entropy_scores as scores
from oracle import contract_of, inactive, isas

from grank_kernels.backends import cpu

LEFT_OUT = {"test_whatever_hypothesis_comes_up_with"}
globals().update(contract_of((scores,), LEFT_OUT))
pytestmark = scores.pytestmark


@pytest.fixture(params=inactive(isas()))
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    with cpu.using_isa(request.param):
        yield "cpu"
