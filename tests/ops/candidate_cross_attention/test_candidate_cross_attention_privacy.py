"""Isolation in candidate_cross_attention: users and padding do not affect other users."""

import math

import pytest
import torch
from ranker_checks import same_bits
from ranker_oracle import (
    Attention,
    attention,
)

INF = math.inf


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("b", [0, 1, 2, 3])
@pytest.mark.parametrize("history", ["dense", "ragged"])
def test_nan_of_one_user_stays_there(b: int, history: str, activation: str, dtype: torch.dtype, backend: str) -> None:
    problem = attention([65, 17, 130, 64], 33, 2, 32, history=history, bias=True, dtype=dtype, activation=activation)
    grad_out = torch.randn(4, 33, 2, 32).to(dtype)
    want = [problem.attend(backend).cpu(), *problem.gradients(backend, grad_out)]
    for bad in (math.nan, INF):
        hurt = problem.but(q=problem.q.clone(), k=problem.k.clone(), v=problem.v.clone(), bias_k=problem.bias_k.clone())
        for x in hurt.users()[b]:
            x[:] = bad
        hurt_grad = grad_out.clone()
        hurt_grad[b] = bad
        got = [hurt.attend(backend).cpu(), *hurt.gradients(backend, hurt_grad)]
        for other in range(4):
            for i, (x, y) in enumerate(zip(got, want, strict=True)):
                of = problem.of_q if i < 2 else problem.of_k
                if other != b:
                    same_bits(of(x, other), of(y, other))
                elif math.isnan(bad):
                    assert of(x, other).isnan().all()


def test_padding_has_no_gradient(form: dict[str, str], activation: str, dtype: torch.dtype, backend: str) -> None:
    """The gradient is 0 for padding, rows of no user (all NaN), and users with an empty history."""
    problem = attention([20, 0, 3, 65], 17, 2, 32, bias=True, dtype=dtype, activation=activation, **form)
    out = problem.attend(backend).cpu()
    grads = problem.gradients(backend, torch.full_like(out, math.nan).where(out == INF, 1.0))
    for x, grad in zip(problem.leaves(), grads, strict=True):
        assert grad.isfinite().all()
        assert (grad[x.isnan()] == 0).all()
    if problem.q.dim() == 4:
        assert (problem.of_q(grads[0], 1) == 0).all()


def test_candidates_do_not_see_each_other(activation: str, dtype: torch.dtype, backend: str) -> None:
    problem = attention([70, 0, 3, 64], 65, 2, 32, dtype=dtype, activation=activation)
    out = problem.attend(backend).cpu()
    order = torch.randperm(65)
    for chosen in (order, order[:1], order[:33], torch.tensor([7] * 40)):
        again = problem.but(q=problem.q[:, chosen]).attend(backend).cpu()
        if backend == "reference":  # torch's order of sums depends on shapes
            torch.testing.assert_close(again, out[:, chosen])
        else:
            same_bits(again, out[:, chosen])
    for b, (q, k, v, _) in enumerate(problem.users()):
        alone = Attention(q[None], k[None], v[None], activation=activation)
        if backend == "reference":
            torch.testing.assert_close(alone.attend(backend).cpu()[0], out[b])
        else:
            same_bits(alone.attend(backend).cpu()[0], out[b])


def test_shared_queries_equal_repeated_queries(activation: str, dtype: torch.dtype, backend: str) -> None:
    problem = attention([20, 0, 65], 17, 2, 32, queries="shared", dtype=dtype, activation=activation)
    for_each = problem.but(q=problem.q.expand(3, -1, -1, -1).contiguous())
    same_bits(problem.attend(backend).cpu(), for_each.attend(backend).cpu())
    grad_out = torch.randn(3, 17, 2, 32).to(dtype)
    shared, each = problem.gradients(backend, grad_out), for_each.gradients(backend, grad_out)
    torch.testing.assert_close(shared[0], each[0].sum(0))
    for x, y in zip(shared[1:], each[1:], strict=True):
        same_bits(x, y)
