"""`Interactions`: the one type that every reader returns."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

BEHAVIOURS = ("pv", "buy", "cart", "fav")
"""What `Interactions.behaviours` counts through: page view, purchase, put into the cart, marked as a favourite."""

_ROWS = 1 << 22  # sorted at a time: working memory of 100 MB, whatever the size of the file


class Numbered(NamedTuple):
    """A column of ids as positions in the sorted list of them.

    Attributes:
        ids: (m,) ascending, each one found in the column.
        numbers: (n,) int32: row r holds `ids[numbers[r]]`.
    """

    ids: npt.NDArray[Any]
    numbers: Tensor

    @classmethod
    def of(cls, column: npt.NDArray[Any]) -> "Numbered":
        """Number a column of any sortable type."""
        if column.dtype.kind in "iu" and len(column):
            if column.dtype.itemsize < 4:
                column = column.astype(np.int32)
            low, high = int(column.min()), int(column.max())
            most = min(4 * len(column) + (1 << 16), 1 << 31)
            if high - low < most and high < 1 << 62:  # as nearly all ids are: no sort, no column of int64
                above = torch.from_numpy(column - low if low else column).to(torch.int32)
                seen = torch.bincount(above) > 0
                ids = seen.nonzero().squeeze(1).numpy() + low
                return cls(ids, seen.cumsum(0, dtype=torch.int32).sub_(1).index_select(0, above))
        ids, numbers = np.unique(column, return_inverse=True)
        return cls(ids, torch.from_numpy(numbers.astype(np.int32)))


Columns: TypeAlias = dict[str, npt.NDArray[Any] | Numbered]


@dataclass(frozen=True)
class Interactions:
    """Who met which item, when, and what they thought of it: the one type every reader returns.

    Rows are sorted by (user, timestamp, row of the file), stably: many MovieLens timestamps are equal, and an unstable
    sort would change what comes last. Users and items are dense numbers in the order of the original ids.

    Attributes:
        items: (n,) int64, in [0, num_items).
        timestamps: (n,) int64, ascending within a user; the row of the file where the file has no times.
        ratings: (n,) float32; 1 where the file has no ratings, at no cost in memory.
        offsets: (num_users + 1,) int64: the rows of user u are `offsets[u]:offsets[u + 1]`.
        user_ids: (num_users,): the id of each user in the file.
        item_ids: (num_items,): the id of each item in the file.
        implicit: whether the file has no ratings, so that being there is all that a row says.
        behaviours: (n,) int8, positions in `BEHAVIOURS`, where the file tells them; else None.
        names: original item id -> title, as far as known.
    """

    items: Tensor
    timestamps: Tensor
    ratings: Tensor
    offsets: Tensor
    user_ids: npt.NDArray[Any]
    item_ids: npt.NDArray[Any]
    implicit: bool = False
    behaviours: Tensor | None = None
    names: Mapping[Any, str] = field(default_factory=dict)

    @property
    def num_users(self) -> int:
        """Users with at least one row."""
        return len(self.user_ids)

    @property
    def num_items(self) -> int:
        """Items with at least one row: the full corpus of an evaluation."""
        return len(self.item_ids)

    @property
    def users(self) -> Tensor:
        """(n,) int64, ascending, in [0, num_users): made of the offsets each time."""
        return torch.arange(self.num_users).repeat_interleave(self.offsets.diff())

    @cached_property
    def titles(self) -> tuple[str, ...]:
        """A readable name of each item, `item <id>` where none is known."""
        return tuple(self.names.get(item, f"item {item}") for item in self.item_ids.tolist())

    def __len__(self) -> int:
        return len(self.items)

    @classmethod
    def from_columns(
        cls,
        users: npt.ArrayLike,
        items: npt.ArrayLike,
        timestamps: npt.ArrayLike | None = None,
        ratings: npt.ArrayLike | None = None,
        titles: Mapping[Any, str] | None = None,
    ) -> "Interactions":
        """Sort the columns of a file and give users and items dense numbers.

        Args:
            users: (n,) ids of any sortable type.
            items: (n,) ids of any sortable type.
            timestamps: (n,) integers; None if the rows are in the order of time already.
            ratings: (n,) numbers, or None.
            titles: original item id -> name.

        Raises:
            ValueError: columns of different lengths or of more than one dimension, or of a type that does not fit.
        """
        given = {"user": users, "item": items, "timestamp": timestamps, "rating": ratings}
        columns: Columns = {name: np.asarray(column) for name, column in given.items() if column is not None}
        shapes = [np.shape(column) for column in columns.values()]
        if len(shapes[0]) != 1 or len(set(shapes)) != 1:
            raise ValueError(f"{', '.join(f'{name}s' for name in columns)} must be columns of one length, got {shapes}")
        for name, kinds, takes in (("timestamp", "iu", "integers"), ("rating", "iuf", "numbers")):
            dtype = np.asarray(columns.get(name, 0)).dtype
            if dtype.kind not in kinds:
                raise ValueError(f"{name}s are {dtype}; they take {takes}")
        return cls.take(columns, titles)

    @classmethod
    def take(cls, columns: Columns, titles: Mapping[Any, str] | None = None) -> "Interactions":
        """As `from_columns`, but every column is taken out of `columns`, so that its memory is free after its use.

        Of columns of four bytes, at most 29 bytes a row are held at once.

        Args:
            columns: `user` and `item`, numbered or not, and perhaps `timestamp`, `rating` and `behaviour`, all (n,).
            titles: original item id -> name.
        """

        def numbered(name: str) -> Numbered:
            column = columns.pop(name)
            return column if isinstance(column, Numbered) else Numbered.of(column)

        def sorted_rows(name: str, dtype: torch.dtype) -> Tensor | None:
            column: Any = columns.pop(name, None)
            if column is None:
                return None
            if column.dtype.kind == "u":  # which torch can hold, but hardly work with
                column = column.astype(np.int64)
            return torch.from_numpy(column).index_select(0, order).to(dtype)

        user_ids, users = numbered("user")
        item_ids, items = numbered("item")
        offsets = torch.cat(
            [torch.zeros(1, dtype=torch.int64), torch.bincount(users, minlength=len(user_ids)).cumsum(0)]
        )
        order = _order(users, offsets, columns.get("timestamp"))
        del users
        items = items.index_select(0, order).long()
        timestamps = sorted_rows("timestamp", torch.int64)
        ratings = sorted_rows("rating", torch.float32)
        return cls(
            items=items,
            timestamps=order.long() if timestamps is None else timestamps,
            ratings=torch.ones(1).expand(len(items)) if ratings is None else ratings,
            offsets=offsets,
            user_ids=user_ids,
            item_ids=item_ids,
            implicit=ratings is None,
            behaviours=sorted_rows("behaviour", torch.int8),
            names=titles or {},
        )


def _order(users: Tensor, offsets: Tensor, timestamps: Any) -> Tensor:
    """The rows by (user, timestamp, row), int32: a few million rows at a time, each time all those of some users."""
    n, numbers = len(users), users.numpy()
    cuts = np.unique(np.searchsorted(offsets.numpy(), np.arange(_ROWS, n, _ROWS))).tolist()
    order = np.empty(n, np.int32)
    for first, stop in zip([0, *cuts], [*cuts, len(offsets) - 1], strict=True):
        rows = np.flatnonzero((numbers >= first) & (numbers < stop)).astype(np.int32)
        keys = (numbers[rows],) if timestamps is None else (timestamps[rows], numbers[rows])
        order[offsets[first] : offsets[stop]] = rows[np.lexsort(keys)]  # stable
    return torch.from_numpy(order)
