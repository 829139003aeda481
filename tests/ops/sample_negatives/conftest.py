"""Fixtures of the tests of sample_negatives."""

import pytest
from ranker_oracle import backends_of


@pytest.fixture(params=backends_of("sample_negatives"))
def backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)
