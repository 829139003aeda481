"""Checks shared by the tests of the Ranker's two ops: accuracy against float64, equal bits, memory layouts."""

import math

import torch
from ranker_oracle import (
    Attention,
    Scoring,
    allowed,
    attention_sizes,
    largest,
    on,
    true_gradients,
)

INF = math.inf


def check_attention(problem: Attention, backend: str) -> torch.Tensor:
    """Compares `out` and the gradients with float64, and returns `out`.

    Allowed error of `out`: twice the error of plain torch in the dtype. Of a gradient: that, and 8 roundings of its
    terms, because it is computed from the rounded `lse` and `out`, while torch keeps the weights.
    """
    dtype = problem.q.dtype
    cast = problem.cast(dtype)
    out = cast.attend(backend)
    exact, plain = problem.cast(torch.float64).formula().detach(), problem.cast(dtype).formula().detach()
    assert (out.dtype, out.shape) == (dtype, exact.shape)
    grad_out = torch.randn(exact.shape).to(dtype)
    of_users = [attention_sizes(problem, grad_out, b)[0] for b in range(len(problem.users()))]
    sizes = [torch.cat([term.flatten() for term in terms]) for terms in zip(*of_users, strict=True)]
    assert error_of(out, exact) <= allowed(plain, exact, dtype, sizes[0])
    grads = torch.autograd.grad(out, cast.leaves(), on(backend, grad_out))
    exact_grads, plain_grads = (true_gradients(problem, grad_out, x) for x in (torch.float64, dtype))
    for i, (x, got, true, lossy) in enumerate(zip(cast.leaves(), grads, exact_grads, plain_grads, strict=True)):
        assert (got.dtype, got.shape) == (x.dtype, x.shape)
        roundings = 8 * torch.finfo(torch.float32).eps * largest(sizes[i + 1])
        most = 2 * allowed(lossy, true, dtype, sizes[i + 1]) + roundings
        assert error_of(got, true) <= most, f"gradient of {'qkvb'[i]}"
    return out.detach().cpu()


def error_of(got: torch.Tensor, exact: torch.Tensor) -> float:
    return largest(got.detach().cpu().double() - exact)


def same_bits(got: torch.Tensor, want: torch.Tensor) -> None:
    """Equal dtypes and numbers; 0.0 equals -0.0."""
    assert got.dtype == want.dtype
    assert torch.equal(got, want)


def equal_bits(got: torch.Tensor, want: torch.Tensor) -> None:
    """Equal bits of float32, also of NaN and signed zeros."""
    assert torch.equal(got.view(torch.int32), want.view(torch.int32))


def check_scores(problem: Scoring, backend: str) -> torch.Tensor:
    """Asserts at most twice the error of plain torch in the dtype, against float64; returns the scores."""
    got, exact = problem.scores(backend), problem.formula(torch.float64)
    assert got.dtype == torch.float32
    there = problem.candidate_ids >= 0
    assert torch.equal(got == -INF, ~there)
    plain = problem.formula(problem.keys.dtype)
    size, _ = problem.sizes()
    assert largest((got.double() - exact)[there]) <= allowed(plain[there], exact[there], problem.keys.dtype, size)
    return got


def alike(got: torch.Tensor, want: torch.Tensor, backend: str) -> None:
    """Asserts equal bits; on the reference backend closeness, since torch's order of sums depends on the layout."""
    if backend == "reference":
        torch.testing.assert_close(got, want)
    else:
        equal_bits(got, want)


def whole(*shape: int, most: int = 4) -> torch.Tensor:
    return torch.randint(-most, most + 1, shape).float()


def strided(x: torch.Tensor) -> dict[str, torch.Tensor]:
    """Equal tensors with other strides, and NaN (or the largest integer) in the gaps."""
    poison = math.nan if x.is_floating_point() else torch.iinfo(x.dtype).max
    wide = torch.full([2 * n + 1 for n in x.shape], poison, dtype=x.dtype)
    inner = wide[tuple(slice(1, 2 * n, 2) for n in x.shape)]
    rows = torch.full([*x.shape[:-1], x.shape[-1] + 3], poison, dtype=x.dtype)[..., 1:-2]
    backwards = torch.full(x.shape[::-1], poison, dtype=x.dtype).permute(*reversed(range(x.dim())))
    return {"every other": inner.copy_(x), "guarded": rows.copy_(x), "transposed": backwards.copy_(x)}
