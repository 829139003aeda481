"""Reference models in plain PyTorch."""

from grank_kernels.models.grank import Generator, GRank, Ranker

__all__ = ["GRank", "Generator", "Ranker"]
