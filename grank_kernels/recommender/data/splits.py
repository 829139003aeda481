"""Splits of interactions into training histories and evaluation cases."""

from dataclasses import dataclass

import torch
from torch import Tensor

from grank_kernels.recommender.data.histories import Histories
from grank_kernels.recommender.data.interactions import Interactions

REPEATS = ("keep", "first", "last")
"""Policies for rows in which a user meets an item again; see `leave_one_out`."""


@dataclass(frozen=True)
class Cases:
    """Evaluation cases: for each of B users a history, which the model reads, and the targets after it.

    Attributes:
        users: (B,) int64, numbers of the users.
        histories: B histories.
        targets: B lists of items, one item or more each. As a set: an item that occurs twice is one target.
    """

    users: Tensor
    histories: Histories
    targets: Histories

    def __len__(self) -> int:
        return len(self.users)

    def select(self, cases: Tensor) -> "Cases":
        """The cases with these numbers, (n,) int64, or where a bool mask (B,) is True, in this order."""
        return Cases(self.users[cases], self.histories.select(cases), self.targets.select(cases))

    @property
    def targets_in_history(self) -> Tensor:
        """(n,) bool for n targets: whether the item is in the history of its case.

        Retrieval excludes the history, so such a target is never hit.
        """
        own, seen = self.targets, self.histories
        width = 1 + max((int(x.items.max()) for x in (own, seen) if len(x.items)), default=0)
        return torch.isin(own.users * width + own.items, seen.users * width + seen.items)


@dataclass(frozen=True)
class Split:
    """Training histories and the cases of validation and test; every item of the corpus is a candidate.

    Attributes:
        num_items: size of the corpus.
        train: histories that training reads.
        validation: cases for the choice of the epoch and of settings.
        test: cases for the report.
        dropped_rows: number of repeated rows that the policy `repeats` dropped.
    """

    num_items: int
    train: Histories
    validation: Cases
    test: Cases
    dropped_rows: int = 0


def leave_one_out(interactions: Interactions, *, positive: float = 4.0, repeats: str = "keep") -> Split:
    """Hold out each user's last item for the test and the one before it for validation.

    The protocol of SASRec, HSTU and UniGRF (arXiv 2504.16454, section 4.1). The history of a test case includes the
    validation item; training sees neither. Users with fewer than three rows are trained on whole and have no case.

    Args:
        interactions: what a reader returned.
        positive: lowest rating that is positive feedback; without ratings all feedback is positive. Does not affect
            what is held out.
        repeats: policy for rows in which a user meets an item again. "keep": all rows stay, and a target may be in its
            own history (`Cases.targets_in_history`), where it is never hit. "first" or "last": only the user's first or
            last row of an item stays, before anything is held out, so every target can be hit. The policies agree on
            data without repeats.

    Raises:
        ValueError: `repeats` is none of the policies.
    """
    rows, dropped = _without_repeats(all_histories(interactions, positive), interactions.num_items, repeats)
    held_out = rows.lengths >= 3
    users = held_out.nonzero().squeeze(1)
    begins, ends = rows.offsets[:-1], rows.offsets[1:]

    def cases(behind: int) -> Cases:
        """The cases whose target has `behind - 1` items behind it."""
        stops = ends[users] - behind
        return Cases(users, rows.cut(begins[users], stops), rows.cut(stops, stops + 1))

    train = rows.cut(begins, ends - 2 * held_out.long())
    return Split(interactions.num_items, train, cases(2), cases(1), dropped)


def half_and_half(
    interactions: Interactions,
    *,
    positive: float = 4.0,
    least: int = 10,
    validation: int = 1000,
    test: int = 1000,
    seed: int = 0,
    repeats: str = "keep",
) -> Split:
    """Hold out whole users: the first half of a user's positive events is the history, the second half the targets.

    The protocol of TDM (arXiv 1801.02294, section 4.1), which GRank's public results follow. Items keep their numbers,
    so an item without a positive event is in the corpus and is never a target.

    Args:
        interactions: what a reader returned.
        positive: lowest rating that is an event; without ratings every row is one.
        least: number of events that a user needs to take part.
        validation: number of users held out for validation.
        test: number of users held out for the test.
        seed: seed of the draw of users.
        repeats: policy for events in which a user meets an item again; see `leave_one_out`.

    Raises:
        ValueError: too few users, or `repeats` is none of the policies.
    """
    rows = all_histories(interactions, positive)
    events, dropped = _without_repeats(_where(rows, rows.feedback), interactions.num_items, repeats)
    users = (events.lengths >= least).nonzero().squeeze(1)
    if len(users) <= validation + test:
        raise ValueError(
            f"validation and test must leave users to train on, got {validation} + {test} of {len(users)} users with "
            f"at least {least} events"
        )
    users = users[torch.randperm(len(users), generator=torch.Generator().manual_seed(seed))]
    of_validation, of_test, of_training = (
        part.sort().values for part in torch.split(users, [validation, test, len(users) - validation - test])
    )

    def cases(chosen: Tensor) -> Cases:
        starts, stops = events.offsets[chosen], events.offsets[chosen + 1]
        middle = starts + (stops - starts) // 2
        return Cases(chosen, events.cut(starts, middle), events.cut(middle, stops))

    return Split(interactions.num_items, events.select(of_training), cases(of_validation), cases(of_test), dropped)


def all_histories(interactions: Interactions, positive: float) -> Histories:
    """All rows of every user; feedback is positive from the rating `positive` on, or everywhere without ratings."""
    liked = torch.ones(len(interactions), dtype=torch.bool)
    if not interactions.implicit:
        liked = interactions.ratings >= positive
    return Histories(interactions.offsets, interactions.items, liked)


def _where(histories: Histories, kept: Tensor) -> Histories:
    """The histories without the rows where a bool mask (n,) is False."""
    sums = torch.cat([kept.new_zeros(1, dtype=torch.int64), kept.cumsum(0)])
    return Histories(sums[histories.offsets], histories.items[kept], histories.feedback[kept])


def _without_repeats(histories: Histories, num_items: int, repeats: str) -> tuple[Histories, int]:
    """The histories under a policy of `REPEATS`, and the number of rows that it dropped."""
    if repeats not in REPEATS:
        raise ValueError(f"repeats must be one of {', '.join(REPEATS)}, got {repeats!r}")
    if repeats == "keep":
        return histories, 0
    pairs = histories.users * num_items + histories.items
    if repeats == "last":
        pairs = pairs.flip(0)
    ordered, rows = pairs.sort(stable=True)
    kept = torch.ones(len(pairs), dtype=torch.bool)
    kept[rows[1:][ordered[1:] == ordered[:-1]]] = False
    if repeats == "last":
        kept = kept.flip(0)
    return _where(histories, kept), len(kept) - int(kept.sum())
