"""Padded batches from ragged histories."""

from collections.abc import Iterator

import torch
from torch import Tensor


def last_items(items: Tensor, starts: Tensor, ends: Tensor, length: int) -> Tensor:
    """The last `length` items of each segment, padded on the left with -1.

    Padding on the left puts the newest item of every row into the last column, so a shorter history is a plain slice
    and the position of a column says how long ago it was.

    Args:
        items: (total,) int64.
        starts: (B,) int64, first row of each segment.
        ends: (B,) int64, one past its last row.
        length: columns of the result.

    Returns:
        (B, length) int64.
    """
    rows = ends[:, None] - length + torch.arange(length, device=items.device)
    if len(items) == 0:
        return torch.full_like(rows, -1)
    inside = rows >= starts[:, None]
    return items[rows.clamp(min=0)].where(inside, -1)


class TrainingWindows:
    """Batches of item windows that cover every training item as a target, cut anew each epoch.

    Each row of a batch is a history followed by the item that came next, (B, history + 1) int64, padded on the left
    with -1. Only its last `targets` columns are meant as targets, each predicted from what stands before it. A user's
    windows lie `targets` apart, as few as cover the items, and shift at random as far as that number allows, so that an
    item meets many columns over the epochs.
    """

    def __init__(
        self, offsets: Tensor, items: Tensor, *, history: int, targets: int, batch_size: int, seed: int = 0
    ) -> None:
        """Takes the ragged histories (offsets (U + 1,), items), as in `LeaveOneOut`; the rest as above."""
        self.offsets, self.items = offsets, items
        self.history, self.targets, self.batch_size = history, targets, batch_size
        to_predict = (offsets.diff() - 1).clamp(min=0)
        windows = -(-to_predict // targets)
        self._slack = windows * targets - to_predict  # by how much they overlap, or reach past the user's first item
        self._users = torch.arange(len(windows)).repeat_interleave(windows)
        self._place = torch.arange(len(self._users)) - (windows.cumsum(0) - windows)[self._users]
        self._generator = torch.Generator().manual_seed(seed)

    def __len__(self) -> int:
        return -(-len(self._users) // self.batch_size)

    def __iter__(self) -> Iterator[Tensor]:
        starts, stops = self.offsets[:-1], self.offsets[1:]
        shift = (torch.rand(len(starts), generator=self._generator) * (self._slack + 1)).long()
        ends = (stops + shift)[self._users] - self._place * self.targets
        ends = ends.minimum(stops[self._users])
        order = torch.randperm(len(ends), generator=self._generator)
        for rows in torch.split(order, self.batch_size):
            yield last_items(self.items, starts[self._users[rows]], ends[rows], self.history + 1)
