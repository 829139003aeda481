"""Readers, splits and batches: from the files their owners publish to padded tensors."""

from grank_kernels.data.batching import TrainingWindows
from grank_kernels.data.histories import Batch, Histories
from grank_kernels.data.interactions import Interactions
from grank_kernels.data.movielens import read_movielens_100k
from grank_kernels.data.splits import Cases, Split, half_and_half, leave_one_out

__all__ = [
    "Batch",
    "Cases",
    "Histories",
    "Interactions",
    "Split",
    "TrainingWindows",
    "half_and_half",
    "leave_one_out",
    "read_movielens_100k",
]
