"""Fixtures of the tests of mips_topk."""

from collections.abc import Iterator

import pytest
import torch
from oracle import (
    BACKENDS,
    KINDS,
)


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    threads = torch.get_num_threads()
    if request.param == "reference":  # thousands of small torch operations are faster on one thread
        torch.set_num_threads(1)
    yield str(request.param)
    torch.set_num_threads(threads)


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)
