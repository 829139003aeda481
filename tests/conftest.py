"""What every test has: memory that shows when it is read before it was written, and one seed.

Without a GPU the triton backend runs in Triton's interpreter, which must be asked for before the package is imported.
"""

import os
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import settings

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

from grank_kernels.backends import cpu

settings.register_profile("grank", deadline=None, print_blob=True)
settings.load_profile("grank")


class PoisonedTorch(ModuleType):
    """torch, but `empty` returns memory full of what no result may hold."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    def empty(self, *shape: Any, **options: Any) -> torch.Tensor:
        fresh = torch.empty(*shape, **options)
        return fresh.fill_(torch.nan if fresh.is_floating_point() else torch.iinfo(fresh.dtype).min // 3)


@pytest.fixture(scope="session", autouse=True)
def _poisoned_outputs() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu, "torch", PoisonedTorch("torch"))
        yield


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(20251015)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Two threads gain nothing on sizes this small, and wait for each other where tests run side by side."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
