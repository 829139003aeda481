"""Gradients of candidate_cross_attention."""

from typing import Any

import pytest
import torch
from ranker_checks import same_bits
from ranker_oracle import (
    attention,
    on,
)

from grank_kernels.backends import reference
from grank_kernels.backends.problems import CandidateCrossAttentionProblem

FORMS = [("dense", "ragged"), ("dense", "dense"), ("shared", "ragged"), ("shared", "dense"), ("ragged", "ragged"),
         ("ragged", "dense")]  # fmt: skip


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("form", FORMS, ids=lambda form: "-".join(form))
def test_gradient_of_the_reference_by_finite_differences(form: tuple[str, str], bias: bool, activation: str) -> None:
    """In float64, which only the reference function takes, not the public op."""
    problem = attention([4, 0, 3], 3, 2, 3, queries=form[0], history=form[1], bias=bias, activation=activation)
    problem = problem.cast(torch.float64)
    q, k, v = (x.detach().nan_to_num(0) for x in (problem.q, problem.k, problem.v))
    q = q.expand(3, -1, -1, -1).clone() if form[0] == "shared" else q
    leaves = [x.requires_grad_() for x in (q, k, v, *([problem.bias_k.detach().nan_to_num(0)] if bias else []))]
    where = (problem.cu_seqlens_q, problem.cu_seqlens_k, problem.seqused_k, 0.7)

    class Reference(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *bias: torch.Tensor) -> torch.Tensor:
            taken = CandidateCrossAttentionProblem(q, k, v, *where, *(bias or (None,)), activation)
            out, lse = reference.candidate_cross_attention(taken)
            ctx.save_for_backward(q, k, v, out, lse, *bias)
            return out

        @staticmethod
        def backward(ctx: Any, grad_out: torch.Tensor) -> Any:
            q, k, v, out, lse, *bias = ctx.saved_tensors
            taken = CandidateCrossAttentionProblem(q, k, v, *where, *(bias or (None,)), activation)
            grads = reference.candidate_cross_attention_backward(grad_out, taken, out, lse)
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
    out, lse = problem.cast(None).but(activation="softmax").attend(backend, return_lse=True)
    assert out.requires_grad
    assert not lse.requires_grad
    assert not problem.attend(backend).requires_grad


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
