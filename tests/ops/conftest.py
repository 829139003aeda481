"""Fixtures of the tests of all ops: memory that shows when it is read before it was written, instruction sets."""

import ctypes
from collections.abc import Iterator

import pytest
from memory import poisoned

from grank_kernels.backends import cpu

if hasattr(ctypes.CDLL(None), "mallopt"):  # glibc
    M_PERTURB = -6  # of malloc.h
    ctypes.CDLL(None).mallopt(M_PERTURB, 0x80)  # new memory is full of 0x7f: 3.4e38 as a float


@pytest.fixture(autouse=True)
def _poisoned_memory() -> Iterator[None]:
    with poisoned():
        yield


@pytest.fixture
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """The instruction set of the parameter, in use for one test."""
    with cpu.using_isa(request.param):
        yield request.param
