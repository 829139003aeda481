"""Reference models in plain PyTorch."""

from grank_kernels.recommender.models.dual_tower import DualTower, DualTowerConfig
from grank_kernels.recommender.models.embedding_model import EmbeddingModel
from grank_kernels.recommender.models.grank import GRank, GRankConfig
from grank_kernels.recommender.models.ranker import FoldedRanker, Ranker
from grank_kernels.recommender.models.recommender import Recommender
from grank_kernels.recommender.models.sequential import Sequential, SequentialConfig
from grank_kernels.recommender.models.unigrf import UniGRF, UniGRFConfig

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
