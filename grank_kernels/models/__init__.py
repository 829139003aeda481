"""Reference models in plain PyTorch."""

from grank_kernels.models.dual_tower import DualTower, DualTowerConfig
from grank_kernels.models.grank import GRank, GRankConfig
from grank_kernels.models.ranker import FoldedRanker, Ranker

__all__ = ["DualTower", "DualTowerConfig", "FoldedRanker", "GRank", "GRankConfig", "Ranker"]
