"""The indexes against the exact search: recall, and validity of the returned lists."""

import builtins
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from benchmarks import indexes
from benchmarks.indexes import FaissHNSW, FaissIVFPQ, Index, Tree
from grank_kernels import mips_topk

pytestmark = pytest.mark.filterwarnings(
    "ignore:builtin type .* has no __module__ attribute:DeprecationWarning"
)  # faiss

N, D, K = 4096, 16, 20
BUILDS: dict[str, Callable[[Tensor], Index]] = {
    "hnsw": FaissHNSW,
    "ivf-pq": lambda vectors: FaissIVFPQ(vectors, nlist=64, parts=4, nprobe=16),
    "tree": Tree,
    "wide tree": lambda vectors: Tree(vectors, branch=8, beam=64),
    "tree with leaves": lambda vectors: Tree(vectors, leaf=8, beam=32),
}
NARROWEST = {  # the least value of every search setting
    "hnsw": {"ef_search": 1},
    "ivf-pq": {"nprobe": 1, "refine": 1},
    "tree": {"beam": 1},
    "wide tree": {"beam": 1},
    "tree with leaves": {"beam": 1},
}


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """One torch thread, for module fixtures too."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def problem() -> tuple[Tensor, Tensor]:
    """Items in 64 clusters with different norms, and queries near items, like trained vectors."""
    generator = torch.Generator().manual_seed(7)
    centres = torch.randn(64, D, generator=generator)
    vectors = centres.repeat_interleave(N // 64, 0) + 0.4 * torch.randn(N, D, generator=generator)
    vectors *= torch.exp(0.2 * torch.randn(N, 1, generator=generator))
    queries = centres + 0.4 * torch.randn(64, D, generator=generator)
    return vectors[torch.randperm(N, generator=generator)], queries


@pytest.fixture(scope="module", params=BUILDS)
def built(request: pytest.FixtureRequest, problem: tuple[Tensor, Tensor]) -> tuple[str, Index]:
    return request.param, BUILDS[request.param](problem[0])


def recall(found: Tensor, true: Tensor) -> float:
    """Share of the true lists that was found (recall)."""
    return (found.unsqueeze(2) == true.unsqueeze(1)).any(1).float().mean().item()


def check_lists(index: Index, queries: Tensor, k: int) -> Tensor:
    """Checks invariants of a list at any recall; returns its indices."""
    values, indices = index.search(queries, k)
    assert values.shape == indices.shape == (len(queries), k)
    assert (values.dtype, indices.dtype) == (torch.float32, torch.int64)
    true = (queries.double() @ index.vectors.double().T).gather(1, indices.clamp(min=0))
    bound = 2 * D * torch.finfo(torch.float32).eps * queries.norm(dim=1, keepdim=True) * index.vectors.norm(dim=1).max()
    real = indices >= 0
    assert ((values - true).abs() <= bound)[real].all()
    assert (values[~real] == -math.inf).all()
    assert (values[:, 1:] <= values[:, :-1]).all()
    assert (real[:, :-1] | ~real[:, 1:]).all()  # no result after a filler
    for row in indices.tolist():
        ids = [item for item in row if item >= 0]
        assert len(set(ids)) == len(ids)
    return indices


def test_recall_on_clusters(built: tuple[str, Index], problem: tuple[Tensor, Tensor]) -> None:
    """Recall of the best 20 is at least 0.9; the same number of random items would give at most 0.25."""
    _, index = built
    assert recall(check_lists(index, problem[1], K), mips_topk(problem[1], problem[0], K).indices) >= 0.9


def test_narrower_searches_have_lower_recall(built: tuple[str, Index], problem: tuple[Tensor, Tensor]) -> None:
    name, index = built
    true = mips_topk(problem[1], problem[0], 1).indices
    wide = recall(check_lists(index, problem[1], 1), true)
    settings = {setting: getattr(index, setting) for setting in NARROWEST[name]}
    try:
        for setting, value in NARROWEST[name].items():
            setattr(index, setting, value)
        assert recall(check_lists(index, problem[1], 1), true) < wide
        for setting in settings:
            setattr(index, setting, 0)
            with pytest.raises(ValueError, match=f"{setting} must be 1 or more, got 0"):
                index.search(problem[1], 1)
            setattr(index, setting, 1)
    finally:
        for setting, value in settings.items():
            setattr(index, setting, value)


def test_k_above_the_number_of_items(built: tuple[str, Index], problem: tuple[Tensor, Tensor]) -> None:
    indices = check_lists(built[1], problem[1][:2], N + 3)
    assert (indices[:, N:] == -1).all()


def test_no_queries(built: tuple[str, Index]) -> None:
    check_lists(built[1], torch.empty(0, D), 3)


def test_layout_of_queries_and_vectors_does_not_matter(problem: tuple[Tensor, Tensor]) -> None:
    index, strided = Tree(problem[0]), Tree(problem[0].T.contiguous().T)
    queries = problem[1][:5]
    for found in (index.search(queries.T.contiguous().T, K), strided.search(queries, K)):
        assert torch.equal(found.indices, index.search(queries, K).indices)


def test_vectors_and_queries_may_require_gradients(problem: tuple[Tensor, Tensor]) -> None:
    vectors, queries = (x.clone().requires_grad_() for x in problem)
    for build in BUILDS.values():
        assert not build(vectors).search(queries, 3).values.requires_grad


@given(
    items=st.integers(0, 70), d=st.integers(1, 5), branch=st.sampled_from([2, 4, 8]), leaf=st.integers(1, 9),
    k=st.integers(1, 80), equal=st.booleans(), seed=st.integers(0, 3),
)  # fmt: skip
def test_a_beam_of_all_nodes_is_exact(
    items: int, d: int, branch: int, leaf: int, k: int, equal: bool, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    vectors = torch.randint(-3, 4, (items, d), generator=generator).float() * (not equal)
    queries = torch.randint(-3, 4, (3, d), generator=generator).float()
    index = Tree(vectors, branch=branch, leaf=leaf, beam=128, seed=seed)
    found, true = index.search(queries, k), mips_topk(queries, vectors, k)
    assert torch.equal(found.values, true.values)
    assert (found.indices >= 0).sum(1).tolist() == [min(k, items)] * 3
    own = (queries @ vectors.T).gather(1, found.indices.clamp(min=0)) if items else found.values
    assert torch.equal(own[found.indices >= 0], found.values[found.indices >= 0])


@given(
    items=st.integers(1, 200), branch=st.sampled_from([2, 4, 8]), leaf=st.integers(1, 9), beam=st.integers(1, 3),
    k=st.integers(1, 200),
)  # fmt: skip
def test_a_narrow_beam_still_holds_k_items(items: int, branch: int, leaf: int, beam: int, k: int) -> None:
    vectors = torch.randn(items, 3)
    found = Tree(vectors, branch=branch, leaf=leaf, beam=beam).search(torch.randn(2, 3), k)
    assert ((found.indices >= 0).sum(1) == min(k, items)).all()


@pytest.mark.parametrize(("branch", "leaf"), [(2, 1), (4, 1), (16, 1), (2, 8), (4, 5)])
def test_a_tree_is_balanced_and_holds_every_item_once(branch: int, leaf: int) -> None:
    index = Tree(torch.randn(1000, 4), branch=branch, leaf=leaf)
    assert index._order.sort().values.tolist() == list(range(1000))
    sizes = index._leaves.diff()
    assert leaf <= int(sizes.min()) <= int(sizes.max()) <= min(int(sizes.min()) + 1, branch * leaf)
    assert [len(level) for level in index._levels] == [branch**level for level in range(len(index._levels))]


@pytest.mark.parametrize("seed", range(5))
def test_a_tree_keeps_clusters_together(seed: int) -> None:
    """Eight clusters, nested in three levels of pairs, are separated for every first centre of the splits."""
    cluster = torch.arange(8).repeat(8)[torch.randperm(64)]
    places = torch.stack([400.0 * (cluster >> 2), 200.0 * (cluster >> 1 & 1), 100.0 * (cluster & 1)], 1)
    index = Tree(places + torch.randn(64, 3), leaf=8, seed=seed)
    assert len(index._leaves) == 9
    for level in range(4):
        nodes = cluster[index._order].view(1 << level, -1)
        assert [len(set(node.tolist())) for node in nodes] == [8 >> level] * (1 << level)


def test_node_scores_are_the_documented_ones() -> None:
    vectors = torch.randn(64, 4)
    index = Tree(vectors, leaf=16)
    for level, nodes in enumerate(index._levels):
        for node, row in enumerate(nodes):
            own = vectors[index._order.view(1 << level, -1)[node]].double()
            mean = own.mean(0)
            distance = (own - mean).square().sum(1).mean().sqrt()
            spread = distance * math.sqrt(2 * math.log(len(own)) / 4)
            torch.testing.assert_close(row.double(), torch.cat([mean, spread[None]]), rtol=1e-5, atol=1e-5)


def test_large_beams_are_searched_in_parts(problem: tuple[Tensor, Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    index = Tree(problem[0])
    whole = index.search(problem[1], K)
    monkeypatch.setattr(indexes, "_NUMBERS", 1)
    assert torch.equal(index.search(problem[1], K).indices, whole.indices)


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda: Tree([[1.0]]), TypeError, "vectors must be a torch.Tensor or an array, got list"),
        (lambda: Tree(torch.ones(3)), ValueError, r"vectors must have 2 dimensions, got \(3,\)"),
        (lambda: Tree(torch.ones(3, 0)), ValueError, r"vectors must be \(N, d\) with d of 1 or more, got \(3, 0\)"),
        (lambda: Tree(torch.ones(3, 2).half()), ValueError, "vectors must be torch.float32, got torch.float16"),
        (lambda: Tree(torch.full((3, 2), math.nan)), ValueError, "vectors must be finite, got NaN"),
        (lambda: Tree(torch.ones(3, 2, device="meta")), ValueError, "vectors must be on the CPU, got meta"),
        (lambda: Tree(torch.ones(3, 2), branch=6), ValueError, "branch must be a power of two, got 6"),
        (lambda: Tree(torch.ones(3, 2), branch=1), ValueError, "branch must be 2 or more, got 1"),
        (lambda: Tree(torch.ones(3, 2), leaf=0), ValueError, "leaf must be 1 or more, got 0"),
        (lambda: Tree(torch.ones(3, 2), rounds=0.5), TypeError, "rounds must be an int, got float"),
        (lambda: FaissHNSW(torch.ones(3, 2), neighbours=1), ValueError, "neighbours must be 2 or more, got 1"),
        (lambda: FaissHNSW(torch.ones(3, 2), ef_construction=0), ValueError, "ef_construction must be 1 or more"),
        (lambda: FaissIVFPQ(torch.ones(300, 6), parts=4), ValueError, "parts must divide the width .* got 4 and 6"),
        (lambda: FaissIVFPQ(torch.ones(200, 4), nlist=8, parts=4), ValueError, "at least 256, got 200 with nlist = 8"),
        (lambda: FaissIVFPQ(torch.ones(300, 4), nlist=400, parts=4), ValueError, "got 300 with nlist = 400"),
        (lambda: FaissIVFPQ(torch.ones(300, 4), nlist=0, parts=4), ValueError, "nlist must be 1 or more, got 0"),
    ],
)  # fmt: skip
def test_build_errors_name_the_argument(build: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        build()


@pytest.mark.parametrize(
    ("queries", "k", "error", "message"),
    [
        (torch.ones(2, 3), 1, ValueError, r"queries must be \(B, 2\), the width of the vectors, got \(2, 3\)"),
        (torch.ones(2), 1, ValueError, r"queries must have 2 dimensions, got \(2,\)"),
        (torch.full((1, 2), math.inf), 1, ValueError, "queries must be finite"),
        (torch.ones(1, 2).double(), 1, ValueError, "queries must be torch.float32, got torch.float64"),
        (torch.ones(1, 2), 0, ValueError, "k must be 1 or more, got 0"),
        (torch.ones(1, 2), 1.0, TypeError, "k must be an int, got float"),
        (torch.ones(1, 2), True, TypeError, "k must be an int, got bool"),
    ],
)
def test_search_errors_name_the_argument(queries: Any, k: Any, error: type[Exception], message: str) -> None:
    for build in (Tree, FaissHNSW):
        with pytest.raises(error, match=message):
            build(torch.ones(4, 2)).search(queries, k)


def test_an_empty_table_returns_fillers(problem: tuple[Tensor, Tensor]) -> None:
    for build in (Tree, FaissHNSW):
        found = build(torch.empty(0, D)).search(problem[1], 2)
        assert found.indices.tolist() == [[-1, -1]] * 64
        assert found.values.tolist() == [[-math.inf] * 2] * 64


def test_without_faiss_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def missing(name: str, *arguments: Any) -> Any:
        if name == "faiss":
            raise ImportError(name)
        return real(name, *arguments)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(ImportError, match=r"needs faiss: pip install 'grank-kernels\[bench\]'"):
        FaissHNSW(torch.ones(3, 2))
