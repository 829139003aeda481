"""Reference models in plain PyTorch."""

from grank_kernels.models.dual_tower import DualTower, DualTowerConfig
from grank_kernels.models.embedding_model import EmbeddingModel
from grank_kernels.models.grank import GRank, GRankConfig
from grank_kernels.models.ranker import FoldedRanker, Ranker
from grank_kernels.models.recommender import Recommender
from grank_kernels.models.sequential import Sequential, SequentialConfig
from grank_kernels.models.unigrf import UniGRF, UniGRFConfig

__all__ = [
    "DualTower",
    "DualTowerConfig",
    "EmbeddingModel",
    "FoldedRanker",
    "GRank",
    "GRankConfig",
    "Ranker",
    "Recommender",
    "Sequential",
    "SequentialConfig",
    "UniGRF",
    "UniGRFConfig",
]
