"""Queries per second and recall of the true 100: exact searches, and indexes over their settings.

Every index is built once, and one setting of it is varied. Recall is computed over all queries before anything is
timed.
"""

from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any, NamedTuple

import pytest
import torch

from benchmarks.indexes import FaissIVFPQ
from benchmarks.measure import TURNS, Latest, measure
from benchmarks.methods import METHODS, THREADS, Search, peer, scann_builder, scann_search
from benchmarks.vectors import QUERIES, Vectors, all_vectors

pytestmark = pytest.mark.filterwarnings("default")  # warnings of the peers

K = 100
BATCHES = {1: 32, QUERIES: QUERIES}  # queries per call: queries per round
Tunable = Callable[[int], Search]  # setting -> search


class Index(NamedTuple):
    build: Callable[[torch.Tensor], Tunable]
    setting: str
    values: tuple[int, ...]


def hnsw(items: torch.Tensor) -> Tunable:
    """Small-world graph, M = 16, efConstruction = 100 (Malkov and Yashunin, arXiv 1603.09320)."""
    index = peer("hnswlib", "hnswlib").Index(space="ip", dim=items.shape[1])
    index.init_index(max_elements=len(items), M=16, ef_construction=100, random_seed=0)
    index.add_items(items.numpy(), num_threads=THREADS)

    def search(ef: int, queries: torch.Tensor, k: int) -> Any:
        index.set_ef(max(ef, k))
        return index.knn_query(queries.numpy(), k, num_threads=THREADS)[0].astype("int64")

    return lambda ef: partial(search, ef)


def ivf_pq(items: torch.Tensor) -> Tunable:
    """Clusters of codes of at most d / 2 bytes; 4 k items are rescored."""
    peer("faiss", "faiss-cpu").omp_set_num_threads(THREADS)
    N, d = items.shape
    parts = max(m for m in range(1, d // 2 + 1) if d % m == 0)
    index = FaissIVFPQ(items, nlist=max(1, min(1024, N // 64)), parts=parts)

    def search(nprobe: int, queries: torch.Tensor, k: int) -> Any:
        index.nprobe = nprobe
        return index.search(queries, k).indices

    return lambda nprobe: partial(search, nprobe)


def scann_tree(items: torch.Tensor) -> Tunable:
    """Clusters of anisotropic codes; 4 k items are rescored (Guo et al., arXiv 1908.10396)."""
    leaves = int(len(items) ** 0.5)
    builder = scann_builder(items, K).tree(num_leaves=leaves, num_leaves_to_search=1, training_sample_size=len(items))
    searcher = builder.score_ah(2, anisotropic_quantization_threshold=0.2).reorder(4 * K).build()
    searcher.set_num_threads(THREADS)
    return lambda visited: partial(scann_search, searcher, leaves_to_search=min(visited, leaves))


EXACT = {name: each for name, each in METHODS["cpu"].items() if "compiled" not in name and "SQ" not in name}
INDEXES = {
    "HNSW (hnswlib)": Index(hnsw, "efSearch", (100, 200, 400, 800, 1600)),
    "IVF-PQ (FAISS)": Index(ivf_pq, "nprobe", (1, 4, 16, 64, 256)),
    "ScaNN tree": Index(scann_tree, "leaves", (1, 4, 16, 64, 256)),
}
SYSTEMS = [(name, None) for name in EXACT] + [(name, v) for name, index in INDEXES.items() for v in index.values]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    option = metafunc.config.getoption
    names = all_vectors(0, 0, option("--bench-run"))
    metafunc.parametrize(
        ("source", "B", "system", "turn"),
        [
            pytest.param(source, B, (name, value), turn, id=f"{source}-B{B}-{name}-{value or 'exact'}-{turn}")
            for source in names
            for B in BATCHES
            for turn in TURNS
            for name, value in SYSTEMS
            if name not in EXACT or EXACT[name].max_batch >= B
        ],
    )


class Comparison:
    """A set of vectors, its true results, and every system, built on first use."""

    def __init__(self, vectors: Vectors):
        self.vectors = vectors
        scores = (torch.topk(part @ vectors.items.T, K) for part in vectors.queries.split(16))
        self.kth = torch.cat([top.values[:, -1:] for top in scores])
        self.build = lru_cache(maxsize=None)(self._build)
        self.recall = lru_cache(maxsize=None)(self._recall)

    def _build(self, name: str) -> Any:
        return (EXACT[name] if name in EXACT else INDEXES[name]).build(self.vectors.items)

    def search(self, name: str, value: int | None) -> Search:
        built = self.build(name)
        return built if value is None else built(value)

    def _recall(self, name: str, value: int | None) -> float:
        """Recall over all queries by score, so ties with the k-th count; -1 is a filler."""
        batch = min(QUERIES, EXACT[name].max_batch) if name in EXACT else QUERIES
        search = self.search(name, value)
        parts = [torch.as_tensor(search(part, K)).long() for part in self.vectors.queries.split(batch)]
        found = torch.cat(parts)
        assert found.shape == (QUERIES, K)
        assert all(len(row[row >= 0].unique()) == (row >= 0).sum() for row in found), "an item stands twice"
        scores = torch.einsum("bkd,bd->bk", self.vectors.items[found.clamp(min=0)], self.vectors.queries)
        near = self.kth - 1e-5 * self.kth.abs()
        recall = ((scores >= near) & (found >= 0)).float().mean().item()
        assert name not in EXACT or EXACT[name].dtype != torch.float32 or recall == 1.0
        return recall


@pytest.fixture(scope="session")
def comparisons(request: pytest.FixtureRequest) -> Callable[[str], Comparison]:
    """The comparisons, one in memory at a time."""
    option = request.config.getoption
    known = all_vectors(min(100_000, option("--bench-n")), option("--bench-d"), option("--bench-run"))
    return Latest(lambda source: Comparison(known[source]()))


def test_recall(
    benchmark: Any,
    comparisons: Callable[[str], Comparison],
    source: str,
    B: int,
    system: tuple[str, int | None],
    turn: int,
) -> None:
    name, value = system
    comparison = comparisons(source)
    items, asked = comparison.vectors.items, comparison.vectors.queries[: BATCHES[B]].split(B)
    recall, search = comparison.recall(name, value), comparison.search(name, value)

    def run() -> None:
        for queries in asked:
            search(queries, K)

    dtype = EXACT[name].dtype if name in EXACT else torch.float32
    measure(
        benchmark,
        run,
        op="recall",
        method=name,
        case=f"{comparison.vectors.name} B={B}",
        dtype=str(dtype).removeprefix("torch."),
        device="cpu",
        nbytes=items.nbytes,
        operations=2 * items.numel() * BATCHES[B],
        vectors=comparison.vectors.name,
        B=B,
        k=K,
        recall=recall,
        queries=BATCHES[B],
        setting=None if value is None else f"{INDEXES[name].setting} {value}",
    )
