"""Reference models in plain PyTorch."""

from grank_kernels.models.grank import GRank, GRankConfig
from grank_kernels.models.ranker import FoldedRanker, Ranker

__all__ = ["FoldedRanker", "GRank", "GRankConfig", "Ranker"]
