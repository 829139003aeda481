"""`mips_topk` beside what else finds the k largest inner products: same table, same queries, same threads, one run.

Where torch sees a GPU the same is run there, on a larger table. Every contender's answer is checked against torch's
float32 scores before it is timed. One that keeps float32 rows must return the true scores; for the others the share of
the true k is reported as recall.
"""

import os
import time
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any, NamedTuple

import limits
import numpy as np
import pytest
import torch

import grank_kernels as gk
from grank_kernels.backends import cpu

Search = Callable[[torch.Tensor, int], Any]  # (B, d) float32, k -> indices (B, k)
pytestmark = pytest.mark.filterwarnings("default")  # the peers' own

THREADS = torch.get_num_threads()
TOLERANCE = 1e-4  # of float32 scores around 30
SECONDS_A_CASE = 2.0
BATCHES = {"cpu": (1, 16, 256), "cuda": (1, 16, 256, 1024)}
MAX_K = 2000


class Problem:
    """One table, its queries, and the true answer, the same for every contender of a device."""

    def __init__(self, N: int, d: int, device: str):
        generator = torch.Generator(device).manual_seed(0)
        self.N, self.d, self.device = N, d, device
        self.items = torch.randn(N, d, generator=generator, device=device)
        self.queries = torch.randn(max(BATCHES[device]), d, generator=generator, device=device)
        self.max_k = min(MAX_K, N)
        parts = [torch.topk(part @ self.items.T, self.max_k).values for part in self.queries.split(16)]
        self.true_scores = torch.cat(parts)  # (batch, max_k)

    def scores(self, indices: torch.Tensor) -> torch.Tensor:
        """True scores of what a search returned, (B, k), best first."""
        rows = self.items[indices]
        return torch.einsum("bkd,bd->bk", rows, self.queries[: len(indices)]).sort(1, descending=True).values


class Contender(NamedTuple):
    dtype: torch.dtype  # of the rows that a search reads
    build: Callable[[torch.Tensor], Search]
    max_batch: int = 1 << 30  # some are one query at a time inside, and take minutes


def ours(backend: str, dtype: torch.dtype, items: torch.Tensor) -> Search:
    table = items if dtype == torch.float32 else gk.ItemTable.from_rows(items, dtype=dtype)
    return lambda queries, k: gk.mips_topk(queries, table, k, backend=backend).indices


def torch_topk(dtype: torch.dtype, items: torch.Tensor) -> Search:
    rows = items.to(dtype)
    return lambda queries, k: torch.topk(queries.to(dtype) @ rows.T, k).indices


def faiss_flat(items: torch.Tensor) -> Search:
    faiss = _peer("faiss", "faiss-cpu")
    faiss.omp_set_num_threads(THREADS)
    index = faiss.IndexFlatIP(items.shape[1])
    index.add(items.numpy())
    return lambda queries, k: index.search(queries.numpy(), k)[1]


def faiss_quantised(kind: str, items: torch.Tensor) -> Search:
    faiss = _peer("faiss", "faiss-cpu")
    faiss.omp_set_num_threads(THREADS)
    quantiser = getattr(faiss.ScalarQuantizer, kind)
    index = faiss.IndexScalarQuantizer(items.shape[1], quantiser, faiss.METRIC_INNER_PRODUCT)
    index.train(items[:100_000].numpy())
    index.add(items.numpy())
    return lambda queries, k: index.search(queries.numpy(), k)[1]


def scann_brute_force(items: torch.Tensor) -> Search:
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    scann = _peer("scann", "scann")
    builder = scann.scann_ops_pybind.builder(items.numpy(), 10, "dot_product")
    searcher = builder.score_brute_force(quantize=False).build()
    searcher.set_num_threads(THREADS)

    def search(queries: torch.Tensor, k: int) -> Any:
        if len(queries) == 1:
            return searcher.search(queries[0].numpy(), final_num_neighbors=k)[0][None]
        return searcher.search_batched_parallel(queries.numpy(), final_num_neighbors=k)[0]

    return search


def usearch_exact(items: torch.Tensor) -> Search:
    index = _peer("usearch.index", "usearch")
    rows, metric = items.numpy(), index.MetricKind.IP

    def search(queries: torch.Tensor, k: int) -> Any:
        found = index.search(rows, queries.numpy(), k, metric, exact=True, threads=THREADS)
        return found.keys.astype(np.int64).reshape(len(queries), k)

    return search


def faiss_knn_gpu(dtype: torch.dtype, items: torch.Tensor) -> Search:
    faiss = _peer("faiss", "faiss-gpu")
    if not hasattr(faiss, "StandardGpuResources"):
        pytest.skip("the installed faiss is without its GPU part: pip install faiss-gpu")
    import faiss.contrib.torch_utils

    resources, rows, metric = faiss.StandardGpuResources(), items.to(dtype), faiss.METRIC_INNER_PRODUCT
    return lambda queries, k: faiss.knn_gpu(resources, queries.to(dtype), rows, k, metric=metric)[1]


def cuvs_brute_force(dtype: torch.dtype, items: torch.Tensor) -> Search:
    brute_force = _peer("cuvs.neighbors.brute_force", "cuvs")
    rows = items.to(dtype)
    index = brute_force.build(rows, metric="inner_product")

    def search(queries: torch.Tensor, k: int) -> Any:
        found = torch.empty(len(queries), k, dtype=torch.int64, device=queries.device)
        brute_force.search(index, queries.to(dtype), k, neighbors=found)
        return found

    return search


def _peer(module: str, package: str) -> Any:
    return pytest.importorskip(module, reason=f"{package} is not installed: pip install {package}")


CONTENDERS = {
    "cpu": {
        "mips_topk float32": Contender(torch.float32, partial(ours, "cpu", torch.float32)),
        "torch matmul+topk float32": Contender(torch.float32, partial(torch_topk, torch.float32)),
        "FAISS IndexFlatIP": Contender(torch.float32, faiss_flat),
        "ScaNN brute force": Contender(torch.float32, scann_brute_force),
        "usearch exact": Contender(torch.float32, usearch_exact, max_batch=16),
        "mips_topk float16": Contender(torch.float16, partial(ours, "cpu", torch.float16)),
        "FAISS SQfp16": Contender(torch.float16, partial(faiss_quantised, "QT_fp16"), max_batch=16),
        "mips_topk bfloat16": Contender(torch.bfloat16, partial(ours, "cpu", torch.bfloat16)),
        "torch matmul+topk bfloat16": Contender(torch.bfloat16, partial(torch_topk, torch.bfloat16)),
        "mips_topk int8": Contender(torch.int8, partial(ours, "cpu", torch.int8)),
        "FAISS SQ8": Contender(torch.int8, partial(faiss_quantised, "QT_8bit"), max_batch=16),
    },
    "cuda": {
        "mips_topk float32": Contender(torch.float32, partial(ours, "triton", torch.float32)),
        "torch matmul+topk float32": Contender(torch.float32, partial(torch_topk, torch.float32)),
        "FAISS knn_gpu float32": Contender(torch.float32, partial(faiss_knn_gpu, torch.float32)),
        "cuVS brute_force float32": Contender(torch.float32, partial(cuvs_brute_force, torch.float32)),
        "mips_topk float16": Contender(torch.float16, partial(ours, "triton", torch.float16)),
        "torch matmul+topk float16": Contender(torch.float16, partial(torch_topk, torch.float16)),
        "FAISS knn_gpu float16": Contender(torch.float16, partial(faiss_knn_gpu, torch.float16)),
        "cuVS brute_force float16": Contender(torch.float16, partial(cuvs_brute_force, torch.float16)),
        "mips_topk bfloat16": Contender(torch.bfloat16, partial(ours, "triton", torch.bfloat16)),
        "mips_topk int8": Contender(torch.int8, partial(ours, "triton", torch.int8)),
    },
}
CASES = [  # device, B, k
    (device, B, k)
    for device in ("cpu", "cuda")[: 1 + torch.cuda.is_available()]
    for B, k in [*((B, 100) for B in BATCHES[device]), (16, 10), (16, 500), (16, 2000)]
]


@pytest.fixture(scope="session")
def problems(request: pytest.FixtureRequest) -> Callable[[str], Problem]:
    """The problem of a device, made at first use."""
    option = request.config.getoption
    sizes = {"cpu": ("--bench-n", "--bench-d"), "cuda": ("--bench-gpu-n", "--bench-gpu-d")}
    return lru_cache(maxsize=None)(lambda device: Problem(*map(option, sizes[device]), device))


@pytest.fixture(scope="session")
def searches(problems: Callable[[str], Problem]) -> Callable[[str, str], Search]:
    """Every contender's search over the rows of its device, built at first use; it ends when its answer is there."""

    def build(device: str, name: str) -> Search:
        search = CONTENDERS[device][name].build(problems(device).items)
        return lambda queries, k: limits.finished(partial(search, queries, k), device)()

    return lru_cache(maxsize=None)(build)


@pytest.mark.parametrize(
    ("device", "B", "k", "name"),
    [
        pytest.param(device, B, k, name, id=f"{device}-B{B}-k{k}-{name}")
        for device, B, k in CASES
        for name, contender in CONTENDERS[device].items()
        if contender.max_batch >= B
    ],
)
def test_mips_topk(
    benchmark: Any,
    problems: Callable[[str], Problem],
    searches: Callable[[str, str], Search],
    matmul_limit: Callable[[torch.dtype, str], float],
    device: str,
    B: int,
    k: int,
    name: str,
) -> None:
    problem = problems(device)
    if k > problem.N:
        pytest.skip(f"k is {k}, the table has {problem.N} rows")
    search, dtype, queries = searches(device, name), CONTENDERS[device][name].dtype, problem.queries[:B]
    try:
        recall = _check(problem, search(queries, k), k, dtype)
    except torch.OutOfMemoryError as error:  # a (B, N) score matrix, for those who make one
        pytest.skip(f"{name} needs more memory than the GPU has: {error}")
    start = time.perf_counter()
    search(queries, k)
    rounds = int(SECONDS_A_CASE / (time.perf_counter() - start))
    benchmark.group = f"{device} B={B} k={k}"
    benchmark.pedantic(search, (queries, k), rounds=max(3, min(50, rounds)))
    if benchmark.stats is None:  # --benchmark-disable: the answers are checked, nothing is timed
        return
    median = benchmark.stats.stats.median
    nbytes = problem.N * problem.d * dtype.itemsize
    operations = 2 * B * problem.N * problem.d
    read_limit = limits.read_bandwidth(nbytes, device)
    multiplied = torch.float32 if (dtype, device) == (torch.float16, "cpu") else dtype
    benchmark.extra_info |= {
        "label": "measured",
        "contender": name,
        "device": device if device == "cpu" else torch.cuda.get_device_name(),
        "dtype": str(dtype).removeprefix("torch."),
        "N": problem.N,
        "d": problem.d,
        "B": B,
        "k": k,
        "recall": recall,
        "bytes": nbytes,
        "operations": operations,
        "GB/s": nbytes / median / 1e9,
        "Gop/s": operations / median / 1e9,
        "probe GB/s": read_limit,
        "matmul Gop/s": matmul_limit(multiplied, device),
        "threads": THREADS,
        "isa": cpu.isa(),
    }
    print(
        f"{device} {name} B={B} k={k}: {median * 1e3:.2f} ms measured, recall {recall:.4f}, {nbytes / 1e6:.0f} MB at "
        f"{nbytes / median / 1e9:.1f} of {read_limit:.1f} GB/s, {operations / median / 1e9:.0f} Gop/s"
    )


def _check(problem: Problem, found: Any, k: int, dtype: torch.dtype) -> float:
    """Recall by score: a tie with the k-th is no miss. A contender with float32 rows must return the true scores."""
    indices = torch.as_tensor(found).to(problem.device, torch.int64)
    assert indices.shape[1] == k
    assert all(len(row.unique()) == k for row in indices), "an index stands twice in one answer"
    scores, true = problem.scores(indices), problem.true_scores[: len(indices), :k]
    if dtype == torch.float32:
        torch.testing.assert_close(scores, true, rtol=0, atol=TOLERANCE)
    recall = (scores >= true[:, -1:] - TOLERANCE).float().mean().item()
    assert recall > 0.9
    return recall
