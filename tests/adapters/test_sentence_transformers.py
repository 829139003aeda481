"""`semantic_search`: the results of scores computed directly."""

from typing import Any

import numpy as np
import pytest
import torch

from grank_kernels.adapters.sentence_transformers import cos_sim, dot_score, semantic_search

X, Q = torch.randn(200, 16, generator=torch.Generator().manual_seed(1)).split([190, 10])
KINDS: dict[str, Any] = {
    "tensors": lambda x: x,
    "arrays": lambda x: x.numpy(),
    "float64": lambda x: x.double().numpy(),
    "lists of tensors": list,
    "with gradient": lambda x: x.clone().requires_grad_(),
}


@pytest.mark.parametrize("score", [cos_sim, dot_score])
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_results(kind: Any, score: Any) -> None:
    hits = semantic_search(kind(Q), kind(X), query_chunk_size=3, corpus_chunk_size=50, top_k=7, score_function=score)
    wanted = score(Q, X).topk(7)
    assert [[hit["corpus_id"] for hit in row] for row in hits] == wanted.indices.tolist()
    np.testing.assert_allclose([[hit["score"] for hit in row] for row in hits], wanted.values, rtol=1e-5)
    assert {type(hits[0][0]["corpus_id"]), type(hits[0][0]["score"])} == {int, float}


def test_one_query_and_a_small_corpus() -> None:
    (hits,) = semantic_search(Q[0], X[:3])
    assert [hit["corpus_id"] for hit in hits] == cos_sim(Q[:1], X[:3])[0].argsort(descending=True).tolist()
    assert semantic_search(Q[:2], X[:0]) == [[], []]


def test_the_score_functions_of_sentence_transformers_are_known_by_name() -> None:
    def pytorch_cos_sim(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        raise AssertionError("it is not called")

    assert semantic_search(Q, X, score_function=pytorch_cos_sim) == semantic_search(Q, X)


def test_refused() -> None:
    def euclidean_sim(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return -torch.cdist(a, b)

    with pytest.raises(ValueError, match="score_function must be cos_sim or dot_score, got euclidean_sim"):
        semantic_search(Q, X, score_function=euclidean_sim)
    with pytest.raises(TypeError, match=r"query_embeddings must be a torch.Tensor or an array, got str"):
        semantic_search("text", X)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="query_chunk_size must be 1 or more, got 0"):
        semantic_search(Q, X, query_chunk_size=0)
