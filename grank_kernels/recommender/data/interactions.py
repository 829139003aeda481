"""`Interactions`: the result of every reader."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from grank_kernels.common.arrays import as_tensor
from grank_kernels.recommender.data.columns import (
    Columns,
    Numbered,
    checked_ids,
    checked_ratings,
    checked_timestamps,
)

BEHAVIOURS = ("pv", "buy", "cart", "fav")
"""The kinds of `Interactions.behaviours`: page view, purchase, addition to the cart, addition to the favourites."""

_ROWS = 1 << 22  # rows sorted at a time, in 100 MB of working memory


@dataclass(frozen=True)
class Interactions:
    """User-item interactions with timestamps and ratings: the result of every reader.

    Rows are sorted by (user, timestamp, row of the file). The sort is stable: many MovieLens timestamps are equal, and
    the held-out last item must not depend on the sort. Users and items are dense numbers in the order of their ids.

    Attributes:
        items: (n,) int64, in [0, num_items).
        timestamps: (n,) int64, ascending within a user; the row of the file if the file has no timestamps.
        ratings: (n,) float32; all 1, in 4 bytes of memory, if the file has no ratings.
        offsets: (num_users + 1,) int64: the rows of user u are `offsets[u]:offsets[u + 1]`.
        user_ids: (num_users,): the id of each user in the file.
        item_ids: (num_items,): the id of each item in the file.
        implicit: whether the file has no ratings (implicit feedback).
        behaviours: (n,) int8, positions in `BEHAVIOURS`; None if the file has none.
        names: original item id -> title; items may be missing.
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
        """Number of users with at least one row."""
        return len(self.user_ids)

    @property
    def num_items(self) -> int:
        """Number of items with at least one row: the corpus of an evaluation."""
        return len(self.item_ids)

    @property
    def users(self) -> Tensor:
        """(n,) int64, ascending, in [0, num_users); computed from the offsets at each access."""
        return torch.arange(self.num_users).repeat_interleave(self.offsets.diff())

    @cached_property
    def titles(self) -> tuple[str, ...]:
        """The title of each item, `item <id>` for an item without one."""
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
            users: (n,) ids, integers or strings.
            items: (n,) ids, integers of 0 or more, or strings.
            timestamps: (n,) integers; None if the rows are in the order of time already.
            ratings: (n,) finite numbers, or None.
            titles: original item id -> title.

        Raises:
            TypeError: `titles` is no mapping to strings.
            ValueError: columns of different lengths, a value that does not fit (the message names column and row), or
                titles of which none names an item.
        """
        if titles is not None:
            _check_titles(titles)
        columns: Columns = {"user": checked_ids("users", users, negative=True), "item": checked_ids("items", items)}
        if timestamps is not None:
            columns["timestamp"] = checked_timestamps("timestamps", timestamps)
        if ratings is not None:
            columns["rating"] = checked_ratings("ratings", ratings)
        lengths = {f"{name}s": len(column) for name, column in columns.items()}
        if len(set(lengths.values())) != 1:
            raise ValueError(f"{', '.join(lengths)} must be columns of one length, got {list(lengths.values())}")
        taken = cls.take(columns, titles)
        if titles and len(taken) and not any(item in titles for item in taken.item_ids.tolist()):
            key, item = next(iter(titles)), taken.item_ids.tolist()[0]
            raise ValueError(f"titles must have item ids as keys, such as {item!r}, got keys such as {key!r}")
        return taken

    @classmethod
    def take(cls, columns: Columns, titles: Mapping[Any, str] | None = None) -> "Interactions":
        """`from_columns` of validated columns, each removed from `columns` so that its memory is freed after its use.

        With columns of four bytes, at most 29 bytes a row are held at once.

        Args:
            columns: `user` and `item`, numbered or not, and optionally `timestamp`, `rating` and `behaviour`, all (n,).
            titles: original item id -> title.

        Raises:
            ValueError: 2^31 rows or more, which int32 row numbers do not reach.
        """

        def numbered(name: str) -> Numbered:
            column = columns.pop(name)
            return column if isinstance(column, Numbered) else Numbered.of(column)

        def sorted_rows(name: str, dtype: torch.dtype) -> Tensor | None:
            column: Any = columns.pop(name, None)
            if column is None:
                return None
            if column.dtype.kind == "u":  # torch has few ops on unsigned integers
                column = column.astype(np.int64)
            return cast(Tensor, as_tensor(name, column)).index_select(0, order).to(dtype)

        user_ids, users = numbered("user")
        item_ids, items = numbered("item")
        if len(users) >= 1 << 31:
            raise ValueError(f"columns must have fewer than 2^31 rows, got {len(users)}")
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
    """The rows sorted by (user, timestamp, row), (n,) int32, in chunks of whole users."""
    n, numbers = len(users), users.numpy()
    cuts = np.unique(np.searchsorted(offsets.numpy(), np.arange(_ROWS, n, _ROWS))).tolist()
    order = np.empty(n, np.int32)
    for first, stop in zip([0, *cuts], [*cuts, len(offsets) - 1], strict=True):
        rows = np.flatnonzero((numbers >= first) & (numbers < stop)).astype(np.int32)
        keys = (numbers[rows],) if timestamps is None else (timestamps[rows], numbers[rows])
        order[offsets[first] : offsets[stop]] = rows[np.lexsort(keys)]  # stable
    return torch.from_numpy(order)


def _check_titles(titles: Any) -> None:
    if not isinstance(titles, Mapping):
        raise TypeError(
            f"titles must be a mapping of item id to title, got {type(titles).__name__}; "
            "dict(zip(items, titles)) makes one"
        )
    for item, title in titles.items():
        if not isinstance(title, str):
            raise TypeError(f"titles must be strings, got {title!r} for item {item!r}")
