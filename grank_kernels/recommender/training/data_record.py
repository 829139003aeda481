"""What a run records of its data: item ids, titles, facts about the columns and a digest. Needs no trainer."""

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import torch
import xxhash
from pyarrow import parquet

from grank_kernels.common.atomic_files import replace_file, write_text
from grank_kernels.recommender.data import Interactions, Split
from grank_kernels.recommender.data.columns import checked_ids
from grank_kernels.recommender.training.checkpoint import update_digest
from grank_kernels.recommender.training.run_folder import DATA, ITEMS

_KINDS = {"i": "integers", "u": "integers"}  # NumPy's kinds of dtypes; all others are strings


@dataclass(frozen=True)
class DataRecord:
    """Facts about the interactions of a run.

    Attributes:
        users: number of users.
        items: number of items.
        rows: number of interactions.
        user_ids: "integers" or "strings".
        item_ids: "integers" or "strings".
        ratings: whether the data has ratings.
        behaviours: whether the data has behaviours.
        xxh3_128: digest of ids and interactions.
    """

    users: int
    items: int
    rows: int
    user_ids: str
    item_ids: str
    ratings: bool
    behaviours: bool
    xxh3_128: str

    @classmethod
    def of(cls, interactions: Interactions) -> "DataRecord":
        """The facts about interactions."""
        return cls(
            users=interactions.num_users,
            items=interactions.num_items,
            rows=len(interactions),
            user_ids=_KINDS.get(interactions.user_ids.dtype.kind, "strings"),
            item_ids=_KINDS.get(interactions.item_ids.dtype.kind, "strings"),
            ratings=not interactions.implicit,
            behaviours=interactions.behaviours is not None,
            xxh3_128=_digest(interactions),
        )

    @classmethod
    def load(cls, path: Path) -> "DataRecord":
        """Read what `save_data` has written.

        Raises:
            FileNotFoundError: the file does not exist.
            ValueError: the file holds something else.
        """
        if not path.is_file():
            raise FileNotFoundError(
                f"{path} does not exist: the run keeps no record of its data, train it in a new folder"
            )
        try:
            record = cls(**json.loads(path.read_text(encoding="utf-8")))
        except (RecursionError, TypeError, ValueError) as error:
            raise ValueError(f"{path}: expected the record of a run's data, got {error}") from None
        return record


def save_data(folder: Path, interactions: Interactions) -> None:
    """Write `items.parquet` and `data.json` into the folder of a run."""
    titles = {"title": interactions.titles} if interactions.names else {}
    with replace_file(folder / ITEMS) as file:
        parquet.write_table(pyarrow.table({"id": interactions.item_ids} | titles), file)
    write_text(folder / DATA, json.dumps(asdict(DataRecord.of(interactions)), indent=2) + "\n")


def checked_data(folder: Path, interactions: Interactions, *, data_changed: bool = False) -> Interactions:
    """The interactions, if they are those that the run in a folder was trained on.

    Args:
        folder: folder of a run.
        interactions: the data as it is now.
        data_changed: accept other interactions, and return those with items of the run, in the run's item numbers.

    Raises:
        FileNotFoundError: the folder has no record of its data.
        ValueError: the interactions have changed; the message says how.
    """
    record, now = DataRecord.load(folder / DATA), DataRecord.of(interactions)
    if now == record:
        return interactions
    item_ids = _item_ids(folder / ITEMS)
    if not data_changed:
        changes = _changes(record, now, item_ids, interactions)
        raise ValueError(
            f"data must be the interactions of the run in {folder}, got others: {changes}; "
            "data_changed=True (--data-changed) goes on with the items that both have"
        )
    return _renumbered(interactions, item_ids)


def digest_of_split(split: Split) -> str:
    """XXH3 (128 bits) of the training and validation parts of a split."""
    cases = split.validation
    parts = (split.train, cases.histories, cases.targets)
    hasher = xxhash.xxh3_128(str(split.num_items).encode())
    for part in parts:
        for tensor in (part.offsets, part.items, part.feedback):
            update_digest(hasher, tensor)
    return hasher.hexdigest()


def _digest(interactions: Interactions) -> str:
    hasher = xxhash.xxh3_128()
    for ids in (interactions.user_ids, interactions.item_ids):
        if ids.dtype.kind in "iu":
            update_digest(hasher, torch.from_numpy(ids.astype(np.int64)))
        else:
            hasher.update("\0".join(map(str, ids.tolist())).encode(errors="surrogateescape"))
    optional = (None if interactions.implicit else interactions.ratings, interactions.behaviours)
    for tensor in (interactions.offsets, interactions.items, interactions.timestamps, *optional):
        if tensor is None:
            hasher.update(b"none")
        else:
            update_digest(hasher, tensor)
    return hasher.hexdigest()


def _item_ids(path: Path) -> list[Any]:
    try:
        ids: list[Any] = parquet.read_table(path, columns=["id"]).column("id").to_pylist()
    except (pyarrow.ArrowException, KeyError, OSError) as error:
        raise ValueError(f"{path}: expected a Parquet file of item ids, got {error}") from None
    return ids


def _changes(record: DataRecord, now: DataRecord, item_ids: list[Any], interactions: Interactions) -> str:
    """The differences in words."""
    before, after = set(item_ids), set(interactions.item_ids.tolist())
    words = [
        f"{len(items)} items {verb} ({', '.join(sorted(map(str, items))[:3])}{', ...' if len(items) > 3 else ''})"
        for verb, items in (("are gone", before - after), ("are new", after - before))
        if items
    ]
    words += [
        f"{name} {getattr(record, name)} before and {getattr(now, name)} now"
        for name in ("users", "rows", "user_ids", "item_ids", "ratings", "behaviours")
        if getattr(record, name) != getattr(now, name)
    ]
    return ", ".join(words) or "as many users, items and rows, with other values"


def _renumbered(interactions: Interactions, item_ids: list[Any]) -> Interactions:
    """The rows whose items are in `item_ids`, numbered by their position there; without users of no row."""
    numbers = {name: number for number, name in enumerate(item_ids)}
    of_items = torch.tensor([numbers.get(name, -1) for name in interactions.item_ids.tolist()], dtype=torch.int64)
    items = of_items[interactions.items]
    kept = items >= 0
    counts = torch.bincount(interactions.users[kept], minlength=interactions.num_users)
    present = counts > 0
    return replace(
        interactions,
        items=items[kept],
        timestamps=interactions.timestamps[kept],
        ratings=interactions.ratings[kept],
        behaviours=None if interactions.behaviours is None else interactions.behaviours[kept],
        offsets=torch.cat([counts.new_zeros(1), counts[present].cumsum(0)]),
        user_ids=interactions.user_ids[present.numpy()],
        item_ids=checked_ids("item ids", item_ids),  # NumPy would make floats of integers on both sides of 2^63
    )
