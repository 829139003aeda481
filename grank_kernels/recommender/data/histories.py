"""Ragged histories, and padded batches of them."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


class Batch(NamedTuple):
    """Padded histories, oldest item first, padded on the right.

    Padding on the right needs no mask in causal attention, since no position attends to its right.

    Attributes:
        items: (B, L) int64 item numbers, padded with -1.
        feedback: (B, L) bool, whether the feedback is positive; False in the padding.
    """

    items: Tensor
    feedback: Tensor

    @property
    def valid(self) -> Tensor:
        """(B, L) bool: False in the padding."""
        return self.items >= 0

    @property
    def lengths(self) -> Tensor:
        """(B,) int64: number of items of each history."""
        return self.valid.sum(1)

    def newest(self, length: int) -> "Batch":
        """The batch with histories cut to their newest `length` items."""
        if self.items.shape[1] <= length:
            return self
        columns = (self.lengths - length).clamp(min=0).unsqueeze(1) + torch.arange(length, device=self.items.device)
        return Batch(self.items.gather(1, columns), self.feedback.gather(1, columns))


@dataclass(frozen=True)
class Histories:
    """The items of U users, one user after the other, each user's oldest item first.

    `(offsets, items)` is the ragged form of `mips_topk`'s argument `exclude`.

    Attributes:
        offsets: (U + 1,) int64: the rows of user u are `offsets[u]:offsets[u + 1]`.
        items: (n,) int64 item numbers.
        feedback: (n,) bool, whether the feedback is positive.
    """

    offsets: Tensor
    items: Tensor
    feedback: Tensor

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> Tensor:
        """(U,) int64: number of items of each user."""
        return self.offsets.diff()

    @property
    def users(self) -> Tensor:
        """(n,) int64 in [0, U): the user of each row."""
        return torch.arange(len(self)).repeat_interleave(self.lengths)

    def cut(self, starts: Tensor, stops: Tensor) -> "Histories":
        """Rows `starts[i]:stops[i]` as history i, both (U',) int64; they may overlap, in any order."""
        lengths = stops - starts
        offsets = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
        rows = torch.arange(int(offsets[-1])) + (starts - offsets[:-1]).repeat_interleave(lengths)
        return Histories(offsets, self.items[rows], self.feedback[rows])

    def select(self, users: Tensor) -> "Histories":
        """The histories of these users, (U',) int64 or a bool mask (U,), in the order given."""
        return self.cut(self.offsets[:-1][users], self.offsets[1:][users])

    def pad(self, length: int | None = None) -> Batch:
        """A batch of the last `length` items of every history, or of all items."""
        stops, lengths = self.offsets[1:], self.lengths
        if length is not None:
            lengths = lengths.clamp(max=length)
        return self.windows(stops - lengths, stops)

    def windows(self, starts: Tensor, stops: Tensor) -> Batch:
        """A batch whose row i is rows `starts[i]:stops[i]`, as wide as the longest, at least one column."""
        lengths = stops - starts
        columns = torch.arange(max(1, int(lengths.max())) if len(lengths) else 1)
        valid = columns < lengths.unsqueeze(1)
        rows = (starts.unsqueeze(1) + columns)[valid]
        shape = valid.shape
        items = torch.full(shape, -1, dtype=torch.int64)
        feedback = torch.zeros(shape, dtype=torch.bool)
        items[valid], feedback[valid] = self.items[rows], self.feedback[rows]
        return Batch(items, feedback)

    @classmethod
    def from_lists(cls, items: list[list[int]], feedback: list[list[bool]] | None = None) -> "Histories":
        """From one list of item numbers a user; without `feedback` all of it is positive."""
        lengths = torch.tensor([0, *map(len, items)])
        flat = torch.tensor([item for own in items for item in own], dtype=torch.int64)
        liked = torch.ones(len(flat), dtype=torch.bool)
        if feedback is not None:
            if list(map(len, feedback)) != list(map(len, items)):
                raise ValueError("feedback must have one entry for every item, got lists of other lengths than items")
            liked = torch.tensor([entry for own in feedback for entry in own], dtype=torch.bool)
        return cls(lengths.cumsum(0), flat, liked)
