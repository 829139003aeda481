"""A LangChain `VectorStore` over an `ItemTable`."""

import uuid
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from langchain_core.documents import Document
from langchain_core.embeddings import Embeddings
from langchain_core.vectorstores import VectorStore
from langchain_core.vectorstores.utils import maximal_marginal_relevance

from grank_kernels.common.checks import check_choice, check_int
from grank_kernels.mips_topk import mips_topk
from grank_kernels.table.item_table import ItemTable

Filter = Callable[[Document], bool]


class ItemTableVectorStore(VectorStore):
    """Documents with exact search of their embeddings, in memory.

    Adding a document with an id that is there replaces it. Equal scores: the document added first comes first.
    """

    def __init__(self, embedding: Embeddings, *, metric: str = "cosine") -> None:
        """An empty store.

        Args:
            embedding: makes the vectors of texts.
            metric: "cosine", or "ip" for the inner product.

        Raises:
            ValueError: another metric.
        """
        check_choice("metric", metric, ("cosine", "ip"))
        self.embedding, self.metric = embedding, metric
        self.table: ItemTable | None = None  # of the width of the first vector
        self._documents: dict[int, Document] = {}  # by id in the table
        self._rows: dict[str, int] = {}  # id in the table of a document's id
        self._next = 0

    @property
    def embeddings(self) -> Embeddings:
        """Makes the vectors of texts."""
        return self.embedding

    def __len__(self) -> int:
        return len(self._rows)

    # ---- updates ----

    def add_texts(
        self,
        texts: Iterable[str],
        metadatas: list[dict[str, Any]] | None = None,
        *,
        ids: Sequence[str | None] | None = None,
        **kwargs: Any,
    ) -> list[str]:
        """Adds texts, and returns their ids: those given, or new ones.

        Raises:
            TypeError: an unknown argument.
            ValueError: there are more or fewer metadatas or ids than texts.
        """
        _refuse(kwargs)
        texts = list(texts)
        for name, given in (("metadatas", metadatas), ("ids", ids)):
            if given is not None and len(given) != len(texts):
                raise ValueError(f"{name} must have one entry a text, {len(texts)}, got {len(given)}")
        names = [name or str(uuid.uuid4()) for name in ([None] * len(texts) if ids is None else ids)]
        documents = {
            name: Document(page_content=text, metadata=data, id=name)
            for name, text, data in zip(names, texts, metadatas or [{} for _ in texts], strict=True)
        }  # of a repeated id the last
        if documents:
            vectors = self._vectors(self.embedding.embed_documents([each.page_content for each in documents.values()]))
            self.delete(list(documents))
            rows = torch.arange(self._next, self._next + len(documents))
            if self.table is None:
                self.table = ItemTable.from_rows(vectors[:0], ids=rows[:0])
            self.table.upsert(rows, vectors)
            self._next += len(documents)
            self._rows.update(zip(documents, rows.tolist(), strict=True))
            self._documents.update(zip(rows.tolist(), documents.values(), strict=True))
        return names

    def delete(self, ids: list[str] | None = None, **kwargs: Any) -> bool:
        """Deletes documents, all of them if ids is None; unknown ids are ignored."""
        _refuse(kwargs)
        rows = [self._rows.pop(name) for name in (list(self._rows) if ids is None else ids) if name in self._rows]
        if self.table is not None:
            self.table.remove(torch.tensor(rows, dtype=torch.int64))
        for row in rows:
            del self._documents[row]
        return True

    def get_by_ids(self, ids: Sequence[str], /) -> list[Document]:
        """The documents of some ids, without those that are not there."""
        return [_copy(self._documents[self._rows[name]]) for name in ids if name in self._rows]

    # ---- searches ----

    def similarity_search(
        self, query: str, k: int = 4, *, filter: Filter | None = None, **kwargs: Any
    ) -> list[Document]:
        """The k documents most similar to a text, best first; `filter` says which are eligible."""
        return [each for each, _ in self.similarity_search_with_score(query, k, filter=filter, **kwargs)]

    def similarity_search_with_score(
        self, query: str, k: int = 4, *, filter: Filter | None = None, **kwargs: Any
    ) -> list[tuple[Document, float]]:
        """As `similarity_search`, with scores."""
        _refuse(kwargs)
        return [(each, score) for each, score, _ in self._search(self.embedding.embed_query(query), k, filter)]

    def similarity_search_by_vector(
        self, embedding: list[float], k: int = 4, *, filter: Filter | None = None, **kwargs: Any
    ) -> list[Document]:
        """As `similarity_search`, of a vector."""
        _refuse(kwargs)
        return [each for each, _, _ in self._search(embedding, k, filter)]

    def max_marginal_relevance_search(
        self,
        query: str,
        k: int = 4,
        fetch_k: int = 20,
        lambda_mult: float = 0.5,
        *,
        filter: Filter | None = None,
        **kwargs: Any,
    ) -> list[Document]:
        """K of the `fetch_k` most similar documents, chosen for similarity and diversity (LangChain's function)."""
        vector = self.embedding.embed_query(query)
        return self.max_marginal_relevance_search_by_vector(vector, k, fetch_k, lambda_mult, filter=filter, **kwargs)

    def max_marginal_relevance_search_by_vector(
        self,
        embedding: list[float],
        k: int = 4,
        fetch_k: int = 20,
        lambda_mult: float = 0.5,
        *,
        filter: Filter | None = None,
        **kwargs: Any,
    ) -> list[Document]:
        """As `max_marginal_relevance_search`, of a vector."""
        _refuse(kwargs)
        found = self._search(embedding, fetch_k, filter)
        if self.table is None or not found:
            return []
        vectors = self.table.rows(torch.tensor([row for _, _, row in found])).numpy()
        chosen = maximal_marginal_relevance(
            np.array(embedding, np.float32), list(vectors), lambda_mult=lambda_mult, k=k
        )
        return [found[i][0] for i in chosen]

    @classmethod
    def from_texts(
        cls,
        texts: list[str],
        embedding: Embeddings,
        metadatas: list[dict[str, Any]] | None = None,
        *,
        ids: list[str] | None = None,
        metric: str = "cosine",
        **kwargs: Any,
    ) -> "ItemTableVectorStore":
        """A store with texts."""
        store = cls(embedding, metric=metric)
        store.add_texts(texts, metadatas, ids=ids, **kwargs)
        return store

    def _select_relevance_score_fn(self) -> Callable[[float], float]:
        if self.metric == "ip":
            raise ValueError('metric must be "cosine" for relevance scores in [0, 1], got "ip"')
        return lambda score: (1 + score) / 2

    def _search(self, vector: list[float], k: int, filter: Filter | None) -> list[tuple[Document, float, int]]:
        """Documents, scores and ids in the table."""
        check_int("k", k, 1)
        if self.table is None or not len(self.table):
            return []
        allow = None
        if filter is not None:
            rows = [row for row, document in self._documents.items() if filter(document)]
            allow = self.table.mask(torch.tensor(rows, dtype=torch.int64))
        top = mips_topk(self._vectors([vector]), self.table, min(k, len(self.table)), allow=allow)
        found = zip(top.values[0].tolist(), top.indices[0].tolist(), strict=True)
        return [(_copy(self._documents[row]), score, row) for score, row in found if row >= 0]

    def _vectors(self, vectors: list[list[float]]) -> torch.Tensor:
        x = torch.tensor(vectors, dtype=torch.float32)
        return torch.nn.functional.normalize(x, dim=1) if self.metric == "cosine" else x


def _copy(document: Document) -> Document:
    """A copy, whose metadata the caller may change."""
    return Document(page_content=document.page_content, metadata=dict(document.metadata), id=document.id)


def _refuse(kwargs: dict[str, Any]) -> None:
    if kwargs:
        raise TypeError(f"the arguments of ItemTableVectorStore do not include {', '.join(sorted(kwargs))}")
