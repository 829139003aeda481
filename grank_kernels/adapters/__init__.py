"""Other libraries' names for the same search."""

from grank_kernels.adapters.faiss import IndexFlatIP

__all__ = ["IndexFlatIP"]
