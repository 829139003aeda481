"""LangChain's standard tests of vector stores, and the searches by their scores."""

from typing import Any

import numpy as np
import pytest

pytest.importorskip("langchain_core")
suites: Any = pytest.importorskip("langchain_tests.integration_tests.vectorstores")
from langchain_core.documents import Document  # noqa: E402  needs langchain-core
from langchain_core.embeddings import DeterministicFakeEmbedding, Embeddings  # noqa: E402

from grank_kernels.adapters.langchain import ItemTableVectorStore  # noqa: E402


class TestStandard(suites.VectorStoreIntegrationTests):  # type: ignore[misc]
    @pytest.fixture
    def vectorstore(self) -> Any:
        return ItemTableVectorStore(self.get_embeddings())


EMBEDDING = DeterministicFakeEmbedding(size=12)
TEXTS = [f"text {i}" for i in range(40)]


def vectors(texts: list[str], metric: str) -> np.ndarray:
    x = np.array(EMBEDDING.embed_documents(texts))
    return x / np.linalg.norm(x, axis=1, keepdims=True) if metric == "cosine" else x


@pytest.mark.parametrize("metric", ["cosine", "ip"])
def test_scores_are_those_computed_directly(metric: str) -> None:
    data = [{"number": i} for i in range(40)]
    store = ItemTableVectorStore.from_texts(TEXTS, EMBEDDING, data, metric=metric)
    scores = vectors(TEXTS, metric) @ vectors(["a query"], metric)[0]
    best = np.argsort(-scores)
    found = store.similarity_search_with_score("a query", 5)
    assert [document.metadata["number"] for document, _ in found] == best[:5].tolist()
    np.testing.assert_allclose([score for _, score in found], scores[best[:5]], rtol=1e-4)
    odd = store.similarity_search("a query", 50, filter=lambda document: document.metadata["number"] % 2 == 1)
    assert [document.metadata["number"] for document in odd] == [i for i in best.tolist() if i % 2]
    assert store.similarity_search_by_vector(EMBEDDING.embed_query("a query"), 5) == [each for each, _ in found]
    diverse = store.max_marginal_relevance_search("a query", 3, fetch_k=5)
    assert diverse[0] == found[0][0]
    assert {each.id for each in diverse} < {each.id for each, _ in found}


def test_relevance_scores_and_the_retriever() -> None:
    store = ItemTableVectorStore.from_texts(TEXTS, EMBEDDING)
    (document, score), *_ = store.similarity_search_with_relevance_scores("text 3", 2)
    assert document.page_content == "text 3"
    assert score == pytest.approx(1, abs=1e-5)
    assert [each.page_content for each in store.as_retriever(search_kwargs={"k": 1}).invoke("text 7")] == ["text 7"]
    with pytest.raises(ValueError, match='metric must be "cosine" for relevance scores'):
        ItemTableVectorStore.from_texts(TEXTS, EMBEDDING, metric="ip").similarity_search_with_relevance_scores("a", 2)


def test_replaced_and_deleted_documents() -> None:
    store = ItemTableVectorStore(EMBEDDING)
    assert store.similarity_search("a", 3) == []
    assert store.add_texts(["one", "two", "three"], ids=["a", "b", "a"]) == ["a", "b", "a"]
    assert (len(store), store.get_by_ids(["a", "c"])) == (2, [Document(page_content="three", id="a")])
    store.get_by_ids(["a"])[0].metadata["changed"] = True
    assert store.get_by_ids(["a"])[0].metadata == {}
    store.delete(["b", "unknown"])
    assert [each.id for each in store.similarity_search("two", 3)] == ["a"]
    store.delete()
    assert (len(store), store.similarity_search("two", 3)) == (0, [])


def test_refused() -> None:
    store = ItemTableVectorStore(EMBEDDING)
    with pytest.raises(TypeError, match="the arguments of ItemTableVectorStore do not include score_threshold"):
        store.similarity_search("a", score_threshold=1)
    with pytest.raises(ValueError, match="ids must have one entry a text, 2, got 1"):
        store.add_texts(["one", "two"], ids=["a"])
    with pytest.raises(ValueError, match="metric must be 'cosine' or 'ip', got 'l2'"):
        ItemTableVectorStore(EMBEDDING, metric="l2")
    assert isinstance(store.embeddings, Embeddings)
