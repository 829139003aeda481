"""Approximate indexes with one interface, as peers of the exact search: HNSW, IVF-PQ, a tree.

Each scores only some of the items; its settings trade recall for time. Attributes that control the search may be
changed between searches.
"""

import math
from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from grank_kernels.common.checks import check_int, check_tensor
from grank_kernels.mips_topk import TopK

_NUMBERS = 1 << 24  # float32 gathered at a time: 64 MB


class Index(ABC):
    """An index over item vectors; subclasses build and search it.

    Attributes:
        vectors: (N, d) float32, a reference, not a copy.
    """

    def __init__(self, vectors: Tensor) -> None:
        """Builds the index.

        Args:
            vectors: (N, d) float32 on the CPU, finite.

        Raises:
            TypeError: an argument is of the wrong type.
            ValueError: vectors or settings that do not fit.
        """
        vectors = check_tensor("vectors", vectors, (torch.float32,), (2,))
        if vectors.shape[1] < 1:
            raise ValueError(f"vectors must be (N, d) with d of 1 or more, got {tuple(vectors.shape)}")
        _check_finite("vectors", vectors)
        self.vectors = vectors.detach().contiguous()

    def search(self, queries: Tensor, k: int) -> TopK:
        """The k best of the items that the index scores.

        Args:
            queries: (B, d) float32 on the CPU, finite.
            k: 1 or more.

        Returns:
            `TopK(values, indices)`, each (B, k): true inner products, descending, and the rows of `vectors`; filled
            with -inf and -1 if the index finds fewer.

        Raises:
            TypeError: an argument is of the wrong type.
            ValueError: a shape, dtype or device that does not fit, or numbers that are not finite.
        """
        queries = check_tensor("queries", queries, (torch.float32,), (2,))
        N, d = self.vectors.shape
        if queries.shape[1] != d:
            raise ValueError(f"queries must be (B, {d}), the width of the vectors, got {tuple(queries.shape)}")
        _check_finite("queries", queries)
        check_int("k", k, 1)
        if len(queries) == 0 or N == 0:
            found = TopK(queries.new_empty(len(queries), 0), queries.new_empty(len(queries), 0, dtype=torch.int64))
        else:
            found = self._search(queries.detach().contiguous(), min(k, N))
        missing = k - found.indices.shape[1]
        return TopK(F.pad(found.values, (0, missing), value=-math.inf), F.pad(found.indices, (0, missing), value=-1))

    @abstractmethod
    def _search(self, queries: Tensor, k: int) -> TopK:
        """As `search`, with 1 <= k <= N and at least one query; lists may be shorter than k."""

    def _best(self, queries: Tensor, candidates: Tensor, k: int) -> TopK:
        """The k best of the candidates (B, C), padded with -1, by true inner product."""
        values, indices = [], []
        step = max(1, _NUMBERS // max(1, candidates.shape[1] * queries.shape[1]))
        for some, ids in zip(torch.split(queries, step), torch.split(candidates, step), strict=True):
            scores = _products(some, self.vectors, ids.clamp(min=0)).masked_fill_(ids < 0, -math.inf)
            best, places = scores.topk(min(k, ids.shape[1]))
            values.append(best)
            indices.append(ids.gather(1, places))
        return TopK(torch.cat(values), torch.cat(indices))


class FaissHNSW(Index):
    """A navigable small-world graph over inner products, walked greedily (faiss `IndexHNSWFlat`).

    Source: Malkov and Yashunin, arXiv 1603.09320; over inner products, Morozov and Babenko, NeurIPS 2018.

    Attributes:
        ef_search: length of the candidate list of a search, at least k.
    """

    def __init__(
        self, vectors: Tensor, *, neighbours: int = 32, ef_construction: int = 200, ef_search: int = 128
    ) -> None:
        """Builds the graph.

        Args:
            vectors: (N, d) float32 on the CPU, finite.
            neighbours: links of a node on every level but the lowest, which has twice as many (M).
            ef_construction: length of the candidate list when a node is inserted.
            ef_search: as above.
        """
        super().__init__(vectors)
        check_int("neighbours", neighbours, 2)
        check_int("ef_construction", ef_construction, 1)
        faiss = _faiss()
        self._index = faiss.IndexHNSWFlat(vectors.shape[1], neighbours, faiss.METRIC_INNER_PRODUCT)
        self._index.hnsw.efConstruction = ef_construction
        self._index.add(self.vectors.numpy())
        self.ef_search = ef_search

    def _search(self, queries: Tensor, k: int) -> TopK:
        check_int("ef_search", self.ef_search, 1)
        parameters = _faiss().SearchParametersHNSW(efSearch=max(self.ef_search, k))
        values, indices = map(torch.from_numpy, self._index.search(queries.numpy(), k, params=parameters))
        return TopK(values.masked_fill_(indices < 0, -math.inf), indices)


class FaissIVFPQ(Index):
    """Clusters of product-quantised items; a search scans the nearest clusters (faiss `IndexIVFPQ`).

    The best candidates by quantised inner product are rescored by the true one, as is usual in production.

    Source: Jegou, Douze and Schmid, TPAMI 2011.

    Attributes:
        nprobe: clusters scanned per query.
        refine: candidates rescored, as a multiple of k.
    """

    def __init__(
        self, vectors: Tensor, *, nlist: int = 1024, parts: int = 16, nprobe: int = 32, refine: int = 4
    ) -> None:
        """Learns clusters and code books, and encodes the vectors, each in `parts` bytes.

        Args:
            vectors: (N, d) float32 on the CPU, finite, N at least 256 and `nlist`.
            nlist: clusters.
            parts: sub-vectors, each quantised to 256 values (m); divides d.
            nprobe: as above.
            refine: as above.
        """
        super().__init__(vectors)
        N, d = vectors.shape
        check_int("nlist", nlist, 1)
        check_int("parts", parts, 1)
        if d % parts:
            raise ValueError(f"parts must divide the width of the vectors, got {parts} and {d}")
        if max(nlist, 256) > N:
            raise ValueError(f"vectors must be at least nlist and at least 256, got {N} with nlist = {nlist}")
        faiss = _faiss()
        self._coarse = faiss.IndexFlatIP(d)  # the index holds no reference of its own
        self._index = faiss.IndexIVFPQ(self._coarse, d, nlist, parts, 8, faiss.METRIC_INNER_PRODUCT)
        self._index.cp.min_points_per_centroid = self._index.pq.cp.min_points_per_centroid = 1  # no warnings
        self._index.train(self.vectors.numpy())
        self._index.add(self.vectors.numpy())
        self.nprobe, self.refine = nprobe, refine

    def _search(self, queries: Tensor, k: int) -> TopK:
        check_int("nprobe", self.nprobe, 1)
        check_int("refine", self.refine, 1)
        parameters = _faiss().SearchParametersIVF(nprobe=min(self.nprobe, self._index.nlist))
        wanted = min(k * self.refine, len(self.vectors))
        _, candidates = self._index.search(queries.numpy(), wanted, params=parameters)
        return self._best(queries, torch.from_numpy(candidates), k)


class Tree(Index):
    """A balanced tree over the items, searched level by level with a beam, as TDM does it.

    Every node is split by balanced 2-means: its items are sorted along the line between two centres, and the halves of
    that order give the next centres. A tree with 2^b branches per node has every b-th level of the binary tree. TDM
    trains a network to score nodes; here the score of a node estimates the largest inner product below it. For n items
    with mean m and root mean square distance r from it, that is `q m + |q| r sqrt(2 ln(n) / d)`, the expected maximum
    of an isotropic normal distribution.

    Source: Zhu et al., arXiv 1801.02294, sections 3.1 and 3.3.

    Attributes:
        beam: nodes kept per level; more if they hold fewer than k items.
    """

    def __init__(
        self, vectors: Tensor, *, branch: int = 2, leaf: int = 1, beam: int = 128, rounds: int = 4, seed: int = 0
    ) -> None:
        """Builds the tree.

        Args:
            vectors: (N, d) float32 on the CPU, finite.
            branch: children of a node, a power of two.
            leaf: least number of items of a leaf; the largest is `branch * leaf`.
            beam: as above.
            rounds: rounds of 2-means per split.
            seed: seed of the first centres.
        """
        super().__init__(vectors)
        for name, value, least in (("branch", branch, 2), ("leaf", leaf, 1), ("rounds", rounds, 1)):
            check_int(name, value, least)
        if branch & (branch - 1):
            raise ValueError(f"branch must be a power of two, got {branch}")
        self.beam, self._branch = beam, branch
        bits = branch.bit_length() - 1
        depth = (max(1, len(vectors) // leaf).bit_length() - 1) // bits * bits
        generator = torch.Generator().manual_seed(seed)
        self._order = torch.arange(len(vectors))
        self._levels: list[Tensor] = []
        for level in range(depth + 1):
            bounds = self._bounds(level)
            if level % bits == 0:
                self._levels.append(_node_vectors(self.vectors, self._order, bounds))
            if level < depth:
                self._order = _split(self.vectors, self._order, bounds, self._bounds(level + 1), rounds, generator)
        self._leaves = self._bounds(depth)

    def _bounds(self, level: int) -> Tensor:
        """Bounds of the `2^level` nodes of a level in tree order, (2^level + 1,); sizes differ by at most 1."""
        return torch.arange((1 << level) + 1) * len(self.vectors) >> level

    def _search(self, queries: Tensor, k: int) -> TopK:
        check_int("beam", self.beam, 1)
        smallest, largest = (int(size) for size in self._leaves.diff().aminmax())
        beam = min(max(self.beam, -(-k // smallest)), len(self._leaves) - 1)
        step = max(1, _NUMBERS // (beam * max(self._branch, largest) * (queries.shape[1] + 1)))
        found = []
        for some in torch.split(queries, step):
            leaves = self._descend(torch.cat([some, some.norm(dim=1, keepdim=True)], 1), beam)
            places = self._leaves[leaves].unsqueeze(2) + torch.arange(largest)
            inside = places < self._leaves[leaves + 1].unsqueeze(2)
            items = self._order[places.clamp(max=len(self._order) - 1)].where(inside, -1)
            found.append(self._best(some, items.flatten(1), k))
        return TopK(*map(torch.cat, zip(*found, strict=True)))

    def _descend(self, queries: Tensor, beam: int) -> Tensor:
        """Leaves reached by the beam, (B, at most `beam`), for queries (B, d + 1) with |q| as last column."""
        children = torch.arange(self._branch)
        nodes = queries.new_zeros(len(queries), 1, dtype=torch.int64)
        for vectors in self._levels[1:]:
            nodes = (nodes.unsqueeze(2) * self._branch + children).flatten(1)
            if nodes.shape[1] > beam:
                nodes = nodes.gather(1, _products(queries, vectors, nodes).topk(beam, sorted=False).indices)
        return nodes


def _split(
    vectors: Tensor, order: Tensor, bounds: Tensor, halves: Tensor, rounds: int, generator: torch.Generator
) -> Tensor:
    """Sorts the items of every node by its two children.

    Args:
        vectors: (N, d).
        order: (N,), the items in tree order.
        bounds: (n + 1,), bounds of the nodes in that order.
        halves: (2 n + 1,), bounds of their children.
        rounds: rounds of 2-means.
        generator: draws the first centres.

    Returns:
        (N,), the new order.
    """
    rows = F.embedding(order, vectors)
    node = torch.arange(len(bounds) - 1).repeat_interleave(bounds.diff())
    first = bounds[:-1] + (torch.rand(len(bounds) - 1, generator=generator, dtype=torch.float64) * bounds.diff()).long()
    places = torch.arange(len(order))
    line = rows[first] - _means(rows, places, bounds)  # from the centre to any item
    step = max(1, _NUMBERS // vectors.shape[1])
    for _ in range(rounds):
        parts = zip(torch.split(rows, step), torch.split(node, step), strict=True)
        along = torch.cat([(some * F.embedding(nodes, line)).sum(1) for some, nodes in parts])
        places = along.argsort(stable=True)
        places = places[node[places].argsort(stable=True)]
        centres = _means(rows, places, halves)
        line = centres[1::2] - centres[::2]
    return order[places]


def _means(vectors: Tensor, order: Tensor, bounds: Tensor) -> Tensor:
    """Mean of the items of every node, (n, d)."""
    return F.embedding_bag(order, vectors, bounds[:-1], mode="mean")


def _node_vectors(vectors: Tensor, order: Tensor, bounds: Tensor) -> Tensor:
    """(n, d + 1): the mean of every node, and the factor of |q| in its score (see `Tree`)."""
    means = _means(vectors, order, bounds)
    squares = _means(vectors.square().sum(1, keepdim=True), order, bounds) - means.square().sum(1, keepdim=True)
    spread = (2 * bounds.diff().clamp(min=1).float().log().unsqueeze(1) / vectors.shape[1]).sqrt()
    return torch.cat([means, squares.clamp(min=0).sqrt() * spread], 1)


def _products(queries: Tensor, table: Tensor, ids: Tensor) -> Tensor:
    """Inner products (B, C) of the queries (B, d) with rows `ids` (B, C) of a table."""
    return torch.bmm(F.embedding(ids, table), queries.unsqueeze(2)).squeeze(2)


def _check_finite(name: str, x: Tensor) -> None:
    if not x.is_cpu:
        raise ValueError(f"{name} must be on the CPU, got {x.device}")
    if not bool(x.isfinite().all()):
        raise ValueError(f"{name} must be finite, got NaN or infinities")


def _faiss() -> Any:
    """The faiss module, set to torch's number of threads."""
    try:
        import faiss
    except ImportError:
        raise ImportError("this index needs faiss: pip install 'grank-kernels[bench]'") from None
    faiss.omp_set_num_threads(torch.get_num_threads())
    return faiss
