"""The contract of candidate_cross_attention and its gradient, on every backend, dtype, activation and form."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ranker_oracle import (
    FLOATS,
    Attention,
    allowed,
    attention,
    attention_sizes,
    backends_of,
    device_of,
    largest,
    on,
    true_gradients,
)

import grank_kernels as gk
from grank_kernels.backends import BACKENDS as BY_NAME
from grank_kernels.backends import reference
from grank_kernels.backends.problems import CandidateCrossAttentionProblem

INF = math.inf
BACKENDS = backends_of("candidate_cross_attention")
LENGTHS = [0, 1, 2, 15, 16, 17, 63, 64, 65, 127, 129, 200]  # of histories
COUNTS = [1, 2, 5, 15, 16, 17, 63, 64, 65, 100, 130]  # of candidates
WIDTHS = [16, 32, 64, 128]
FORMS = [("dense", "ragged"), ("dense", "dense"), ("shared", "ragged"), ("shared", "dense"), ("ragged", "ragged"),
         ("ragged", "dense")]  # fmt: skip

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=FLOATS, ids=lambda dtype: str(dtype)[6:])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param  # type: ignore[no-any-return]


@pytest.fixture(params=["softmax", "silu"])
def activation(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=FORMS, ids=lambda form: "-".join(form))
def form(request: pytest.FixtureRequest) -> dict[str, str]:
    return dict(zip(("queries", "history"), request.param, strict=True))


def check(problem: Attention, backend: str) -> torch.Tensor:
    """`out`, after it and the gradients were compared with float64: at most twice what plain torch loses in that dtype.

    A gradient may lose twice as much as that, and 8 roundings of its terms: it is made of what the forward pass left,
    `lse` and `out`, each rounded once more, where torch keeps the weights. A rounding of an lse around 8 is worth 8.
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
    """Two zeros are alike whatever their sign."""
    assert got.dtype == want.dtype
    assert torch.equal(got, want)


# ---- meaning ----


@pytest.mark.parametrize("i", range(12))
def test_loses_no_more_than_twice_what_torch_does(i: int, activation: str, dtype: torch.dtype, backend: str) -> None:
    """Every length, count and width in some company, three users at a time, now and then one without history."""
    lengths = [LENGTHS[(5 * i + j) % len(LENGTHS)] for j in range(3)]
    C, H, D = COUNTS[i % len(COUNTS)], (1, 2, 4)[i % 3], WIDTHS[i % 4]
    queries, history = FORMS[i % len(FORMS)]
    bias = i % 2 == 1
    problem = attention(lengths, C, H, D, queries=queries, history=history, dtype=dtype, bias=bias)
    check(problem.but(activation=activation), backend)


@pytest.mark.parametrize("bias", [False, True])
def test_forms(form: dict[str, str], bias: bool, activation: str, dtype: torch.dtype, backend: str) -> None:
    check(attention([20, 0, 3, 65], 17, 2, 32, bias=bias, dtype=dtype, activation=activation, **form), backend)


def test_history_without_lengths(activation: str, backend: str) -> None:
    problem = attention([20, 20], 17, history="dense", activation=activation)
    problem = problem.but(k=problem.k[:, :20], v=problem.v[:, :20])
    same_bits(check(problem.but(seqused_k=None), backend), problem.attend(backend).cpu())


@pytest.mark.parametrize(("H", "D"), [(1, 1), (3, 5), (1, 24), (2, 80), (1, 130), (5, 200)])
def test_other_widths(H: int, D: int, activation: str, dtype: torch.dtype, backend: str) -> None:
    problem = attention([70, 0, 3], 18, H, D, dtype=dtype, activation=activation)
    reason = BY_NAME[backend].candidate_cross_attention_unsupported(problem.q, problem.k, problem.v)
    if reason is None:
        check(problem, backend)
    else:  # only a GPU's kernels have fixed widths
        assert backend == "cuda"
        with pytest.raises(ValueError, match="width"):
            problem.attend(backend)


@pytest.mark.parametrize("scale", [0.0, 0.7, -0.7])
def test_scale(scale: float, activation: str, backend: str) -> None:
    check(attention([30, 5], softmax_scale=scale, activation=activation, bias=True), backend)


def test_default_backend(activation: str, backend: str) -> None:
    problem = attention([30, 0, 5], activation=activation)
    torch.testing.assert_close(problem.attend(None).cpu(), problem.attend(backend).cpu())


def test_lse(form: dict[str, str], dtype: torch.dtype, backend: str) -> None:
    problem = attention([20, 0, 3, 65], 17, 2, 32, bias=True, dtype=dtype, **form)
    out, lse = (x.cpu() for x in problem.attend(backend, return_lse=True))
    assert (lse.dtype, lse.shape) == (torch.float32, out.shape[:-1])
    wide = problem.cast(torch.float64)
    # A logarithm of a sum of weights, each of which may be rounded to the dtype before it is added.
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


def whole(*shape: int, most: int = 4) -> torch.Tensor:
    return torch.randint(-most, most + 1, shape).float()


@pytest.mark.parametrize("length", [1, 2, 32, 64, 256])
@pytest.mark.parametrize("C", [1, 17, 64])
def test_equal_logits_average_exactly(
    length: int, C: int, activation: str, form: dict[str, str], dtype: torch.dtype, backend: str
) -> None:
    """Whole numbers and 1 / L a power of two: every sum is exact in any order. silu(64) is 64."""
    problem = attention([length] * 2, C, 2, 16, bias=True, dtype=dtype, activation=activation, **form)
    nobody = problem.v.isnan()
    v, bias = whole(*problem.v.shape).masked_fill(nobody, math.nan), torch.zeros(problem.v.shape[:-1])
    bias += 64 if activation == "silu" else 5
    q, k = torch.zeros_like(problem.q), torch.ones_like(problem.k)
    problem = problem.but(q=q, k=k, v=v.to(dtype), bias_k=bias)
    exact = problem.cast(torch.float64).formula().detach()
    same_bits(problem.attend(backend).cpu(), exact.to(dtype))


def test_a_logit_far_above_the_rest_takes_all(dtype: torch.dtype, backend: str) -> None:
    """Query i is key i's, and a thousand above the others: `out` is its value, and no logit has a gradient."""
    L = D = 64
    problem = attention([L, L], L, 1, D, queries="shared", history="dense", dtype=dtype)
    v = whole(2, L, 1, D).to(dtype)
    eye = torch.eye(L)[:, None]
    problem = Attention((eye * 1000).to(dtype), eye.expand(2, L, 1, D).to(dtype), v, softmax_scale=1.0)
    torch.testing.assert_close(problem.attend(backend).cpu(), v, rtol=2 * torch.finfo(dtype).eps, atol=0)
    grad_out = whole(2, L, 1, D).to(dtype)
    grad_q, grad_k, grad_v = problem.gradients(backend, grad_out)
    size = torch.finfo(dtype).eps * 2 * 64 * 16  # of a sum of 64 products of numbers up to 4
    assert float(grad_q.abs().max()) <= size
    assert float(grad_k.abs().max()) <= 1000 * size
    torch.testing.assert_close(grad_v, grad_out, rtol=1e-4 + 2 * torch.finfo(dtype).eps, atol=0)


# ---- nobody sees another ----


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


def test_nobody_gets_no_gradient(form: dict[str, str], activation: str, dtype: torch.dtype, backend: str) -> None:
    """Padding and rows of no user, all of them NaN, have a gradient of 0 (as has a user without history)."""
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
        if backend == "reference":  # the order of its sums is torch's, which goes by shapes
            torch.testing.assert_close(again, out[:, chosen])
        else:
            same_bits(again, out[:, chosen])
    for b, (q, k, v, _) in enumerate(problem.users()):
        alone = Attention(q[None], k[None], v[None], activation=activation)
        if backend == "reference":
            torch.testing.assert_close(alone.attend(backend).cpu()[0], out[b])
        else:
            same_bits(alone.attend(backend).cpu()[0], out[b])


def test_shared_queries_are_everybodys(activation: str, dtype: torch.dtype, backend: str) -> None:
    problem = attention([20, 0, 65], 17, 2, 32, queries="shared", dtype=dtype, activation=activation)
    for_each = problem.but(q=problem.q.expand(3, -1, -1, -1).contiguous())
    same_bits(problem.attend(backend).cpu(), for_each.attend(backend).cpu())
    grad_out = torch.randn(3, 17, 2, 32).to(dtype)
    shared, each = problem.gradients(backend, grad_out), for_each.gradients(backend, grad_out)
    torch.testing.assert_close(shared[0], each[0].sum(0))
    for x, y in zip(shared[1:], each[1:], strict=True):
        same_bits(x, y)


# ---- odd inputs ----


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
    least = 1e6 * torch.finfo(torch.float32).tiny  # an exponential need not go below the smallest normal number
    assert error_of(out, exact) <= allowed(plain, exact, dtype, exact) + least
    ones = torch.ones_like(out)
    for grad, true in zip(problem.gradients(backend, ones), true_gradients(problem, ones, torch.float64), strict=True):
        assert torch.equal(grad.isfinite(), true.to(dtype).isfinite())  # float16 ends at 65504
        assert not grad.isnan().any()


@pytest.mark.parametrize("history", ["dense", "ragged"])
def test_a_bias_of_minus_infinity_takes_a_key_out(history: str, dtype: torch.dtype, backend: str) -> None:
    problem = attention([20, 6, 65], 17, 2, 32, history=history, bias=True, dtype=dtype)
    keep = [torch.rand(len(bias)) < 0.5 for *_, bias in problem.users()]
    keep[1][:] = False  # nothing is left of this user
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


def strided(x: torch.Tensor) -> dict[str, torch.Tensor]:
    """Equal tensors that lie otherwise in memory, with NaN (or the largest number) between."""
    poison = math.nan if x.is_floating_point() else torch.iinfo(x.dtype).max
    wide = torch.full([2 * n + 1 for n in x.shape], poison, dtype=x.dtype)
    inner = wide[tuple(slice(1, 2 * n, 2) for n in x.shape)]
    rows = torch.full([*x.shape[:-1], x.shape[-1] + 3], poison, dtype=x.dtype)[..., 1:-2]
    backwards = torch.full(x.shape[::-1], poison, dtype=x.dtype).permute(*reversed(range(x.dim())))
    return {"every other": inner.copy_(x), "guarded": rows.copy_(x), "transposed": backwards.copy_(x)}


def test_layouts(form: dict[str, str], activation: str, dtype: torch.dtype, backend: str) -> None:
    problem = attention([30, 0, 5], 9, 2, 16, bias=True, dtype=dtype, activation=activation, **form)
    grad_out = torch.randn(problem.attend(backend).shape).to(dtype)
    want = [problem.attend(backend).cpu(), *problem.gradients(backend, grad_out)]
    close = torch.testing.assert_close if backend == "reference" else same_bits  # torch's sums go by strides
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


def test_signs_yet_to_be_applied(backend: str) -> None:
    problem = attention([30, 5], bias=True)
    want = problem.attend(backend).cpu()
    for name in ("q", "k", "v", "bias_k"):
        same_bits(problem.but(**{name: torch._neg_view(-vars(problem)[name])}).attend(backend).cpu(), want)


def test_whatever_the_process_has_set(activation: str, backend: str) -> None:
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


# ---- gradients ----


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("form", FORMS, ids=lambda form: "-".join(form))
def test_the_references_gradient_is_the_differences(form: tuple[str, str], bias: bool, activation: str) -> None:
    """In float64, which the reference takes and the door does not."""
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


def test_gradients_where_only_one_is_wanted(activation: str, backend: str) -> None:
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
    """From run to run, and from one number of threads to another."""
    problem = attention([130, 7, 0, 300], 150, 2, 32, queries="shared", bias=True, dtype=dtype, activation=activation)
    grad_out = torch.randn(4, 150, 2, 32).to(dtype)
    want = problem.gradients(backend, grad_out)
    for threads in (1, 1, 1) if backend == "reference" else (1, 2, 3, 8):
        torch.set_num_threads(threads)  # the fixture sets it back
        for again, x in zip(problem.gradients(backend, grad_out), want, strict=True):
            same_bits(again, x)


def test_no_second_derivative(backend: str) -> None:
    problem = attention([30, 5]).cast(None)
    (grad,) = torch.autograd.grad(problem.attend(backend).sum(), problem.q, create_graph=True)
    with pytest.raises(NotImplementedError, match="candidate_cross_attention has no second derivative"):
        grad.sum().backward()


# ---- errors ----

GOOD: dict[str, Any] = {"q": torch.ones(2, 5, 3, 8), "k": torch.ones(2, 7, 3, 8), "v": torch.ones(2, 7, 3, 8)}
RAGGED: dict[str, Any] = {
    "q": torch.ones(10, 3, 8), "k": torch.ones(14, 3, 8), "v": torch.ones(14, 3, 8),
    "cu_seqlens_q": torch.tensor([0, 4, 10]), "cu_seqlens_k": torch.tensor([0, 0, 14]),
}  # fmt: skip
ERRORS: list[tuple[str, type[Exception], str, dict[str, Any], dict[str, Any]]] = [
    ("q list", TypeError, "q must be a torch.Tensor or an array, got list", GOOD, {"q": [1.0]}),
    ("q float64", ValueError, "q must be torch.float32, got torch.float64", GOOD, {"q": GOOD["q"].double()}),
    ("all float64", ValueError, "k must be torch.float32, torch.float16 or torch.bfloat16, got torch.float64", GOOD,
     {name: x.double() for name, x in GOOD.items()}),
    ("q 2-d", ValueError, r"q must have 3 or 4 dimensions, got \(5, 8\)", GOOD, {"q": torch.ones(5, 8)}),
    ("q batch", ValueError, r"q must be \(B, C, H, D\) = \(2, 5, 3, 8\), got \(3, 5, 3, 8\)", GOOD,
     {"q": torch.ones(3, 5, 3, 8)}),
    ("q heads", ValueError, r"q must be \(B, C, H, D\) = \(2, 5, 3, 8\), got \(2, 5, 1, 8\)", GOOD,
     {"q": torch.ones(2, 5, 1, 8)}),
    ("shared q width", ValueError, r"q must .*, got \(2, 5, 3, 9\)", GOOD, {"q": torch.ones(5, 3, 9)}),
    ("q dense with offsets", ValueError, r"q must have 3 dimensions, got \(2, 5, 3, 8\)", RAGGED,
     {"q": torch.ones(2, 5, 3, 8)}),
    ("ragged q width", ValueError, r"q must be \(total_q, H, D\) = \(10, 3, 8\), got \(10, 3, 9\)", RAGGED,
     {"q": torch.ones(10, 3, 9)}),
    ("k ragged without offsets", ValueError, r"k must have 4 dimensions, got \(7, 3, 8\)", GOOD,
     {"k": torch.ones(7, 3, 8)}),
    ("k dense with offsets", ValueError, r"k must have 3 dimensions, got \(2, 7, 3, 8\)", RAGGED,
     {"k": torch.ones(2, 7, 3, 8)}),
    ("v shape", ValueError, r"v must be k's shape = \(2, 7, 3, 8\), got \(2, 6, 3, 8\)", GOOD,
     {"v": torch.ones(2, 6, 3, 8)}),
    ("v dtype", ValueError, "v must be torch.float32, got torch.float16", GOOD, {"v": GOOD["v"].half()}),
    ("v on another device", ValueError, "v must be on cpu, the device of q, got meta", GOOD, {"v": GOOD["v"].to("meta")}),
    ("offsets of q", ValueError, r"cu_seqlens_q must be \(B \+ 1,\) = \(3,\), got \(2,\)", RAGGED,
     {"cu_seqlens_q": torch.tensor([0, 10])}),
    ("no offsets", ValueError, r"cu_seqlens_k must be \(B \+ 1,\) = .*, got \(0,\)", RAGGED,
     {"cu_seqlens_k": torch.empty(0, dtype=torch.int64)}),
    ("offsets float", ValueError, "cu_seqlens_k must be torch.int64 or torch.int32, got torch.float32", RAGGED,
     {"cu_seqlens_k": torch.tensor([0.0, 0.0, 14.0])}),
    ("offsets fall", ValueError, "cu_seqlens_k must not decrease", RAGGED,
     {"cu_seqlens_k": torch.tensor([0, 9, 3])}),
    ("offsets past the end", ValueError, r"cu_seqlens_q must lie in \[0, 10\], got 0 to 11", RAGGED,
     {"cu_seqlens_q": torch.tensor([0, 9, 11])}),
    ("offsets negative", ValueError, r"cu_seqlens_k must lie in .*, got -1 to 14", RAGGED,
     {"cu_seqlens_k": torch.tensor([-1, 9, 14])}),
    ("lengths too large", ValueError, r"seqused_k must lie in \[0, L\] = \[0, 7\], got 8", GOOD,
     {"seqused_k": torch.tensor([3, 8])}),
    ("lengths negative", ValueError, r"seqused_k must lie in .*, got -1", GOOD, {"seqused_k": torch.tensor([-1, 2])}),
    ("lengths shape", ValueError, r"seqused_k must be \(B,\) = \(2,\), got \(3,\)", GOOD,
     {"seqused_k": torch.tensor([1, 2, 3])}),
    ("lengths of ragged keys", ValueError, "seqused_k must be None with cu_seqlens_k",
     RAGGED, {"seqused_k": torch.tensor([0, 9])}),
    ("bias shape", ValueError, r"bias_k must have 3 dimensions, got \(2, 7\)", GOOD, {"bias_k": torch.ones(2, 7)}),
    ("bias heads", ValueError, r"bias_k must be k's shape without D = \(2, 7, 3\), got \(2, 7, 1\)", GOOD,
     {"bias_k": torch.ones(2, 7, 1)}),
    ("bias dtype", ValueError, r"bias_k must be .*, got torch.int64", GOOD, {"bias_k": torch.ones(2, 7, 3).long()}),
    ("scale", TypeError, "softmax_scale must be a float, got Tensor", GOOD, {"softmax_scale": torch.ones(1)}),
    ("activation", ValueError, "activation must be 'softmax' or 'silu', got 'relu'", GOOD, {"activation": "relu"}),
    ("lse of silu", ValueError, "return_lse must be False for activation 'silu'", GOOD,
     {"activation": "silu", "return_lse": True}),
    ("backend", ValueError, "backend must be None, 'cpu', ", GOOD, {"backend": "nope"}),
]  # fmt: skip


@pytest.mark.parametrize(("error", "message", "base", "changes"), [e[1:] for e in ERRORS], ids=[e[0] for e in ERRORS])
def test_errors(error: type[Exception], message: str, base: dict[str, Any], changes: dict[str, Any]) -> None:
    gk.candidate_cross_attention(**base)
    with pytest.raises(error, match=message):
        gk.candidate_cross_attention(**{**base, **changes})


def test_a_backend_without_the_op() -> None:
    for name, module in BY_NAME.items():
        if not hasattr(module, "candidate_cross_attention"):
            with pytest.raises(ValueError, match=f"backend '{name}' cannot run: it has no candidate_cross_attention"):
                gk.candidate_cross_attention(**GOOD, backend=name)


# ---- torch.library, torch.compile, torch.export ----


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
            x.nan_to_num_(0).requires_grad_(learnt)  # NaN is not equal to itself
    torch.library.opcheck(torch.ops.grank.candidate_cross_attention.default, arguments)
    if not learnt:
        out, lse = torch.ops.grank.candidate_cross_attention.default(*arguments)
        backward = torch.ops.grank.candidate_cross_attention_backward.default
        torch.library.opcheck(backward, (torch.randn_like(out), *arguments[:3], out, lse, *arguments[3:]))


def test_meta_tensors(activation: str) -> None:
    """Shapes and dtypes without a kernel, as for any torch op."""
    q, k, v = (x.to("meta", torch.float16) for x in GOOD.values())
    got = gk.candidate_cross_attention(q, k, v, activation=activation)
    assert (got.shape, got.dtype, got.device.type) == (q.shape, torch.float16, "meta")
    shared, lse = gk.candidate_cross_attention(q[0], k, v, return_lse=True)
    assert (shared.shape, lse.shape, lse.dtype) == (q.shape, q.shape[:-1], torch.float32)


def compiled_agrees(compiler: str, queries: str, history: str, backend: str) -> None:
    torch.compiler.reset()

    def loss(*leaves: torch.Tensor, **more: Any) -> torch.Tensor:
        q, k, v, bias = leaves
        out, lse = gk.candidate_cross_attention(q * 2, k, v, bias_k=bias, **more, return_lse=True, backend=backend)
        return out.tanh().sum() + lse.nan_to_num(posinf=0).sum()

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
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # inductor's own
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


# ---- properties ----


@settings(max_examples=60)
@given(data=st.data())
@pytest.mark.parametrize("backend", BACKENDS)
def test_whatever_hypothesis_comes_up_with(backend: str, data: st.DataObject) -> None:
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
