"""Splits: what a model may learn from, and what it is then asked."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from grank_kernels.data.interactions import Interactions


class Cases(NamedTuple):
    """What a model is asked: for each of B users, the history it may see and the one item that came next.

    Attributes:
        users: (B,) int64.
        offsets: (B + 1,) int64: the history of case b is `items[offsets[b]:offsets[b + 1]]`, oldest first.
        items: (total,) int64. `(offsets, items)` is also what `mips_topk` takes as `exclude`: the items already seen.
        targets: (B,) int64.
    """

    users: Tensor
    offsets: Tensor
    items: Tensor
    targets: Tensor


@dataclass(frozen=True)
class LeaveOneOut:
    """The leave-one-out split: train on all but the last two items of each user, ask for those two.

    Attributes:
        num_items: size of the corpus.
        train_offsets: (num_users + 1,) int64: the rows of each user in `train_items`.
        train_items: (n,) int64, by user, oldest first.
        validation: the target is the last item but one, the history the training items.
        test: the target is the last item, the history everything before it.
    """

    num_items: int
    train_offsets: Tensor
    train_items: Tensor
    validation: Cases
    test: Cases


def leave_one_out(interactions: Interactions) -> LeaveOneOut:
    """Hold out the last item of each user for the test and the one before it for validation.

    The protocol of SASRec, HSTU and UniGRF. Users with fewer than three rows are trained on whole and never asked.
    """
    offsets, items = interactions.offsets, interactions.items
    asked = offsets.diff() >= 3
    held_out = 2 * asked.long()  # rows that training does not see, per user
    train_offsets, train_items = _without_last(offsets, items, held_out)
    users = asked.nonzero().squeeze(1)
    ends = offsets[1:][users]

    def cases(drop: int) -> Cases:
        kept_offsets, kept_items = _without_last(offsets, items, torch.where(asked, drop, offsets.diff()))
        lengths = kept_offsets.diff()[users]
        return Cases(users, _offsets(lengths), kept_items, items[ends - drop])

    return LeaveOneOut(interactions.num_items, train_offsets, train_items, cases(2), cases(1))


def _without_last(offsets: Tensor, items: Tensor, drop: Tensor) -> tuple[Tensor, Tensor]:
    """Take the last `drop[u]` rows from each segment u."""
    lengths = offsets.diff()
    place = torch.arange(len(items)) - offsets[:-1].repeat_interleave(lengths)
    keep = place < (lengths - drop).repeat_interleave(lengths)
    return _offsets(lengths - drop), items[keep]


def _offsets(lengths: Tensor) -> Tensor:
    return torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
