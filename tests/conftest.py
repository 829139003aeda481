"""Fixtures of every test: one seed, one thread on request.

Without a GPU the triton backend runs in Triton's interpreter, which must be requested before the package is imported.
"""

import os
from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

settings.register_profile("grank", deadline=None, print_blob=True)
settings.load_profile("grank")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(20251015)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """One torch thread: the sizes are too small for two, and a waiting thread slows down parallel test runs."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
