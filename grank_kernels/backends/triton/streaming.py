"""Streams the rows of a table in host memory to the device, chunk by chunk."""

from collections.abc import Iterator
from typing import NamedTuple

import torch

CHUNK_BYTES = 1 << 28  # of each of two buffers: 5 ms over PCIe 5, so launch overhead is negligible


class Chunk(NamedTuple):
    """Consecutive rows of a table, on the device of the queries.

    Attributes:
        base: position of the first row in the table.
        rows: (n, d).
        row_scale: (n,) float32 of int8 rows, else None.
        row_error: (n,) float32 of a certified copy, else None.
    """

    base: int
    rows: torch.Tensor
    row_scale: torch.Tensor | None
    row_error: torch.Tensor | None = None


def chunks(items: torch.Tensor, row_scale: torch.Tensor | None, device: torch.device) -> Iterator[Chunk]:
    """The table in one chunk if it is on the device, else its chunks, each copied while the one before is searched.

    Copies run on a separate stream into two alternating buffers. A copy waits until its buffer has been searched, and
    the current stream waits for the copy. The host never waits.
    """
    if items.device == device:
        yield Chunk(0, items, row_scale)
        return
    N, d = items.shape
    size = chunk_rows(items)
    current, copies = torch.cuda.current_stream(device), torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    buffers = [
        (
            torch.empty(size, d, dtype=items.dtype, device=device),
            None if row_scale is None else torch.empty(size, dtype=torch.float32, device=device),
        )
        for _ in range(2)
    ]
    searched = [current.record_event(), current.record_event()]
    for turn, base in enumerate(range(0, N, size)):
        part = slice(base, min(N, base + size))
        n = part.stop - base
        rows, scale = buffers[turn % 2]
        with torch.cuda.stream(copies):
            copies.wait_event(searched[turn % 2])
            rows[:n].copy_(items[part], non_blocking=True)
            if scale is not None and row_scale is not None:
                scale[:n].copy_(row_scale[part], non_blocking=True)
            copied = copies.record_event()
        current.wait_event(copied)
        yield Chunk(base, rows[:n], None if scale is None else scale[:n])
        searched[turn % 2] = current.record_event()


def chunk_rows(items: torch.Tensor) -> int:
    """Rows per chunk of a table in host memory."""
    return min(len(items), max(128, CHUNK_BYTES // max(1, items.shape[1] * items.itemsize) // 128 * 128))
