"""Splits: what a model may learn from, and what it is then asked."""

from dataclasses import dataclass

import torch
from torch import Tensor

from grank_kernels.recommender.data.histories import Histories
from grank_kernels.recommender.data.interactions import Interactions


@dataclass(frozen=True)
class Cases:
    """What a model is asked: for each of B users, the history it may see and what came after it.

    Attributes:
        users: (B,) int64, whose histories they are.
        histories: of B users.
        targets: of B users, one or more each.
    """

    users: Tensor
    histories: Histories
    targets: Histories

    def __len__(self) -> int:
        return len(self.users)

    def select(self, cases: Tensor) -> "Cases":
        """These cases, (n,) int64 or a bool mask (B,), in this order."""
        return Cases(self.users[cases], self.histories.select(cases), self.targets.select(cases))


@dataclass(frozen=True)
class Split:
    """Train on the one, choose by the second, report the third; every item of the corpus competes.

    Attributes:
        num_items: size of the corpus.
        train: what training may see.
        validation: for early stopping and settings.
        test: for reports.
    """

    num_items: int
    train: Histories
    validation: Cases
    test: Cases


def leave_one_out(interactions: Interactions, *, positive: float = 4.0) -> Split:
    """Hold out the last item of each user for the test and the one before it for validation.

    The protocol of SASRec, HSTU and UniGRF (arXiv 2504.16454, section 4.1). The history of the test holds the
    validation item; training sees neither. Users with fewer than three rows are trained on whole and never asked.

    Args:
        interactions: what a reader returned.
        positive: the least rating that is positive feedback; all of it is where there are no ratings. Without effect
            on what is held out.
    """
    all_rows = all_histories(interactions, positive)
    lengths = all_rows.offsets.diff()
    asked = lengths >= 3
    users = asked.nonzero().squeeze(1)
    ends = all_rows.offsets[1:]

    def cases(drop: int) -> Cases:
        starts, stops = all_rows.offsets[users], ends[users] - drop
        return Cases(users, all_rows.cut(starts, stops), all_rows.cut(stops, stops + 1))

    train = all_rows.cut(all_rows.offsets[:-1], ends - 2 * asked.long())
    return Split(interactions.num_items, train, cases(2), cases(1))


def half_and_half(
    interactions: Interactions,
    *,
    positive: float = 4.0,
    least: int = 10,
    validation: int = 1000,
    test: int = 1000,
    seed: int = 0,
) -> Split:
    """Hold out whole users: the first half of a user's positive events is the history, the second what is asked for.

    The protocol of TDM (arXiv 1801.02294, section 4.1), which GRank's public results follow. Only ratings from
    `positive` on count as events; users with fewer than `least` of them take no part. Items keep their ids, so that
    an item without any positive event is a row of the corpus that nobody ever wants.

    Args:
        interactions: what a reader returned.
        positive: the least rating that is an event; every row is one where there are no ratings.
        least: events that a user must have.
        validation: users held out for validation.
        test: users held out for the test.
        seed: of the draw of users.

    Raises:
        ValueError: fewer users than are to be held out.
    """
    events = all_histories(interactions, positive)
    kept = events.feedback.nonzero().squeeze(1)
    counts = torch.zeros(len(events), dtype=torch.int64).index_add_(0, events.users[kept], torch.ones_like(kept))
    offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    events = Histories(offsets, events.items[kept], events.feedback[kept])
    users = (counts >= least).nonzero().squeeze(1)
    if len(users) <= validation + test:
        raise ValueError(
            f"validation and test must leave users to train on, got {validation} + {test} of {len(users)} users with "
            f"at least {least} events"
        )
    users = users[torch.randperm(len(users), generator=torch.Generator().manual_seed(seed))]
    parts = torch.split(users, [validation, test, len(users) - validation - test])

    def cases(chosen: Tensor) -> Cases:
        chosen = chosen.sort().values
        starts, stops = events.offsets[chosen], events.offsets[chosen + 1]
        middle = starts + (stops - starts) // 2
        return Cases(chosen, events.cut(starts, middle), events.cut(middle, stops))

    return Split(interactions.num_items, events.select(parts[2].sort().values), cases(parts[0]), cases(parts[1]))


def all_histories(interactions: Interactions, positive: float) -> Histories:
    """Of every user all rows, liked from the rating `positive` on; all of them where there are no ratings."""
    liked = torch.ones(len(interactions), dtype=torch.bool)
    if not interactions.implicit:
        liked = interactions.ratings >= positive
    return Histories(interactions.offsets, interactions.items, liked)
