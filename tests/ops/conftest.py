"""Fixtures of the tests of all ops."""

from collections.abc import Iterator

import pytest
from memory import poisoned


@pytest.fixture(autouse=True)
def _poisoned_memory() -> Iterator[None]:
    with poisoned():
        yield
