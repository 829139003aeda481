"""Checks that the tests of the Ranker's two ops share: accuracy against float64, equal bits, odd memory layouts."""

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

    The error of `out` is at most twice that of plain torch in the dtype. A gradient may have twice that error, and 8
    roundings of its terms: it is computed from `lse` and `out`, each rounded once more, where torch keeps the weights.
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
    """Equal bits of float32, those of NaN and of zeros included."""
    assert torch.equal(got.view(torch.int32), want.view(torch.int32))


def check_scores(problem: Scoring, backend: str) -> torch.Tensor:
    """Compares the scores with float64, and returns them: at most twice the error of plain torch in the dtype."""
    got, exact = problem.scores(backend), problem.formula(torch.float64)
    assert got.dtype == torch.float32
    there = problem.candidate_ids >= 0
    assert torch.equal(got == -INF, ~there)
    plain = problem.formula(problem.keys.dtype)
    size, _ = problem.sizes()
    assert largest((got.double() - exact)[there]) <= allowed(plain[there], exact[there], problem.keys.dtype, size)
    return got


def alike(got: torch.Tensor, want: torch.Tensor, backend: str) -> None:
    """Equal bits; close on the reference backend, where the order of torch's sums depends on shapes and strides."""
    if backend == "reference":
        torch.testing.assert_close(got, want)
    else:
        equal_bits(got, want)


def whole(*shape: int, most: int = 4) -> torch.Tensor:
    return torch.randint(-most, most + 1, shape).float()


def strided(x: torch.Tensor) -> dict[str, torch.Tensor]:
    """Equal tensors of other strides, with NaN (or the largest integer) in between."""
    poison = math.nan if x.is_floating_point() else torch.iinfo(x.dtype).max
    wide = torch.full([2 * n + 1 for n in x.shape], poison, dtype=x.dtype)
    inner = wide[tuple(slice(1, 2 * n, 2) for n in x.shape)]
    rows = torch.full([*x.shape[:-1], x.shape[-1] + 3], poison, dtype=x.dtype)[..., 1:-2]
    backwards = torch.full(x.shape[::-1], poison, dtype=x.dtype).permute(*reversed(range(x.dim())))
    return {"every other": inner.copy_(x), "guarded": rows.copy_(x), "transposed": backwards.copy_(x)}
