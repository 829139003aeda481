"""Fixtures of all ops' tests: poisoned fresh memory, and the active instruction set."""

import ctypes
from collections.abc import Iterator

import pytest
from memory import poisoned

from grank_kernels.backends import cpu

if hasattr(ctypes.CDLL(None), "mallopt"):  # glibc
    M_PERTURB = -6  # from malloc.h
    ctypes.CDLL(None).mallopt(M_PERTURB, 0x80)  # new memory is filled with 0x7f: 3.4e38 as float32


@pytest.fixture(autouse=True)
def _poisoned_memory() -> Iterator[None]:
    with poisoned():
        yield


@pytest.fixture
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Activates the instruction set of the parameter for one test."""
    with cpu.using_isa(request.param):
        yield request.param
