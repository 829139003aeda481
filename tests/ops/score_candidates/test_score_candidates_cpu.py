"""The cpu backend of score_candidates: instruction sets, threads, memory."""

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from oracle import isas, run_python
from ranker_checks import check_scores
from ranker_oracle import FLOATS, HEAD, Scoring, scoring

from grank_kernels.backends import cpu

pytestmark = pytest.mark.skipif(cpu.unavailable() is not None, reason=str(cpu.unavailable()))
ISAS = isas()
ONE_ORDER = [isa for isa in ISAS if isa not in ("baseline", "avx512bf16", "amx")]  # equal order of sums
TABLES = (*FLOATS, torch.int8)


@pytest.fixture
def _threads_restored() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("isa", ISAS, indirect=True)
@pytest.mark.parametrize("activation", HEAD)
@pytest.mark.parametrize("dtype", FLOATS, ids=lambda dtype: str(dtype)[6:])
def test_every_instruction_set(dtype: torch.dtype, activation: str, isa: str) -> None:
    assert cpu.isa() == isa
    for table in (dtype, torch.int8):
        problem = scoring([0, 1, 95, 200], 70, 130, 37, dtype=dtype, table=table, activation=activation)
        check_scores(problem, "cpu")


@pytest.mark.skipif(len(ONE_ORDER) < 2, reason="one instruction set with FMA here")
@pytest.mark.parametrize("activation", HEAD)
@pytest.mark.parametrize("table", TABLES, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("dtype", FLOATS, ids=lambda dtype: str(dtype)[6:])
def test_same_bits_for_every_instruction_set_with_fma(dtype: torch.dtype, table: torch.dtype, activation: str) -> None:
    problem = scoring([0, 1, 95, 200], 70, 130, 37, dtype=dtype, table=table, activation=activation)
    found = []
    for isa in ONE_ORDER:
        with cpu.using_isa(isa):
            found.append(problem.scores("cpu"))
    for isa, got in zip(ONE_ORDER[1:], found[1:], strict=True):
        assert torch.equal(got, found[0]), isa


@pytest.mark.usefixtures("_threads_restored")
@pytest.mark.parametrize("table", TABLES, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("dtype", FLOATS, ids=lambda dtype: str(dtype)[6:])
def test_any_number_of_threads(dtype: torch.dtype, table: torch.dtype) -> None:
    problem = scoring([300, 0, 129], 700, 48, 40, dtype=dtype, table=table)
    torch.set_num_threads(1)
    want = problem.scores("cpu")
    for threads in (2, 3, 40):
        torch.set_num_threads(threads)
        assert torch.equal(problem.scores("cpu"), want), threads


def test_many_callers_at_once() -> None:
    problems = [
        scoring([40 * (i % 4), 7], 30 + 50 * (i % 3), 8 + 5 * i, 20, dtype=FLOATS[i % 3], table=TABLES[i % 4])
        for i in range(12)
    ]
    alone = [problem.scores("cpu") for problem in problems]
    with ThreadPoolExecutor(6) as pool:
        for i, got in enumerate(pool.map(lambda i: problems[i % 12].scores("cpu"), range(60))):
            assert torch.equal(got, alone[i % 12]), i


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_logits_of_any_size(scale: float) -> None:
    """Keys in ascending, descending and mixed order of logits: the running maximum, and vanishing weights."""
    base = scoring([300] * 3, 40, 16, 16, softmax_scale=1.0)
    rows = base.items
    assert isinstance(rows, torch.Tensor)
    order = torch.linspace(-1, 1, 300)
    keys = torch.cat([order, order.flip(0), order[torch.randperm(300)]])[:, None] * torch.ones(16) * scale
    problem = base.but(items=rows.abs() * min(1.0, 1e3 / scale), keys=keys)
    exact, plain = problem.formula(torch.float64), problem.formula(torch.float32)
    there = problem.candidate_ids >= 0
    error = (problem.scores("cpu").double() - exact)[there].abs().max()
    assert error <= 2 * (plain.double() - exact)[there].abs().max() + 2e-6 * exact[there].abs().max()


def test_flushed_denormals_change_nothing() -> None:
    problem = scoring([50, 3], 40)
    tiny = problem.but(
        user_hidden=problem.user_hidden * 1e-42, values=problem.values * 1e-42, item_weight=torch.zeros(16, 16)
    )
    want = tiny.scores("cpu")
    assert torch.set_flush_denormal(True)
    try:
        got = tiny.scores("cpu")
    finally:
        torch.set_flush_denormal(False)
    assert torch.equal(got, want)


MEMORY = """
import torch
from ranker_oracle import scoring

def kilobytes(field):
    for line in open("/proc/self/status"):
        if line.startswith(field):
            return int(line.split()[1])

torch.set_num_threads(2)
for dtype in (torch.float32, torch.bfloat16):
    problem = scoring([1000] * 8, 2000, 128, 128, 20000, dtype=dtype)
    problem.but(candidate_ids=problem.candidate_ids[:, :1]).scores("cpu")
    open("/proc/self/clear_refs", "w").write("5")  # the peak is now what is in use
    before = kilobytes("VmRSS")
    problem.scores("cpu")
    print(kilobytes("VmHWM") - before)
"""


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="peak memory is read from Linux's /proc")
def test_memory_of_a_call() -> None:
    """Memory is the scores and the scratch stated in the kernel's header; gathered rows would take 8 MB."""
    done = run_python(MEMORY, MALLOC_MMAP_THRESHOLD_="16384")
    assert done.returncode == 0, done.stderr
    float32, bfloat16 = (int(line) for line in done.stdout.splitlines())
    scores, d, h, keys = 8 * 2000 * 4, 128, 128, 128
    thread = 4 * (4 * 64 * (d + h) + keys * (d + 2 * h + 64) + keys * 64 + 64 * d)
    assert float32 * 1024 < 1.5 * (2 * thread + 2 * 4 * d * h) + scores + (256 << 10)
    assert bfloat16 * 1024 < 2 * thread + 2 * 4 * d * h + scores + (256 << 10)


def test_keys_and_values_of_any_stride() -> None:
    problem = scoring([70, 64], 40, 32, 32, dtype=torch.bfloat16)
    want = problem.scores("cpu")
    wide = [torch.randn(134, 2 * x.shape[1] + 3).bfloat16() for x in (problem.keys, problem.values)]
    views = [w[:, 3 : 3 + x.shape[1]].copy_(x) for w, x in zip(wide, (problem.keys, problem.values), strict=True)]
    assert views[0].data_ptr() % 64 != 0
    assert views[0].stride(0) != 32
    assert torch.equal(problem.but(keys=views[0], values=views[1]).scores("cpu"), want)
    turned = Scoring(**{**vars(problem), "keys": problem.keys.T.contiguous().T})
    assert torch.equal(turned.scores("cpu"), want)


@pytest.mark.parametrize("isa", ISAS, indirect=True)
@pytest.mark.parametrize("table", [torch.float32, torch.int8])
@pytest.mark.parametrize("size", [2e9, -2e9, 1e20, 1e35])
def test_finite_logits_of_any_size_have_the_weights_of_torch(size: float, table: torch.dtype, isa: str) -> None:
    """Ties among the largest logits and ordinary logits, in one batch."""
    base = scoring([300] * 3, 40, 16, 16, table=table, softmax_scale=1.0)
    keys = torch.zeros(900, 16)
    keys[:, 0] = torch.randint(-4, 5, (900,)) * size
    problem = base.but(keys=keys)
    exact = problem.formula(torch.float64)
    there = problem.candidate_ids >= 0
    torch.testing.assert_close(problem.scores("cpu")[there].double(), exact[there], rtol=1e-4, atol=1e-4)
