"""Gradients of mips_topk."""

import math
from typing import Any

import pytest
import torch
from oracle import (
    KINDS,
    items_of,
)

import grank_kernels as gk

FLOATS = KINDS[:3]


def gradients(queries: torch.Tensor, rows: torch.Tensor, values: torch.Tensor, weights: torch.Tensor) -> Any:
    return torch.autograd.grad((values * weights.to(values.dtype)).square().sum(), [queries, rows])


@pytest.mark.parametrize(("B", "N", "d", "k"), [(1, 1, 1, 1), (3, 200, 8, 20), (7, 50, 130, 50), (4, 30, 5, 12)])
def test_gradients(B: int, N: int, d: int, k: int, backend: str) -> None:
    queries, rows = (torch.randn(n, d, requires_grad=True) for n in (B, N))
    weights = torch.randn(B, k)
    got = gradients(queries, rows, gk.mips_topk(queries, rows, k, backend=backend).values, weights)
    q64, x64 = (x.detach().double().requires_grad_() for x in (queries, rows))
    exact = gradients(q64, x64, torch.topk(q64 @ x64.T, k).values, weights)
    plain = gradients(queries, rows, torch.topk(queries @ rows.T, k).values, weights)
    for mine, theirs, true in zip(got, plain, exact, strict=True):
        assert mine.dtype == torch.float32
        lost = float((theirs - true).abs().max())
        assert float((mine - true).abs().max()) <= 2 * lost + 2**-22 * float(true.abs().max())


def test_gradients_of_one_operand(backend: str) -> None:
    queries, rows = torch.randn(3, 6), torch.randn(40, 6)
    both = [x.clone().requires_grad_() for x in (queries, rows)]
    gk.mips_topk(both[0], both[1], 4, backend=backend).values.sum().backward()
    q = queries.clone().requires_grad_()
    gk.mips_topk(q, rows, 4, backend=backend).values.sum().backward()
    assert torch.equal(q.grad, both[0].grad)
    x = rows.clone().requires_grad_()
    top = gk.mips_topk(queries, x, 4, backend=backend)
    top.values.sum().backward()
    assert torch.equal(x.grad, both[1].grad)
    assert not top.indices.requires_grad
    assert not gk.mips_topk(queries, rows, 4, backend=backend).values.requires_grad
    one = queries[0].clone().requires_grad_()
    gk.mips_topk(one, rows, 4, backend=backend).values.sum().backward()
    assert torch.equal(one.grad, q.grad[0])


@pytest.mark.parametrize("kind", FLOATS[1:])
def test_gradients_of_half_inputs(kind: str, backend: str) -> None:
    dtype = getattr(torch, kind)
    queries, rows = torch.randn(5, 24).to(dtype).requires_grad_(), torch.randn(60, 24).to(dtype).requires_grad_()
    gk.mips_topk(queries, rows, 9, backend=backend).values.sum().backward()
    q, x = (t.detach().float().requires_grad_() for t in (queries, rows))
    torch.topk(q @ x.T, 9).values.sum().backward()
    eps = torch.finfo(dtype).eps  # sums in float32, then one rounding to the dtype
    for mine, want in ((queries.grad, q.grad), (rows.grad, x.grad)):
        assert mine.dtype == dtype
        torch.testing.assert_close(mine.float(), want, rtol=eps, atol=2e-6)


def test_gradients_through_int8_ignore_the_quantisation(backend: str) -> None:
    queries, table = torch.randn(5, 24, requires_grad=True), items_of(torch.randn(60, 24), "int8")
    weights = torch.randn(5, 9)
    top = gk.mips_topk(queries, table, 9, backend=backend)
    (top.values * weights).sum().backward()
    want = (weights[..., None] * table.rows(top.indices)).sum(1)
    torch.testing.assert_close(queries.grad, want)


def test_fillers_and_nan_do_not_leak_into_gradients(backend: str) -> None:
    queries, rows = torch.randn(3, 6), torch.randn(20, 6)
    rows[0] = math.nan
    rows[4:8] = math.nan
    allow = torch.ones(3, 20, dtype=torch.bool)
    allow[1, 3:] = False
    allow[2] = False
    q, x = queries.clone().requires_grad_(), rows.clone().requires_grad_()
    top = gk.mips_topk(q, x, 30, backend=backend, allow=allow)
    weights = torch.randn(3, 30)
    torch.where(top.indices >= 0, top.values * weights, torch.inf).sum().backward(retain_graph=True)
    q64, x64 = (t.double().requires_grad_() for t in (queries, rows))
    found = top.indices >= 0
    picked = x64[top.indices.clamp(min=0)].nan_to_num(0)
    torch.where(found, (q64[:, None] * picked).sum(2) * weights, 0).sum().backward()
    torch.testing.assert_close(q.grad.double(), q64.grad, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(x.grad.double(), x64.grad, rtol=1e-5, atol=1e-6)
    assert torch.all(q.grad[2] == 0)
    q.grad = x.grad = None
    top.values.sum().backward(retain_graph=True)  # the fillers' gradient of 1 must be ignored
    assert q.grad.isfinite().all()
    assert torch.all(q.grad[2] == 0)
    assert torch.all(x.grad[[0, 4, 5, 6, 7]] == 0)
    q.grad = x.grad = None
    top.values.square().sum().backward()  # here of -infinity
    assert q.grad.isfinite().all()
    assert x.grad.isfinite().all()


def test_gradients_of_empty_results(backend: str) -> None:
    for B, N in ((0, 5), (3, 0), (0, 0)):
        queries, rows = torch.randn(B, 4, requires_grad=True), torch.randn(N, 4, requires_grad=True)
        gk.mips_topk(queries, rows, 2, backend=backend).values.sum().backward()
        assert torch.equal(queries.grad, torch.zeros(B, 4))
        assert torch.equal(rows.grad, torch.zeros(N, 4))


def test_gradients_are_deterministic(backend: str) -> None:
    queries, rows = torch.randn(200, 16, requires_grad=True), torch.randn(50, 16, requires_grad=True)
    weights = torch.randn(200, 40)
    torch.use_deterministic_algorithms(True)
    try:
        found = [
            gradients(queries, rows, gk.mips_topk(queries, rows, 40, backend=backend).values, weights) for _ in range(5)
        ]
    finally:
        torch.use_deterministic_algorithms(False)
    for again in found[1:]:
        assert torch.equal(again[0], found[0][0])
        assert torch.equal(again[1], found[0][1])
