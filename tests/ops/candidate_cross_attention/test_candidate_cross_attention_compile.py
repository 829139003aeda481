"""candidate_cross_attention under torch.library.opcheck, torch.compile and torch.export."""

from typing import Any

import pytest
import torch
from ranker_checks import same_bits
from ranker_oracle import (
    Attention,
    attention,
    device_of,
    on,
)

import grank_kernels as gk

FORMS = [("dense", "ragged"), ("dense", "dense"), ("shared", "ragged"), ("shared", "dense"), ("ragged", "ragged"),
         ("ragged", "dense")]  # fmt: skip


pytestmark = pytest.mark.usefixtures("one_thread")

GOOD: dict[str, Any] = {"q": torch.ones(2, 5, 3, 8), "k": torch.ones(2, 7, 3, 8), "v": torch.ones(2, 7, 3, 8)}


def op_arguments(problem: Attention, backend: str) -> tuple[Any, ...]:
    bias = None if problem.bias_k is None else problem.bias_k.detach().float()
    given = (problem.q, problem.k, problem.v, problem.cu_seqlens_q, problem.cu_seqlens_k, problem.seqused_k, None, bias)
    return (*(on(backend, x) for x in given), problem.activation, backend)


@pytest.mark.parametrize(
    "problem",
    [
        pytest.param({"lengths": [5, 0, 20]}, id="plain"),
        pytest.param({"lengths": [5, 0, 20], "history": "dense", "bias": True, "activation": "silu"}, id="silu"),
        pytest.param({"lengths": [5, 9], "queries": "ragged", "dtype": torch.bfloat16, "bias": True}, id="ragged"),
        pytest.param({"lengths": [0, 0], "C": 0}, id="empty"),
    ],
)
@pytest.mark.parametrize("learnt", [False, True])
def test_opcheck(problem: dict[str, Any], learnt: bool, backend: str) -> None:
    arguments = op_arguments(attention(**problem), backend)
    for x in arguments:
        if isinstance(x, torch.Tensor) and x.is_floating_point():
            x.nan_to_num_(0).requires_grad_(learnt)  # NaN != NaN
    torch.library.opcheck(torch.ops.grank.candidate_cross_attention.default, arguments)
    if not learnt:
        out, lse = torch.ops.grank.candidate_cross_attention.default(*arguments)
        backward = torch.ops.grank.candidate_cross_attention_backward.default
        grads = torch.randn_like(out), torch.randn_like(lse) if problem.get("activation") != "silu" else None
        torch.library.opcheck(backward, (*grads, *arguments[:3], out, lse, *arguments[3:]))


@pytest.mark.parametrize("learnt", [False, True])
def test_opcheck_of_lse_alone(learnt: bool, backend: str) -> None:
    q, k, _, *more = op_arguments(attention([5, 0, 20], bias=True), backend)
    for x in (q, k, more[4]):
        x.nan_to_num_(0).requires_grad_(learnt)
    torch.library.opcheck(torch.ops.grank.candidate_cross_attention.default, (q, k, None, *more))
    if not learnt:
        out, lse = torch.ops.grank.candidate_cross_attention.default(q, k, None, *more)
        backward = torch.ops.grank.candidate_cross_attention_backward.default
        torch.library.opcheck(backward, (None, torch.randn_like(lse), q, k, None, out, lse, *more))


def test_meta_tensors(activation: str) -> None:
    """Meta tensors give shapes and dtypes without running a kernel."""
    q, k, v = (x.to("meta", torch.float16) for x in GOOD.values())
    got = gk.candidate_cross_attention(q, k, v, activation=activation)
    assert (got.shape, got.dtype, got.device.type) == (q.shape, torch.float16, "meta")
    shared, lse = gk.candidate_cross_attention(q[0], k, v, return_lse=True)
    assert (shared.shape, lse.shape, lse.dtype) == (q.shape, q.shape[:-1], torch.float32)
    none, lse = gk.candidate_cross_attention(q[0], k, return_lse=True)
    assert none is None
    assert (lse.shape, lse.dtype, lse.device.type) == (q.shape[:-1], torch.float32, "meta")


def compiled_agrees(compiler: str, queries: str, history: str, backend: str) -> None:
    torch.compiler.reset()

    def loss(*leaves: torch.Tensor, **more: Any) -> torch.Tensor:
        q, k, v, bias = leaves
        out, lse = gk.candidate_cross_attention(q * 2, k, v, bias_k=bias, **more, return_lse=True, backend=backend)
        _, alone = gk.candidate_cross_attention(q, k, bias_k=bias, **more, return_lse=True, backend=backend)
        return out.tanh().sum() + lse.nan_to_num(posinf=0).tanh().sum() + alone.nan_to_num(posinf=0).sin().sum()

    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend=compiler)
    for lengths, C, H, D in (([30, 0, 5], 4, 2, 16), ([7, 9, 1, 3], 5, 3, 32), ([3, 1], 7, 4, 64)):
        problem = attention(lengths, C, H, D, queries=queries, history=history, bias=True)
        more = {n: on(backend, getattr(problem, n)) for n in ("cu_seqlens_q", "cu_seqlens_k", "seqused_k")}
        leaves = [on(backend, x.nan_to_num(0)).requires_grad_() for x in problem.leaves()]
        want, got = loss(*leaves, **more), compiled(*leaves, **more)
        torch.testing.assert_close(got, want)
        for mine, theirs in zip(torch.autograd.grad(got, leaves), torch.autograd.grad(want, leaves), strict=True):
            torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize(("queries", "history"), [FORMS[1], FORMS[2], FORMS[4]])
def test_compile(queries: str, history: str, backend: str) -> None:
    compiled_agrees("aot_eager", queries, history, backend)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # raised by inductor
def test_compile_inductor(backend: str) -> None:
    compiled_agrees("inductor", "dense", "ragged", backend)


def test_compile_for_export(activation: str, backend: str) -> None:
    class Attend(torch.nn.Module):
        def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            out = gk.candidate_cross_attention(q, k, v, activation=activation, backend=backend)
            assert isinstance(out, torch.Tensor)
            return out

    L = torch.export.Dim("L", min=2)
    q, k, v = (on(backend, x) for x in GOOD.values())
    program = torch.export.export(Attend(), (q, k, v), dynamic_shapes=(None, {1: L}, {1: L}))
    k, v = (torch.randn(2, 19, 3, 8, device=device_of(backend)) for _ in range(2))
    same_bits(program.module()(q, k, v), Attend()(q, k, v))
