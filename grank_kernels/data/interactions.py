"""`Interactions`: the one type that every reader returns."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor


@dataclass(frozen=True)
class Interactions:
    """Who met which item, when, and what they thought of it: the one type every reader returns.

    Rows are sorted by (user, timestamp, row of the file), stably: many MovieLens timestamps are equal, and an unstable
    sort would change what comes last. Users and items are dense ids in the order of the original ids.

    Attributes:
        users: (n,) int64, ascending, in [0, num_users).
        items: (n,) int64, in [0, num_items).
        timestamps: (n,) int64, ascending within a user.
        ratings: (n,) float32.
        offsets: (num_users + 1,) int64: the rows of user u are `offsets[u]:offsets[u + 1]`.
        user_ids: (num_users,): the id of each user in the file.
        item_ids: (num_items,): the id of each item in the file.
        titles: a readable name of each item, `item <id>` where none is known.
    """

    users: Tensor
    items: Tensor
    timestamps: Tensor
    ratings: Tensor
    offsets: Tensor
    user_ids: npt.NDArray[Any]
    item_ids: npt.NDArray[Any]
    titles: tuple[str, ...]

    @property
    def num_users(self) -> int:
        """Users with at least one row."""
        return len(self.user_ids)

    @property
    def num_items(self) -> int:
        """Items with at least one row: the full corpus of an evaluation."""
        return len(self.item_ids)

    def __len__(self) -> int:
        return len(self.items)

    @classmethod
    def from_columns(
        cls,
        users: npt.ArrayLike,
        items: npt.ArrayLike,
        timestamps: npt.ArrayLike,
        ratings: npt.ArrayLike,
        titles: Mapping[Any, str] | None = None,
    ) -> "Interactions":
        """Sort the columns of a file and give users and items dense ids.

        Args:
            users: (n,) ids of any sortable type.
            items: (n,) ids of any sortable type.
            timestamps: (n,) integers.
            ratings: (n,) numbers.
            titles: original item id -> name.
        """
        columns = [np.asarray(column) for column in (users, items, timestamps, ratings)]
        shapes = [column.shape for column in columns]
        if columns[0].ndim != 1 or len(set(shapes)) != 1:
            raise ValueError(f"users, items, timestamps and ratings must be (n,) columns of one length, got {shapes}")
        user_ids, dense_users = np.unique(columns[0], return_inverse=True)
        item_ids, dense_items = np.unique(columns[1], return_inverse=True)
        order = np.lexsort((columns[2], dense_users))  # stable: equal timestamps keep the order of the file
        counts = np.bincount(dense_users, minlength=len(user_ids))
        known = titles or {}
        return cls(
            users=torch.from_numpy(dense_users[order].astype(np.int64)),
            items=torch.from_numpy(dense_items[order].astype(np.int64)),
            timestamps=torch.from_numpy(columns[2][order].astype(np.int64)),
            ratings=torch.from_numpy(columns[3][order].astype(np.float32)),
            offsets=torch.from_numpy(np.concatenate(([0], np.cumsum(counts))).astype(np.int64)),
            user_ids=user_ids,
            item_ids=item_ids,
            titles=tuple(known.get(item, f"item {item}") for item in item_ids.tolist()),
        )
