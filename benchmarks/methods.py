"""`mips_topk` and its peers: each method is a function from items to a search for the k largest inner products."""

import os
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

import grank_kernels as gk

Search = Callable[[torch.Tensor, int], Any]  # (B, d) float32, k -> indices (B, k)
THREADS = torch.get_num_threads()


class Method(NamedTuple):
    dtype: torch.dtype  # the result is exact for rows of this dtype
    build: Callable[[torch.Tensor], Search]
    max_batch: int = 1 << 30  # limit for methods that loop over queries
    reads: torch.dtype | None = None  # dtype of the rows read by the scan, if different
    axes: bool = False  # whether it is also measured over N and d

    @property
    def bytes_a_number(self) -> int:
        return (self.reads or self.dtype).itemsize


def ours(backend: str, dtype: torch.dtype, items: torch.Tensor, *, coarse: torch.dtype | None = None) -> Search:
    plain = dtype == torch.float32 and coarse is None
    table = items if plain else gk.ItemTable.from_rows(items, dtype=dtype, coarse=coarse)
    return lambda queries, k: gk.mips_topk(queries, table, k, backend=backend).indices


def torch_topk(dtype: torch.dtype, items: torch.Tensor) -> Search:
    rows = items.to(dtype)
    return lambda queries, k: torch.topk(queries.to(dtype) @ rows.T, k).indices


def torch_compiled(items: torch.Tensor) -> Search:
    compiled = torch.compile(lambda queries, rows, k: torch.topk(queries @ rows.T, k).indices)
    return lambda queries, k: compiled(queries, items, k)


def faiss_flat(items: torch.Tensor) -> Search:
    faiss = peer("faiss", "faiss-cpu")
    faiss.omp_set_num_threads(THREADS)
    index = faiss.IndexFlatIP(items.shape[1])
    index.add(items.numpy())
    return lambda queries, k: index.search(queries.numpy(), k)[1]


def faiss_quantised(kind: str, items: torch.Tensor) -> Search:
    faiss = peer("faiss", "faiss-cpu")
    faiss.omp_set_num_threads(THREADS)
    quantiser = getattr(faiss.ScalarQuantizer, kind)
    index = faiss.IndexScalarQuantizer(items.shape[1], quantiser, faiss.METRIC_INNER_PRODUCT)
    index.train(items[:100_000].numpy())
    index.add(items.numpy())
    return lambda queries, k: index.search(queries.numpy(), k)[1]


def scann_builder(items: torch.Tensor, k: int) -> Any:
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    return peer("scann", "scann").scann_ops_pybind.builder(items.numpy(), k, "dot_product")


def scann_search(searcher: Any, queries: torch.Tensor, k: int, **options: int) -> Any:
    """Search with one thread for one query, all threads for several; padded with -1 to k items."""
    if len(queries) == 1:
        return searcher.search(queries[0].numpy(), final_num_neighbors=k, **options)[0][None]
    found, scores = searcher.search_batched_parallel(queries.numpy(), final_num_neighbors=k, **options)
    return np.where(np.isnan(scores), -1, found.astype(np.int64))


def scann_brute_force(items: torch.Tensor) -> Search:
    searcher = scann_builder(items, 10).score_brute_force(quantize=False).build()
    searcher.set_num_threads(THREADS)
    return partial(scann_search, searcher)


def usearch_exact(items: torch.Tensor) -> Search:
    index = peer("usearch.index", "usearch")
    rows, metric = items.numpy(), index.MetricKind.IP

    def search(queries: torch.Tensor, k: int) -> Any:
        found = index.search(rows, queries.numpy(), k, metric, exact=True, threads=THREADS)
        return found.keys.astype(np.int64).reshape(len(queries), k)

    return search


def faiss_knn_gpu(dtype: torch.dtype, items: torch.Tensor) -> Search:
    faiss = peer("faiss", "faiss-gpu")
    if not hasattr(faiss, "StandardGpuResources"):
        pytest.skip("the installed faiss has no GPU support: pip install faiss-gpu")
    import faiss.contrib.torch_utils

    resources, rows, metric = faiss.StandardGpuResources(), items.to(dtype), faiss.METRIC_INNER_PRODUCT
    return lambda queries, k: faiss.knn_gpu(resources, queries.to(dtype), rows, k, metric=metric)[1]


def cuvs_brute_force(dtype: torch.dtype, items: torch.Tensor) -> Search:
    brute_force = peer("cuvs.neighbors.brute_force", "cuvs")
    rows = items.to(dtype)
    index = brute_force.build(rows, metric="inner_product")

    def search(queries: torch.Tensor, k: int) -> Any:
        found = torch.empty(len(queries), k, dtype=torch.int64, device=queries.device)
        brute_force.search(index, queries.to(dtype), k, neighbors=found)
        return found

    return search


def peer(module: str, package: str) -> Any:
    return pytest.importorskip(module, reason=f"{package} is not installed: pip install {package}")


def certified(backend: str) -> Method:
    build = partial(ours, backend, torch.float32, coarse=torch.int8)
    return Method(torch.float32, build, reads=torch.int8, axes=True)


METHODS = {
    "cpu": {
        "mips_topk float32": Method(torch.float32, partial(ours, "cpu", torch.float32), axes=True),
        "mips_topk float32, int8 copy": certified("cpu"),
        "torch matmul+topk float32": Method(torch.float32, partial(torch_topk, torch.float32), axes=True),
        "torch compiled float32": Method(torch.float32, torch_compiled),
        "FAISS IndexFlatIP": Method(torch.float32, faiss_flat, axes=True),
        "ScaNN brute force": Method(torch.float32, scann_brute_force),
        "usearch exact": Method(torch.float32, usearch_exact, max_batch=16),
        "mips_topk float16": Method(torch.float16, partial(ours, "cpu", torch.float16)),
        "FAISS SQfp16": Method(torch.float16, partial(faiss_quantised, "QT_fp16"), max_batch=16),
        "mips_topk bfloat16": Method(torch.bfloat16, partial(ours, "cpu", torch.bfloat16), axes=True),
        "torch matmul+topk bfloat16": Method(torch.bfloat16, partial(torch_topk, torch.bfloat16)),
        "mips_topk int8": Method(torch.int8, partial(ours, "cpu", torch.int8), axes=True),
        "FAISS SQ8": Method(torch.int8, partial(faiss_quantised, "QT_8bit"), max_batch=16),
    },
    "cuda": {
        "mips_topk float32": Method(torch.float32, partial(ours, "triton", torch.float32)),
        "mips_topk float32, int8 copy": certified("triton"),
        "torch matmul+topk float32": Method(torch.float32, partial(torch_topk, torch.float32)),
        "torch compiled float32": Method(torch.float32, torch_compiled),
        "FAISS knn_gpu float32": Method(torch.float32, partial(faiss_knn_gpu, torch.float32)),
        "cuVS brute_force float32": Method(torch.float32, partial(cuvs_brute_force, torch.float32)),
        "mips_topk float16": Method(torch.float16, partial(ours, "triton", torch.float16)),
        "torch matmul+topk float16": Method(torch.float16, partial(torch_topk, torch.float16)),
        "FAISS knn_gpu float16": Method(torch.float16, partial(faiss_knn_gpu, torch.float16)),
        "cuVS brute_force float16": Method(torch.float16, partial(cuvs_brute_force, torch.float16)),
        "mips_topk bfloat16": Method(torch.bfloat16, partial(ours, "triton", torch.bfloat16)),
        "mips_topk int8": Method(torch.int8, partial(ours, "triton", torch.int8)),
    },
}
