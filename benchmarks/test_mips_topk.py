"""`mips_topk` beside other libraries' searches: equal tables, queries and threads, one run.

Varies one of N, d, B and k at a time around N x d rows, 16 queries and k = 100. On a GPU, B and k are varied too, over
a larger table. Every result is checked against torch's float32 scores before it is timed: methods that are exact for
float32 rows must return the true scores, for others the recall is reported.
"""

from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any, NamedTuple

import pytest
import torch

from benchmarks import limits
from benchmarks.measure import TURNS, Latest, available_bytes, measure
from benchmarks.methods import METHODS, Search

pytestmark = pytest.mark.filterwarnings("default")  # warnings of the peers

TOLERANCE = 1e-4  # for float32 scores around 30
BATCHES = {"cpu": (1, 16, 256), "cuda": (1, 16, 256, 1024)}
KS = (10, 100, 500, 2000)


class Case(NamedTuple):
    device: str
    N: int
    d: int
    B: int = 16
    k: int = 100

    def __str__(self) -> str:
        return f"{self.device} {self.N:_} x {self.d} B={self.B} k={self.k}"

    def id(self) -> str:
        """The case's id."""
        return f"{self.device}-N{self.N}-d{self.d}-B{self.B}-k{self.k}"


def cases(device: str, N: int, d: int) -> list[tuple[Case, bool]]:
    """(case, whether only the methods with `axes` run), ordered by table."""
    middle = [Case(device, N, d, B) for B in BATCHES[device]] + [Case(device, N, d, k=k) for k in KS if k != 100]
    axes = [Case(device, n, d) for n in (N // 100, N // 10, 10 * N)] + [Case(device, N, w) for w in (d // 4, 4 * d)]
    return [(case, False) for case in middle] + [(case, True) for case in axes if device == "cpu"]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    option = metafunc.config.getoption
    found = cases("cpu", option("--bench-n"), option("--bench-d"))
    if torch.cuda.is_available():
        found += cases("cuda", option("--bench-gpu-n"), option("--bench-gpu-d"))
    metafunc.parametrize(
        ("case", "name", "turn"),
        [
            pytest.param(case, name, turn, id=f"{case.id()}-{name}-{turn}")
            for case, axis in found
            for turn in TURNS
            for name, method in METHODS[case.device].items()
            if method.max_batch >= case.B and (method.axes or not axis)
        ],
    )


class Problem:
    """A table, its queries, the true result, and every method's search, built on first use."""

    def __init__(self, device: str, N: int, d: int):
        if device == "cpu" and 8 * N * d > available_bytes():
            pytest.skip(f"{N} x {d} float32 rows and a copy of them need {8e-9 * N * d:.1f} GB of memory")
        generator = torch.Generator(device).manual_seed(0)
        self.N, self.d, self.device = N, d, device
        self.items = torch.randn(N, d, generator=generator, device=device)
        self.queries = torch.randn(max(BATCHES[device]), d, generator=generator, device=device)
        self.true_scores = lru_cache(maxsize=None)(self._true_scores)
        self.search = lru_cache(maxsize=None)(self._search)
        self.recall = lru_cache(maxsize=None)(self._recall)

    def _true_scores(self, B: int, k: int) -> torch.Tensor:
        """(B, k), best first."""
        return torch.cat([torch.topk(part @ self.items.T, k).values for part in self.queries[:B].split(16)])

    def _search(self, name: str) -> Search:
        if self.device == "cpu" and 4 * self.N * self.d > available_bytes():
            pytest.skip(f"{name} over {self.N} x {self.d} rows needs more than the available memory")
        return METHODS[self.device][name].build(self.items)

    def _recall(self, name: str, B: int, k: int) -> float:
        """Recall by score, so ties with the k-th count. Methods exact for float32 must return the true scores."""
        indices = torch.as_tensor(self.search(name)(self.queries[:B], k)).to(self.device, torch.int64)
        assert indices.shape == (B, k)
        assert all(len(row.unique()) == k for row in indices), "an index stands twice in one answer"
        true = self.true_scores(B, k)
        scores = torch.einsum("bkd,bd->bk", self.items[indices], self.queries[:B]).sort(1, descending=True).values
        if METHODS[self.device][name].dtype == torch.float32:
            torch.testing.assert_close(scores, true, rtol=0, atol=TOLERANCE)
        recall = (scores >= true[:, -1:] - TOLERANCE).float().mean().item()
        assert recall > 0.9
        return recall


@pytest.fixture(scope="session")
def problems() -> Callable[[str, int, int], Problem]:
    """The problems, one in memory at a time."""
    return Latest(Problem)


def test_mips_topk(
    benchmark: Any,
    problems: Callable[[str, int, int], Problem],
    read_limit: Callable[[int, str], float],
    case: Case,
    name: str,
    turn: int,
) -> None:
    device, N, d, B, k = case
    if k > N:
        pytest.skip(f"k is {k}, the table has {N} rows")
    problem, method = problems(device, N, d), METHODS[device][name]
    try:
        recall = problem.recall(name, B, k)
    except torch.OutOfMemoryError as error:  # methods that store the (B, N) scores
        pytest.skip(f"{name} needs more memory than the GPU has: {error}")
    nbytes = N * d * method.bytes_a_number
    measure(
        benchmark,
        partial(problem.search(name), problem.queries[:B], k),
        op="mips_topk",
        method=name,
        case=str(case),
        dtype=str(method.dtype).removeprefix("torch."),
        device=device,
        nbytes=nbytes,
        operations=2 * B * N * d,
        N=N,
        d=d,
        B=B,
        k=k,
        recall=recall,
        **{"probe GB/s": read_limit(min(nbytes, limits.PROBE_BYTES), device)},
    )
