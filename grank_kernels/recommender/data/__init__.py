"""Readers of published data sets, splits, and batches of padded tensors."""

from grank_kernels.recommender.data.arrays import read_arrays
from grank_kernels.recommender.data.batching import TrainingWindows
from grank_kernels.recommender.data.datasets import DATASETS, Dataset, read
from grank_kernels.recommender.data.histories import Batch, Histories
from grank_kernels.recommender.data.interactions import BEHAVIOURS, Interactions
from grank_kernels.recommender.data.movielens import read_movielens_1m, read_movielens_20m, read_movielens_100k
from grank_kernels.recommender.data.shops import read_amazon, read_user_behavior
from grank_kernels.recommender.data.splits import Cases, Split, all_histories, half_and_half, leave_one_out

__all__ = [
    "BEHAVIOURS",
    "DATASETS",
    "Batch",
    "Cases",
    "Dataset",
    "Histories",
    "Interactions",
    "Split",
    "TrainingWindows",
    "all_histories",
    "half_and_half",
    "leave_one_out",
    "read",
    "read_amazon",
    "read_arrays",
    "read_movielens_1m",
    "read_movielens_20m",
    "read_movielens_100k",
    "read_user_behavior",
]
