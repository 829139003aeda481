"""Inputs of candidate_cross_attention: degenerate sizes, huge logits, masks, layouts, modes of torch."""

import math

import pytest
import torch
from ranker_checks import error_of, same_bits, strided
from ranker_oracle import (
    Attention,
    allowed,
    attention,
    on,
    true_gradients,
)

import grank_kernels as gk

INF = math.inf
FORMS = [("dense", "ragged"), ("dense", "dense"), ("shared", "ragged"), ("shared", "dense"), ("ragged", "ragged"),
         ("ragged", "dense")]  # fmt: skip


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize(("B", "C", "L"), [(0, 3, 0), (2, 0, 5), (2, 3, 0), (0, 0, 0), (2, 0, 0)])
def test_degenerate(
    B: int, C: int, L: int, form: dict[str, str], activation: str, dtype: torch.dtype, backend: str
) -> None:
    problem = attention([L] * B, C, bias=True, dtype=dtype, activation=activation, **form)
    out = problem.attend(backend)
    assert (out == 0).all()
    assert out.dtype == dtype
    for x, grad in zip(problem.leaves(), problem.gradients(backend, torch.ones_like(out)), strict=True):
        assert grad.shape == x.shape
        assert (grad == 0).all()


@pytest.mark.parametrize("size", [1e4, -1e4])
def test_huge_logits(size: float, activation: str, dtype: torch.dtype, backend: str) -> None:
    problem = attention([65, 2], 17, 2, 32, dtype=dtype, activation=activation, softmax_scale=1.0)
    problem.k[..., 0] = size
    problem.q[..., 0] = 1
    out = problem.attend(backend).cpu()
    exact, plain = (problem.cast(x).formula().detach() for x in (torch.float64, dtype))
    least = 1e6 * torch.finfo(torch.float32).tiny  # exponentials may be 0 below the smallest normal number
    assert error_of(out, exact) <= allowed(plain, exact, dtype, exact) + least
    ones = torch.ones_like(out)
    for grad, true in zip(problem.gradients(backend, ones), true_gradients(problem, ones, torch.float64), strict=True):
        assert torch.equal(grad.isfinite(), true.to(dtype).isfinite())  # float16 overflows above 65504
        assert not grad.isnan().any()


@pytest.mark.parametrize("bias", [False, True])
def test_width_zero(bias: bool, activation: str, backend: str) -> None:
    """With width 0 the logits are the bias."""
    problem = attention([5, 0, 20], 4, 2, 8, bias=bias, activation=activation)
    problem = problem.but(**{name: vars(problem)[name][..., :0] for name in "qkv"})
    assert problem.attend(backend).shape == (3, 4, 2, 0)
    for grad, x in zip(problem.gradients(backend, torch.empty(3, 4, 2, 0)), problem.leaves(), strict=True):
        assert grad.shape == x.shape
    if activation == "softmax":
        _, lse = problem.attend(backend, return_lse=True)
        want = torch.stack([torch.zeros(20, 2) if not bias else problem.users()[2][3]])[0].logsumexp(0)
        torch.testing.assert_close(lse[2].cpu(), want.expand(4, 2))


@pytest.mark.parametrize("size", [2e9, 2e10, 3e38])
def test_finite_logits_of_any_size(size: float) -> None:
    """torch's float32 softmax: equal largest logits share the weight, also in the gradient."""
    q, k, v = torch.ones(1, 2, 1, 1), torch.tensor([0.5, 1.0, 1.0]).view(1, 3, 1, 1), torch.randn(1, 3, 1, 1)
    bias = torch.tensor([0.0, 1.0, 1.0]).view(1, 3, 1) * size
    for operands in ({"q": q * size}, {"bias_k": bias}):
        leaf = v.clone().requires_grad_()
        given = {"q": q, "k": k, **operands}
        out = gk.candidate_cross_attention(v=leaf, softmax_scale=1.0, **given, backend="reference")
        torch.testing.assert_close(out, v[:, 1:].mean(1, keepdim=True).expand(1, 2, 1, 1))
        (grad,) = torch.autograd.grad(out.sum(), leaf)
        assert grad.flatten().tolist() == [0, 1, 1]


@pytest.mark.parametrize("history", ["dense", "ragged"])
def test_a_bias_of_minus_infinity_masks_a_key(history: str, dtype: torch.dtype, backend: str) -> None:
    problem = attention([20, 6, 65], 17, 2, 32, history=history, bias=True, dtype=dtype)
    keep = [torch.rand(len(bias)) < 0.5 for *_, bias in problem.users()]
    keep[1][:] = False  # all keys of this user are masked
    for (*_, bias), kept in zip(problem.users(), keep, strict=True):
        bias[~kept] = -INF
    out, lse = (x.cpu() for x in problem.attend(backend, return_lse=True))
    grad_out = torch.randn(out.shape).to(dtype)
    grads = problem.gradients(backend, grad_out)
    assert (out[1] == 0).all()
    assert (lse[1] == INF).all()
    assert (grads[0][1] == 0).all()
    for b in (0, 2):
        q, k, v, bias = problem.users()[b]
        few = Attention(q[None], k[None, keep[b]], v[None, keep[b]], bias_k=bias[None, keep[b]])
        torch.testing.assert_close(out[b : b + 1], few.attend(backend).cpu())
        left = few.gradients(backend, grad_out[b : b + 1])
        tolerance = {"rtol": 1e-4, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
        torch.testing.assert_close(grads[0][b : b + 1], left[0], **tolerance)
        for mine, other in zip(grads[1:], left[1:], strict=True):
            torch.testing.assert_close(problem.of_k(mine, b)[keep[b]], other[0], **tolerance)
            assert (problem.of_k(mine, b)[~keep[b]] == 0).all()


def test_int32_offsets_and_lengths(backend: str) -> None:
    for queries, history in FORMS:
        problem = attention([30, 0, 5], queries=queries, history=history)
        narrow = {name: x.int() for name, x in vars(problem).items() if name[:2] in ("cu", "se") and x is not None}
        same_bits(problem.but(**narrow).attend(backend).cpu(), problem.attend(backend).cpu())


def test_layouts(form: dict[str, str], activation: str, dtype: torch.dtype, backend: str) -> None:
    problem = attention([30, 0, 5], 9, 2, 16, bias=True, dtype=dtype, activation=activation, **form)
    grad_out = torch.randn(problem.attend(backend).shape).to(dtype)
    want = [problem.attend(backend).cpu(), *problem.gradients(backend, grad_out)]
    close = torch.testing.assert_close if backend == "reference" else same_bits  # torch's sums depend on strides
    for name, x in vars(problem).items():
        if isinstance(x, torch.Tensor):
            for same in strided(x).values():
                other = problem.but(**{name: same})
                close(other.attend(backend).cpu(), want[0])
                if x.is_floating_point():
                    leaf = same.detach().requires_grad_()
                    out = problem.but(**{name: leaf}).attend(backend)
                    (grad,) = torch.autograd.grad(out, leaf, on(backend, grad_out))
                    close(grad.cpu(), want["qkvb".index(name[0]) + 1])
    for same in strided(grad_out).values():
        for got, grad in zip(problem.gradients(backend, same), want[1:], strict=True):
            close(got, grad)
    ones = problem.gradients(backend, torch.ones(1, dtype=dtype).expand(grad_out.shape))
    for got, grad in zip(ones, problem.gradients(backend, torch.ones_like(grad_out)), strict=True):
        close(got, grad)


def test_keys_that_are_the_values(activation: str, backend: str) -> None:
    problem = attention([30, 0, 5], activation=activation)
    both = problem.k.clone().requires_grad_()
    out = gk.candidate_cross_attention(
        on(backend, problem.q), on(backend, both), on(backend, both),
        cu_seqlens_k=on(backend, problem.cu_seqlens_k), activation=activation, backend=backend,
    )  # fmt: skip
    apart = problem.but(v=problem.k)
    same_bits(out.detach().cpu(), apart.attend(backend).cpu())
    (grad,) = torch.autograd.grad(out.sum(), both)
    _, grad_k, grad_v = apart.gradients(backend, torch.ones_like(out))
    torch.testing.assert_close(grad, grad_k + grad_v)


def test_tensors_with_a_lazy_negation(backend: str) -> None:
    problem = attention([30, 5], bias=True)
    want = problem.attend(backend).cpu()
    for name in ("q", "k", "v", "bias_k"):
        same_bits(problem.but(**{name: torch._neg_view(-vars(problem)[name])}).attend(backend).cpu(), want)


def test_global_modes_of_torch(activation: str, backend: str) -> None:
    problem = attention([30, 5], bias=True, activation=activation)
    grad_out = torch.randn(2, 9, 2, 16)

    def everything() -> list[torch.Tensor]:
        return [problem.attend(backend).cpu(), *problem.gradients(backend, grad_out)]

    want = everything()
    torch.set_default_dtype(torch.float64)
    try:
        found = [everything()]
    finally:
        torch.set_default_dtype(torch.float32)
    with torch.device("meta"):
        found.append(everything())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found.append(everything())
    with torch.inference_mode():
        same_bits(problem.attend(backend).cpu(), want[0])
    for other in found:
        for x, y in zip(other, want, strict=True):
            same_bits(x, y)
