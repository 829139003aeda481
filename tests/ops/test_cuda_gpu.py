"""Tests that need a GPU: streams, CUDA graphs, races by repetition, large sizes."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from emulated_cuda import HALVES, ON_A_GPU
from ranker_oracle import Attention, Scoring, allowed, attention, offsets_of, on, scoring

import grank_kernels as gk

pytestmark = ON_A_GPU
RUNS = 50


def large_scoring(dtype: torch.dtype = torch.float16, B: int = 8, C: int = 2000, L: int = 1000) -> Scoring:
    """The Ranker's shape: d = h = 128."""
    return scoring([L] * (B - 1) + [L // 3], C, 128, 128, 5000, dtype=dtype)


def large_attention(activation: str = "softmax") -> Attention:
    return attention([1000, 0, 313, 700], 300, 2, 64, dtype=torch.float16, queries="shared", activation=activation)


def on_gpu(problem: Any) -> Any:
    return problem.but(**{name: on("cuda", x) for name, x in vars(problem).items()})


@pytest.mark.parametrize("dtype", HALVES)
def test_scores_of_the_rankers_shape(dtype: torch.dtype) -> None:
    problem = large_scoring(dtype)
    got, exact, plain = problem.scores("cuda"), problem.formula(torch.float64), problem.formula(dtype)
    there = problem.candidate_ids >= 0
    assert float((got - exact)[there].abs().max()) <= allowed(plain[there], exact[there], dtype, exact[there])


@pytest.mark.parametrize("activation", ["softmax", "silu"])
def test_attention_repeats_its_bits(activation: str) -> None:
    """Repeated, because a race changes the result of few runs."""
    problem = on_gpu(large_attention(activation)).cast(None)
    grad_out = torch.randn(problem.attend("cuda").shape, dtype=problem.q.dtype, device="cuda")

    def run() -> list[torch.Tensor]:
        out = problem.attend("cuda")
        return [out.detach(), *torch.autograd.grad(out, problem.leaves(), grad_out)]

    first = run()
    for _ in range(RUNS):
        assert all(torch.equal(a, b) for a, b in zip(run(), first, strict=True))


def test_scores_repeat_their_bits() -> None:
    problem = on_gpu(large_scoring())
    first = problem.scores("cuda")
    for _ in range(RUNS):
        assert torch.equal(problem.scores("cuda"), first)


def captured(run: Callable[[], torch.Tensor]) -> tuple[torch.cuda.CUDAGraph, torch.Tensor]:
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run()
    return graph, out


def test_a_graph_sees_new_ids_and_offsets() -> None:
    """Grids depend on shapes only, so a captured call is correct for any later content of its buffers."""
    problem = on_gpu(large_scoring(C=500, L=300))
    graph, scores = captured(lambda: gk.score_candidates(**vars(problem), backend="cuda"))
    total = len(problem.keys)
    for lengths in ([0] * 8, [total, *[0] * 7], [total // 8] * 8):
        problem.candidate_ids.copy_(torch.randint(-1, 5000, problem.candidate_ids.shape))
        problem.cu_seqlens.copy_(offsets_of(lengths))
        graph.replay()
        assert torch.equal(scores.cpu(), problem.scores("cuda"))


def test_a_graph_of_attention_sees_new_offsets() -> None:
    problem = on_gpu(large_attention())
    graph, out = captured(lambda: problem.attend("cuda"))
    assert problem.cu_seqlens_k is not None
    for lengths in ([0, 0, 0, 1], [500, 500, 500, 500], [2000, 0, 1, 0]):
        problem.cu_seqlens_k.copy_(offsets_of(lengths) + 2)
        graph.replay()
        assert torch.equal(out, problem.attend("cuda"))


def test_runs_in_the_current_stream() -> None:
    """Inputs are computed in another stream after a long kernel."""
    problem = on_gpu(large_scoring())
    want = problem.scores("cuda")
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        late = torch.zeros_like(problem.keys)
        torch.cuda._sleep(100_000_000)
        late.copy_(problem.keys)
        got = problem.but(keys=late).scores("cuda")
    assert torch.equal(got, want)
