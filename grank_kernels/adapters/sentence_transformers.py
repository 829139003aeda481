"""`sentence_transformers.util.semantic_search` by `mips_topk`."""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from grank_kernels.common.arrays import Array
from grank_kernels.common.checks import FLOATS, check_int, check_tensor
from grank_kernels.mips_topk import mips_topk

_COSINE = ("cos_sim", "pytorch_cos_sim")
Embeddings = Array | Sequence[Array]


def cos_sim(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Cosine similarities (n, m) of rows (n, d) and (m, d); a row of zeros has the similarity 0."""
    return dot_score(_normalised(a), _normalised(b))


def dot_score(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Inner products (n, m) of rows (n, d) and (m, d)."""
    return a @ b.T


def semantic_search(
    query_embeddings: Embeddings,
    corpus_embeddings: Embeddings,
    query_chunk_size: int = 100,
    corpus_chunk_size: int = 500_000,
    top_k: int = 10,
    score_function: Callable[[Any, Any], torch.Tensor] = cos_sim,
) -> list[list[dict[str, int | float]]]:
    """The best rows of a corpus for each query, as `sentence_transformers.util.semantic_search` returns them.

    Args:
        query_embeddings: (B, d), (d,), or a list of (d,); float32, float16, bfloat16 or float64.
        corpus_embeddings: (N, d), or a list of (d,).
        query_chunk_size: accepted and unneeded: no (B, N) matrix is made.
        corpus_chunk_size: accepted and unneeded.
        top_k: number of results a query; fewer if the corpus has fewer rows.
        score_function: `cos_sim` or `dot_score`, of this module or of sentence-transformers.

    Returns:
        For each query a list of `{"corpus_id": position, "score": score}`, best first.

    Raises:
        TypeError: embeddings are not tensors or arrays.
        ValueError: widths or devices differ, or another score function.
    """
    check_int("query_chunk_size", query_chunk_size, 1)
    check_int("corpus_chunk_size", corpus_chunk_size, 1)
    name = getattr(score_function, "__name__", repr(score_function))
    if name not in (*_COSINE, "dot_score"):
        raise ValueError(f"score_function must be cos_sim or dot_score, got {name}")
    queries, corpus = _matrix("query_embeddings", query_embeddings), _matrix("corpus_embeddings", corpus_embeddings)
    if name in _COSINE:
        queries, corpus = _normalised(queries), _normalised(corpus)
    if not len(corpus):
        return [[] for _ in queries]
    top = mips_topk(queries, corpus, min(top_k, len(corpus)))
    return [
        [{"corpus_id": i, "score": score} for i, score in zip(ids, scores, strict=True) if i >= 0]
        for ids, scores in zip(top.indices.tolist(), top.values.tolist(), strict=True)
    ]


def _matrix(name: str, x: Any) -> torch.Tensor:
    """Embeddings (n, d) without a gradient; float64 as float32."""
    if isinstance(x, (list, tuple)):
        x = torch.stack([check_tensor(f"{name}[{i}]", row, (*FLOATS, torch.float64), (1,)) for i, row in enumerate(x)])
    rows = check_tensor(name, x, (*FLOATS, torch.float64), (1, 2)).detach()
    rows = rows.float() if rows.dtype == torch.float64 else rows
    return rows[None] if rows.dim() == 1 else rows


def _normalised(x: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.normalize(x.float(), dim=1)
