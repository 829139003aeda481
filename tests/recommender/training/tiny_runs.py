"""A tiny corpus in a file, and settings of a training that takes a second."""

from pathlib import Path

import numpy as np

SETTINGS = """
model: grank
settings: {{dim: 16, short_history: 8, long_history: 12, hidden: 16, negatives: 8}}
data: {{name: arrays, path: {data}}}
training: {{epochs: 2, targets: 8, context: 4, batch_items: 256, learning_rate: 0.01}}
k1: [20]
"""


def write_circle(
    path: Path, users: int = 30, items: int = 40, length: int = 16, renamed: dict[int, int] | None = None
) -> Path:
    """Users who take the items in turns, each from a start of their own, and like every third.

    `renamed` gives items other ids, which changes the order of the ids but nothing else.
    """
    who = np.arange(users).repeat(length)
    what = (7 * who + np.tile(np.arange(length), users)) % items
    ids = np.array([(renamed or {}).get(item, item) for item in range(1, items + 1)])
    np.savez(path, user=who + 100, item=ids[what], timestamp=np.arange(len(who)), rating=np.where(what % 3, 2.0, 5.0))
    return path
