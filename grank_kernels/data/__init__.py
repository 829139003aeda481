"""Readers, splits and batches: from the files their owners publish to padded tensors."""

from grank_kernels.data.batching import TrainingWindows, last_items
from grank_kernels.data.interactions import Interactions
from grank_kernels.data.movielens import read_movielens_100k
from grank_kernels.data.splits import Cases, LeaveOneOut, leave_one_out

__all__ = [
    "Cases",
    "Interactions",
    "LeaveOneOut",
    "TrainingWindows",
    "last_items",
    "leave_one_out",
    "read_movielens_100k",
]
