"""Exact maximum-inner-product top-k over huge item tables, and a Ranker's cross-attention, as drop-in PyTorch ops."""

from grank_kernels._version import __version__
from grank_kernels.candidate_cross_attention import candidate_cross_attention
from grank_kernels.corpus_cross_entropy import corpus_cross_entropy
from grank_kernels.distributed.sharded_table import ShardedItemTable
from grank_kernels.doctor import show_config
from grank_kernels.mips_topk import TopK, TopKArrays, count_rescored, mips_topk
from grank_kernels.sample_negatives import sample_negatives
from grank_kernels.score_candidates import score_candidates
from grank_kernels.table.item_table import ItemTable

__all__ = [
    "ItemTable",
    "ShardedItemTable",
    "TopK",
    "TopKArrays",
    "__version__",
    "candidate_cross_attention",
    "corpus_cross_entropy",
    "count_rescored",
    "mips_topk",
    "sample_negatives",
    "score_candidates",
    "show_config",
]
