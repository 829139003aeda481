"""Damaged data files: every reader returns valid interactions or raises an error that names the file."""

import gzip
import io
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from grank_kernels.recommender.data import (
    Interactions,
    read_amazon,
    read_arrays,
    read_movielens_1m,
    read_movielens_20m,
    read_movielens_100k,
    read_user_behavior,
)

pytestmark = pytest.mark.slow

LINES = 40


def text(separator: str, *columns: str, header: str = "") -> bytes:
    rows = (separator.join(column.format(row=row, item=row * 7 % 9) for column in columns) for row in range(LINES))
    return (header + "\n".join(rows) + "\n").encode()


def npz(compressed: bool, ids: str) -> bytes:
    file = io.BytesIO()
    rows = np.arange(LINES)
    save = np.savez_compressed if compressed else np.savez
    save(file, user=(rows // 4).astype(ids), item=(rows * 7 % 9).astype(ids), timestamp=rows, rating=rows * 0.5)
    return file.getvalue()


USER_BEHAVIOR = text(",", "{row}", "{item}", "5", "buy", "{row}")
FILES: dict[str, tuple[str, Callable[[Path], Interactions], bytes]] = {
    "ml-100k": ("u.data", read_movielens_100k, text("\t", "{row}", "{item}", "3", "{row}")),
    "ml-1m": ("ratings.dat", read_movielens_1m, text("::", "{row}", "{item}", "3", "{row}")),
    "ml-20m": (
        "ratings.csv",
        read_movielens_20m,
        text(",", "{row}", "{item}", "3.5", "{row}", header="userId,movieId,rating,timestamp\n"),
    ),
    "user-behavior": ("UserBehavior.csv", read_user_behavior, USER_BEHAVIOR),
    "user-behavior, gzip": ("UserBehavior.csv.gz", read_user_behavior, gzip.compress(USER_BEHAVIOR)),
    "amazon": ("ratings_x.csv", read_amazon, text(",", "A{row}", "B{item}", "4.0", "{row}")),
    "arrays": ("a.npz", read_arrays, npz(compressed=False, ids="i4")),
    "arrays, compressed": ("a.npz", read_arrays, npz(compressed=True, ids="i8")),
    "arrays of strings": ("a.npz", read_arrays, npz(compressed=False, ids="U3")),
}


def damaged(content: bytes, draw: random.Random) -> bytes:
    """One to three of: a byte changed, a stretch removed, repeated or replaced by noise, the end cut off."""
    changed = bytearray(content)
    for _ in range(draw.randint(1, 3)):
        start = draw.randrange(len(changed))
        stop = min(len(changed), start + draw.choice([1, 2, 8, 64]))
        kind = draw.choice(["flip", "remove", "repeat", "noise", "cut"])
        if kind == "flip":
            changed[start] ^= 1 << draw.randrange(8)
        elif kind == "remove":
            del changed[start:stop]
        elif kind == "repeat":
            changed[start:start] = changed[start:stop]
        elif kind == "noise":
            changed[start:stop] = draw.randbytes(stop - start)
        else:
            del changed[max(1, start) :]
        if not changed:
            return b"\0"
    return bytes(changed)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("name", FILES)
def test_damage_is_read_or_refused(name: str, seed: int, tmp_path: Path) -> None:
    file, read, content = FILES[name]
    path, draw = tmp_path / file, random.Random(seed)
    path.write_bytes(content)
    assert len(read(path)) == LINES
    refused = []
    for _ in range(150):
        path.write_bytes(damaged(content, draw))
        try:
            data = read(path)
        except ValueError as error:
            refused.append(str(error))
            continue
        assert data.offsets[-1] == len(data.items) == len(data.timestamps) == len(data.ratings)
        assert ((data.items >= 0) & (data.items < data.num_items)).all()
        assert torch.isfinite(data.ratings).all()
    assert refused
    assert all(file in message for message in refused)
