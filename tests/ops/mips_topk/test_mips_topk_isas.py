"""The tests of mips_topk's contract under every instruction set but the active one."""

from collections.abc import Iterator

import pytest
import test_mips_topk_filters as filters
import test_mips_topk_inputs as inputs
import test_mips_topk_order as order
import test_mips_topk_scores as scores
from oracle import contract_of, inactive, searching_isas

from grank_kernels.backends import cpu

globals().update(contract_of((scores, filters, inputs, order), ()))


@pytest.fixture(params=inactive(searching_isas()))
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    with cpu.using_isa(request.param):
        yield "cpu"
