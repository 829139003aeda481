"""Fixtures of the tests of score_candidates."""

import pytest
import torch
from ranker_oracle import FLOATS, backends_of

BACKENDS = backends_of("score_candidates")


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=FLOATS, ids=lambda dtype: str(dtype)[6:])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param  # type: ignore[no-any-return]
