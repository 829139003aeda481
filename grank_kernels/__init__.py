"""Exact maximum-inner-product top-k over huge item tables, as a drop-in PyTorch op."""

from grank_kernels._version import __version__
from grank_kernels.config import show_config
from grank_kernels.mips_topk import TopK, mips_topk
from grank_kernels.table import ItemTable

__all__ = ["ItemTable", "TopK", "__version__", "mips_topk", "show_config"]
