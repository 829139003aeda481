"""Results of candidate_cross_attention: against float64, and exact if every sum is exact."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ranker_checks import check_attention, same_bits, whole
from ranker_oracle import (
    FLOATS,
    Attention,
    attention,
    attention_sizes,
    backends_of,
    true_gradients,
)

from grank_kernels.backends import BACKENDS as BY_NAME

INF = math.inf
BACKENDS = backends_of("candidate_cross_attention")
LENGTHS = [0, 1, 2, 15, 16, 17, 63, 64, 65, 127, 129, 200]  # lengths of histories
COUNTS = [1, 2, 5, 15, 16, 17, 63, 64, 65, 100, 130]  # candidates per user
WIDTHS = [16, 32, 64, 128]
FORMS = [("dense", "ragged"), ("dense", "dense"), ("shared", "ragged"), ("shared", "dense"), ("ragged", "ragged"),
         ("ragged", "dense")]  # fmt: skip


pytestmark = pytest.mark.usefixtures("one_thread")


# ---- meaning ----


@pytest.mark.parametrize("i", range(12))
def test_error_is_at_most_twice_that_of_torch(i: int, activation: str, dtype: torch.dtype, backend: str) -> None:
    """Random combinations of every length, count and width, with three users, some with an empty history."""
    lengths = [LENGTHS[(5 * i + j) % len(LENGTHS)] for j in range(3)]
    C, H, D = COUNTS[i % len(COUNTS)], (1, 2, 4)[i % 3], WIDTHS[i % 4]
    queries, history = FORMS[i % len(FORMS)]
    bias = i % 2 == 1
    problem = attention(lengths, C, H, D, queries=queries, history=history, dtype=dtype, bias=bias)
    check_attention(problem.but(activation=activation), backend)


@pytest.mark.parametrize("bias", [False, True])
def test_forms(form: dict[str, str], bias: bool, activation: str, dtype: torch.dtype, backend: str) -> None:
    check_attention(
        attention([20, 0, 3, 65], 17, 2, 32, bias=bias, dtype=dtype, activation=activation, **form), backend
    )


def test_history_without_lengths(activation: str, backend: str) -> None:
    problem = attention([20, 20], 17, history="dense", activation=activation)
    problem = problem.but(k=problem.k[:, :20], v=problem.v[:, :20])
    same_bits(check_attention(problem.but(seqused_k=None), backend), problem.attend(backend).cpu())


@pytest.mark.parametrize(("H", "D"), [(1, 1), (3, 5), (1, 24), (2, 80), (1, 130), (5, 200)])
def test_other_widths(H: int, D: int, activation: str, dtype: torch.dtype, backend: str) -> None:
    problem = attention([70, 0, 3], 18, H, D, dtype=dtype, activation=activation)
    reason = BY_NAME[backend].candidate_cross_attention_unsupported(problem.q, problem.k, problem.v)
    if reason is None:
        check_attention(problem, backend)
    else:  # only GPU kernels have fixed widths
        assert backend == "cuda"
        with pytest.raises(ValueError, match="width"):
            problem.attend(backend)


@pytest.mark.parametrize("scale", [0.0, 0.7, -0.7])
def test_scale(scale: float, activation: str, backend: str) -> None:
    check_attention(attention([30, 5], softmax_scale=scale, activation=activation, bias=True), backend)


def test_default_backend(activation: str, backend: str) -> None:
    problem = attention([30, 0, 5], activation=activation)
    torch.testing.assert_close(problem.attend(None).cpu(), problem.attend(backend).cpu())


def test_lse(form: dict[str, str], dtype: torch.dtype, backend: str) -> None:
    problem = attention([20, 0, 3, 65], 17, 2, 32, bias=True, dtype=dtype, **form)
    out, lse = (x.cpu() for x in problem.attend(backend, return_lse=True))
    assert (lse.dtype, lse.shape) == (torch.float32, out.shape[:-1])
    wide = problem.cast(torch.float64)
    # The logarithm of a sum of weights, each rounded to the dtype at most once.
    tolerance = {"rtol": 1e-6, "atol": 1e-5 + (dtype != torch.float32) * torch.finfo(dtype).eps / 2}
    nobody = torch.ones(lse.shape, dtype=torch.bool)
    for b, (q, k, _, bias) in enumerate(wide.users()):
        logits = wide.scale() * torch.einsum("chd,lhd->hcl", q, k) + bias.T[:, None]
        want = logits.logsumexp(-1).T
        user = b if problem.cu_seqlens_q is None else slice(*problem.cu_seqlens_q[b : b + 2].tolist())
        torch.testing.assert_close(lse[user].double(), want.where(want > -INF, INF).detach(), **tolerance)
        nobody[user] = False
    assert (lse[nobody] == INF).all()
    assert (out[nobody] == 0).all()
    assert bool(nobody.any()) == (form["queries"] == "ragged")


# ---- bits ----


@pytest.mark.parametrize("length", [1, 2, 32, 64, 256])
@pytest.mark.parametrize("C", [1, 17, 64])
def test_equal_logits_average_exactly(
    length: int, C: int, activation: str, form: dict[str, str], dtype: torch.dtype, backend: str
) -> None:
    """Whole numbers, and L a power of two: every sum is exact in any order. silu(64) is 64."""
    problem = attention([length] * 2, C, 2, 16, bias=True, dtype=dtype, activation=activation, **form)
    nobody = problem.v.isnan()
    v, bias = whole(*problem.v.shape).masked_fill(nobody, math.nan), torch.zeros(problem.v.shape[:-1])
    bias += 64 if activation == "silu" else 5
    q, k = torch.zeros_like(problem.q), torch.ones_like(problem.k)
    problem = problem.but(q=q, k=k, v=v.to(dtype), bias_k=bias)
    exact = problem.cast(torch.float64).formula().detach()
    same_bits(problem.attend(backend).cpu(), exact.to(dtype))


def test_a_dominant_logit_gets_weight_1(dtype: torch.dtype, backend: str) -> None:
    """Query i matches key i by 1000 more than other keys: `out` is its value, and logits have a gradient of 0."""
    L = D = 64
    problem = attention([L, L], L, 1, D, queries="shared", history="dense", dtype=dtype)
    v = whole(2, L, 1, D).to(dtype)
    eye = torch.eye(L)[:, None]
    problem = Attention((eye * 1000).to(dtype), eye.expand(2, L, 1, D).to(dtype), v, softmax_scale=1.0)
    torch.testing.assert_close(problem.attend(backend).cpu(), v, rtol=2 * torch.finfo(dtype).eps, atol=0)
    grad_out = whole(2, L, 1, D).to(dtype)
    grad_q, grad_k, grad_v = problem.gradients(backend, grad_out)
    size = torch.finfo(dtype).eps * 2 * 64 * 16  # rounding of a sum of 64 products of numbers up to 4
    assert float(grad_q.abs().max()) <= size
    assert float(grad_k.abs().max()) <= 1000 * size
    torch.testing.assert_close(grad_v, grad_out, rtol=1e-4 + 2 * torch.finfo(dtype).eps, atol=0)


# ---- properties ----


@settings(max_examples=60)
@given(data=st.data())
@pytest.mark.parametrize("backend", BACKENDS)
def test_hypothesis_problems(backend: str, data: st.DataObject) -> None:
    draw = data.draw
    torch.manual_seed(draw(st.integers(0, 2**32 - 1)))
    problem = attention(
        draw(st.lists(st.one_of(st.integers(0, 5), st.integers(60, 70), st.integers(0, 300)), min_size=1, max_size=4)),
        draw(st.one_of(st.integers(0, 20), st.integers(60, 140))),
        draw(st.integers(1, 4)),
        draw(st.sampled_from(WIDTHS) if backend == "cuda" else st.integers(1, 70)),
        queries=draw(st.sampled_from(["dense", "ragged"])),
        history=draw(st.sampled_from(["dense", "ragged"])),
        dtype=draw(st.sampled_from(FLOATS)),
        bias=draw(st.booleans()),
        activation=draw(st.sampled_from(["softmax", "silu"])),
        softmax_scale=draw(st.sampled_from([None, 0.0, -0.5, 1e-30, 30.0])),
    )
    out = problem.attend(backend).cpu()
    grad_out = torch.randn(out.shape).to(out.dtype)
    got = [out, *problem.gradients(backend, grad_out)]
    exact = [problem.cast(torch.float64).formula().detach(), *true_gradients(problem, grad_out, torch.float64)]
    for b in range(len(problem.users())):
        _, bounds = attention_sizes(problem, grad_out, b)
        for i, (x, true, bound) in enumerate(zip(got, exact, bounds, strict=False)):
            of = problem.of_q if i < 2 else problem.of_k
            assert ((of(x, b).double() - of(true, b)).abs() <= bound).all(), ("out", *"qkvb")[i]
