"""The cpu backend of candidate_cross_attention: instruction sets, threads, memory."""

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from oracle import isas, run_python
from ranker_checks import check_attention
from ranker_oracle import FLOATS, Attention, attention

import grank_kernels as gk
from grank_kernels.backends import cpu

pytestmark = pytest.mark.skipif(cpu.unavailable() is not None, reason=str(cpu.unavailable()))
ISAS = isas()
ONE_ORDER = [isa for isa in ISAS if isa not in ("baseline", "avx512bf16", "amx")]  # equal order of sums


@pytest.fixture
def _threads_restored() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def results(problem: Attention) -> list[torch.Tensor]:
    """`out` and every gradient."""
    out = problem.attend("cpu")
    return [out, *problem.gradients("cpu", torch.ones_like(out))]


def assert_equal(got: list[torch.Tensor], want: list[torch.Tensor], case: object) -> None:
    for x, y in zip(got, want, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=0, equal_nan=True, msg=lambda m: f"{case}: {m}")


@pytest.mark.parametrize("isa", ISAS, indirect=True)
@pytest.mark.parametrize("activation", ["softmax", "silu"])
@pytest.mark.parametrize("dtype", FLOATS, ids=lambda dtype: str(dtype)[6:])
def test_every_instruction_set(dtype: torch.dtype, activation: str, isa: str) -> None:
    assert cpu.isa() == isa
    problem = attention([0, 1, 95, 200], 70, 2, 37, bias=True, dtype=dtype, activation=activation)
    check_attention(problem, "cpu")


@pytest.mark.skipif(len(ONE_ORDER) < 2, reason="one instruction set with FMA here")
@pytest.mark.parametrize("queries", ["dense", "shared", "ragged"])
@pytest.mark.parametrize("activation", ["softmax", "silu"])
@pytest.mark.parametrize("dtype", FLOATS, ids=lambda dtype: str(dtype)[6:])
def test_same_bits_for_every_instruction_set_with_fma(queries: str, activation: str, dtype: torch.dtype) -> None:
    problem = attention([0, 1, 95, 200], 70, 2, 37, bias=True, queries=queries, dtype=dtype, activation=activation)
    found = []
    for isa in ONE_ORDER:
        with cpu.using_isa(isa):
            found.append(results(problem))
    for isa, got in zip(ONE_ORDER[1:], found[1:], strict=True):
        assert_equal(got, found[0], isa)


@pytest.mark.usefixtures("_threads_restored")
@pytest.mark.parametrize("queries", ["dense", "shared", "ragged"])
@pytest.mark.parametrize("activation", ["softmax", "silu"])
@pytest.mark.parametrize("dtype", FLOATS, ids=lambda dtype: str(dtype)[6:])
def test_any_number_of_threads(queries: str, activation: str, dtype: torch.dtype) -> None:
    problem = attention([300, 0, 129], 280, 2, 40, queries=queries, dtype=dtype, bias=True, activation=activation)
    torch.set_num_threads(1)
    want = results(problem)
    for threads in (2, 3, 40):
        torch.set_num_threads(threads)
        assert_equal(results(problem), want, f"{threads} threads")


def test_many_callers_at_once() -> None:
    problems = [
        attention([40 * (i % 4), 7], 30 + 50 * (i % 3), 1 + i % 2, 8 + 5 * i, dtype=FLOATS[i % 3], bias=i % 2 == 0)
        for i in range(8)
    ]
    alone = [results(problem) for problem in problems]
    with ThreadPoolExecutor(4) as pool:
        for i, got in enumerate(pool.map(lambda i: results(problems[i % 8]), range(24))):
            assert_equal(got, alone[i % 8], i)


@pytest.mark.parametrize("activation", ["softmax", "silu"])
def test_a_query_alone_and_among_others(activation: str) -> None:
    """Bits do not depend on a query's position, and a key's gradient does not depend on the other keys."""
    problem = attention([150], 200, 1, 32, history="dense", activation=activation)
    whole = problem.attend("cpu")
    for c in (0, 63, 64, 130, 199):
        alone = problem.but(q=problem.q[:, c : c + 1])
        assert torch.equal(alone.attend("cpu")[:, 0], whole[:, c]), c


MEMORY = """
import torch
import grank_kernels as gk
from grank_kernels.backends import cpu
from grank_kernels.backends.problems import CandidateCrossAttentionProblem

def kilobytes(field):
    for line in open("/proc/self/status"):
        if line.startswith(field):
            return int(line.split()[1])

def peak(call):
    open("/proc/self/clear_refs", "w").write("5")  # the peak is now what is in use
    before = kilobytes("VmRSS")
    result = call()
    return kilobytes("VmHWM") - before, result

torch.set_num_threads(2)
q, k, v, grad = (torch.randn(4, 1000, 1, 128) for _ in range(4))
few_grad, *few = [x[:, :3].contiguous() for x in (grad, q, k, v)]
few, many = CandidateCrossAttentionProblem(*few), CandidateCrossAttentionProblem(q, k, v)
cpu.candidate_cross_attention_backward(few_grad, None, few, *cpu.candidate_cross_attention(few))
size, outputs = peak(lambda: cpu.candidate_cross_attention(many))
print(size)
print(peak(lambda: cpu.candidate_cross_attention_backward(grad, None, many, *outputs))[0])
"""


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="peak memory is read from Linux's /proc")
def test_memory_of_a_call() -> None:
    """Memory is the outputs and the scratch stated in the kernel's header; all weights would take 16 MB."""
    done = run_python(MEMORY, MALLOC_MMAP_THRESHOLD_="16384")
    assert done.returncode == 0, done.stderr
    forward, backward = (int(line) * 1024 for line in done.stdout.splitlines())
    queries, d, keys = 4 * 1000, 128, 128
    row, thread = 4 * d, 6 * (128 * 4 * d + keys * (3 * d + 128) + 64 * d)
    assert forward < queries * (row + 4) + 2 * thread + (256 << 10)
    assert backward < queries * (3 * row + 4) + 4 * 6 * (keys * (4 * d + 256) + 512 * d) + (256 << 10)


def far_biases(kind: str, keys: int) -> torch.Tensor | None:
    """Finite biases up to the largest float32, two of them equal."""
    bias = torch.randn(2, keys, 1)
    match kind:
        case "two huge":
            bias[:, [70, keys - 10]] = 3e38
        case "all low":
            bias[:] = -3e38
        case "some low":
            bias[:, ::2] = -3e38
    return None if kind == "none" else bias


@pytest.mark.parametrize("isa", ISAS, indirect=True)
@pytest.mark.parametrize("biases", ["none", "two huge", "all low", "some low"])
@pytest.mark.parametrize("size", [1.0, 2e9, -2e9, 1e20, 1e37])
def test_finite_logits_of_any_size_have_the_weights_of_torch(size: float, biases: str, isa: str) -> None:
    """Exact products in float32: ties among the largest logits, vanishing neighbours, and both in one batch."""
    q = torch.zeros(2, 37, 1, 16)
    q[..., 0], q[..., 1] = torch.randint(0, 2, (2, 37, 1)), torch.randint(0, 2, (2, 37, 1))
    k = torch.zeros(2, 150, 1, 16)
    k[..., 0], k[..., 1] = torch.randint(-4, 5, (2, 150, 1)) * 0.25 * size, torch.randint(-4, 5, (2, 150, 1)) * 0.5
    v, grad_out, bias = torch.randn(2, 150, 1, 16), torch.randn(2, 37, 1, 16), far_biases(biases, 150)
    leaves = [x.requires_grad_() for x in (q, k, v, bias) if x is not None]
    got, lse = gk.candidate_cross_attention(q, k, v, bias_k=bias, softmax_scale=0.5, return_lse=True, backend="cpu")
    logits = torch.einsum("bchd,blhd->bhcl", q, k) * 0.5
    logits = logits if bias is None else logits + bias.permute(0, 2, 1)[:, :, None]
    want = torch.einsum("bhcl,blhd->bchd", logits.softmax(-1), v)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lse, logits.logsumexp(-1).permute(0, 2, 1), rtol=1e-6, atol=1e-5)
    got_grads = torch.autograd.grad(got, leaves, grad_out)
    for i, (x, y) in enumerate(zip(got_grads, torch.autograd.grad(want, leaves, grad_out), strict=True)):
        terms = float(k.detach().abs().max()) if i == 0 else 1.0  # the terms of the gradient of q
        torch.testing.assert_close(x, y, rtol=1e-5, atol=2e-5 * max(1.0, terms))
