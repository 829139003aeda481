"""Reference models in plain PyTorch."""

from grank_kernels.models.grank import Generator, GRank, Ranker
from grank_kernels.models.recommender import Recommender
from grank_kernels.models.sequential import Sequential, SequentialConfig
from grank_kernels.models.unigrf import UniGRF, UniGRFConfig

__all__ = [
    "GRank",
    "Generator",
    "Ranker",
    "Recommender",
    "Sequential",
    "SequentialConfig",
    "UniGRF",
    "UniGRFConfig",
]
