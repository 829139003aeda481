"""Fixtures of the tests of corpus_cross_entropy."""

import pytest
import torch
from ranker_oracle import FLOATS, backends_of


@pytest.fixture(params=backends_of("corpus_cross_entropy"))
def backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=FLOATS, ids=lambda dtype: str(dtype)[6:])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param  # type: ignore[no-any-return]
