"""Gradients of candidate_cross_attention."""

from typing import Any

import pytest
import torch
from ranker_checks import same_bits
from ranker_oracle import Attention, attention, largest, on

from grank_kernels.backends import reference
from grank_kernels.backends.problems import CandidateCrossAttentionProblem

FORMS = [("dense", "ragged"), ("dense", "dense"), ("shared", "ragged"), ("shared", "dense"), ("ragged", "ragged"),
         ("ragged", "dense")]  # fmt: skip


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("form", FORMS, ids=lambda form: "-".join(form))
def test_gradient_of_the_reference_by_finite_differences(form: tuple[str, str], bias: bool, activation: str) -> None:
    """Of `out` and of softmax's `lse`, in float64, which only the reference function takes, not the public op."""
    problem = attention([4, 0, 3], 3, 2, 3, queries=form[0], history=form[1], bias=bias, activation=activation)
    problem = problem.cast(torch.float64)
    q, k, v = (x.detach().nan_to_num(0) for x in (problem.q, problem.k, problem.v))
    q = q.expand(3, -1, -1, -1).clone() if form[0] == "shared" else q
    leaves = [x.requires_grad_() for x in (q, k, v, *([problem.bias_k.detach().nan_to_num(0)] if bias else []))]
    where = (problem.cu_seqlens_q, problem.cu_seqlens_k, problem.seqused_k, 0.7)

    class Reference(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *bias: torch.Tensor) -> Any:
            taken = CandidateCrossAttentionProblem(q, k, v, *where, *(bias or (None,)), activation)
            out, lse = reference.candidate_cross_attention(taken)
            ctx.save_for_backward(q, k, v, out, lse, *bias)
            return (out, lse.nan_to_num(posinf=0)) if activation == "softmax" else out

        @staticmethod
        def backward(ctx: Any, grad_out: torch.Tensor, grad_lse: torch.Tensor | None = None) -> Any:
            q, k, v, out, lse, *bias = ctx.saved_tensors
            taken = CandidateCrossAttentionProblem(q, k, v, *where, *(bias or (None,)), activation)
            grads = reference.candidate_cross_attention_backward(grad_out, grad_lse, taken, out, lse)
            return grads[: 3 + len(bias)]

    assert torch.autograd.gradcheck(Reference.apply, leaves)


def test_gradients_of_one_input(activation: str, backend: str) -> None:
    problem = attention([30, 0, 5], bias=True, activation=activation)
    grad_out = torch.randn(3, 9, 2, 16)
    for name, want in zip(("q", "k", "v", "bias_k"), problem.gradients(backend, grad_out), strict=True):
        leaf = vars(problem)[name].clone().requires_grad_()
        out = problem.but(**{name: leaf}).attend(backend)
        out.backward(on(backend, grad_out))
        same_bits(leaf.grad, want)
    assert not problem.attend(backend).requires_grad


# ---- of lse ----


def gradients_of_both(
    problem: Attention, grad_out: torch.Tensor | None, grad_lse: torch.Tensor, backend: str, **more: Any
) -> list[torch.Tensor]:
    """Gradients of `out` and `lse`, or of `lse` alone, in q, k, v and bias_k; zeros of v where it has none."""
    leaf = problem.cast(None)
    out, lse = leaf.attend(backend, return_lse=True, **more)
    results, grads = ([lse], [grad_lse]) if grad_out is None else ([out, lse], [grad_out, grad_lse])
    found = torch.autograd.grad(results, leaf.leaves(), [on(backend, x) for x in grads], allow_unused=True)
    return [torch.zeros_like(x) if g is None else g.cpu() for x, g in zip(leaf.leaves(), found, strict=True)]


def true_gradients_of_both(
    problem: Attention, grad_out: torch.Tensor | None, grad_lse: torch.Tensor, dtype: torch.dtype
) -> list[torch.Tensor]:
    """By autograd of the formulas in a dtype, where users without keys have no lse."""
    leaf = problem.cast(dtype)
    lse = leaf.lse_formula()
    loss = (lse * grad_lse.to(dtype)).where(lse < torch.inf, 0.0).sum()
    if grad_out is not None:
        loss = loss + (leaf.formula() * grad_out.to(dtype)).sum()
    found = torch.autograd.grad(loss, leaf.leaves(), allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for x, g in zip(leaf.leaves(), found, strict=True)]


@pytest.mark.parametrize("alone", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_gradient_of_lse(alone: bool, bias: bool, form: dict[str, str], dtype: torch.dtype, backend: str) -> None:
    problem = attention([20, 0, 3, 130], 70, 2, 32, bias=bias, dtype=dtype, **form)
    _, lse = problem.attend(backend, return_lse=True)
    grad_lse = torch.randn(lse.shape)
    grad_out = None if alone else torch.randn(*lse.shape, 32).to(dtype)
    exact, plain = (true_gradients_of_both(problem, grad_out, grad_lse, x) for x in (torch.float64, dtype))
    for got, true, lossy in zip(gradients_of_both(problem, grad_out, grad_lse, backend), exact, plain, strict=True):
        assert got.isfinite().all()
        error, size = largest(got.double() - true), largest(true)
        assert error <= 4 * largest(lossy.double() - true) + 8 * torch.finfo(dtype).eps * size


def test_lse_without_values(form: dict[str, str], dtype: torch.dtype, backend: str) -> None:
    """The bits of `lse` and of its gradients are those of a call with v."""
    problem = attention([20, 0, 3, 130], 70, 2, 32, bias=True, dtype=dtype, **form)
    _, lse = problem.attend(backend, return_lse=True)
    out, alone = problem.but(v=None).attend(backend, return_lse=True)
    assert out is None
    same_bits(alone.cpu(), lse.cpu())
    grad_lse = torch.randn(lse.shape)
    grad_q, grad_k, _, grad_bias = gradients_of_both(problem, None, grad_lse, backend)
    for x, want in zip(
        gradients_of_both(problem.but(v=None), None, grad_lse, backend), (grad_q, grad_k, grad_bias), strict=True
    ):
        same_bits(x, want)


def test_gradient_of_lse_where_it_is_infinite(dtype: torch.dtype, backend: str) -> None:
    """No key, or only masked ones: whatever a loss gives there, NaN included, reaches no gradient."""
    problem = attention([20, 0, 3], 9, bias=True, dtype=dtype)
    problem.bias_k[22:25] = -torch.inf  # the third user's
    grad_lse = torch.ones(3, 9, 2)
    want = gradients_of_both(problem, None, grad_lse, backend)
    grad_lse[1:] = torch.nan
    for x, y in zip(gradients_of_both(problem, None, grad_lse, backend), want, strict=True):
        assert y.isfinite().all()
        same_bits(x, y)


def test_gradient_of_lse_is_deterministic(dtype: torch.dtype, backend: str) -> None:
    problem = attention([130, 7, 0, 300], 150, 2, 32, queries="shared", bias=True, dtype=dtype)
    grad_out, grad_lse = torch.randn(4, 150, 2, 32).to(dtype), torch.randn(4, 150, 2)
    want = gradients_of_both(problem, grad_out, grad_lse, backend)
    for threads in (1, 1) if backend == "reference" else (1, 3, 8):
        torch.set_num_threads(threads)  # the fixture sets it back
        for x, y in zip(gradients_of_both(problem, grad_out, grad_lse, backend), want, strict=True):
            same_bits(x, y)


def test_zeros_for_lse_leave_the_gradient_of_out(dtype: torch.dtype, backend: str) -> None:
    problem = attention([30, 0, 5], bias=True, dtype=dtype)
    grad_out = torch.randn(3, 9, 2, 16).to(dtype)
    both = gradients_of_both(problem, grad_out, torch.zeros(3, 9, 2), backend)
    for x, y in zip(both, problem.gradients(backend, grad_out), strict=True):
        same_bits(x, y)


def test_gradients_are_deterministic(activation: str, dtype: torch.dtype, backend: str) -> None:
    """Equal bits from run to run and for every number of threads."""
    problem = attention([130, 7, 0, 300], 150, 2, 32, queries="shared", bias=True, dtype=dtype, activation=activation)
    grad_out = torch.randn(4, 150, 2, 32).to(dtype)
    want = problem.gradients(backend, grad_out)
    for threads in (1, 1, 1) if backend == "reference" else (1, 2, 3, 8):
        torch.set_num_threads(threads)  # reset by the fixture
        for again, x in zip(problem.gradients(backend, grad_out), want, strict=True):
            same_bits(again, x)


def test_no_second_derivative(backend: str) -> None:
    problem = attention([30, 5]).cast(None)
    (grad,) = torch.autograd.grad(problem.attend(backend).sum(), problem.q, create_graph=True)
    with pytest.raises(NotImplementedError, match="candidate_cross_attention has no second derivative"):
        grad.sum().backward()
