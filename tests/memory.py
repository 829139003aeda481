"""Fresh memory filled with NaN and the largest integers, so that unwritten elements of a result are noticed."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def poisoned() -> Iterator[None]:
    """`torch.empty` and its relatives return NaN and the largest integers (torch's `fill_uninitialized_memory`)."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
