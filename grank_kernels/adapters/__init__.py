"""The names of other libraries for the searches of this package."""

from grank_kernels.adapters.faiss import IndexFlatIP

__all__ = ["IndexFlatIP"]
