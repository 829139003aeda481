"""Every op under torch.func transforms and forward-mode differentiation: correct, or an error with the reason."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from oracle import BACKENDS
from torch.autograd import forward_ad
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

import grank_kernels as gk

B, N, D, K = 3, 40, 6, 4
close = torch.testing.assert_close
Function = Callable[..., torch.Tensor]

pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")  # raised by torch in forward mode


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


# ---- mips_topk ----


def dense_values(queries: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Values of `mips_topk` by a gather, which torch differentiates in every mode."""
    scores = queries @ rows.mT
    return scores.gather(-1, scores.topk(K, dim=-1).indices)


def values_of(backend: str) -> Function:
    return lambda queries, rows: gk.mips_topk(queries, rows, K, backend=backend).values


@pytest.fixture
def operands() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(B, D), torch.randn(N, D)


@pytest.mark.parametrize("transform", [jacrev, jacfwd, hessian], ids=lambda f: f.__name__)
@pytest.mark.parametrize("argument", [0, 1])
def test_derivatives_of_values(transform: Any, argument: int, operands: Any, backend: str) -> None:
    def loss(values: Function) -> Function:
        return lambda *x: values(*x).square().sum(-1)

    got = transform(loss(values_of(backend)), argument)(*operands)
    close(got, transform(loss(dense_values), argument)(*operands), rtol=1e-4, atol=1e-4)


def test_tangents_of_both_operands(operands: Any, backend: str) -> None:
    tangents = torch.randn(B, D), torch.randn(N, D)
    values, tangent = jvp(values_of(backend), operands, tangents)
    want_values, want = jvp(dense_values, operands, tangents)
    close(values, want_values)
    close(tangent, want)


def test_forward_mode_without_torch_func(operands: Any, backend: str) -> None:
    queries, rows = operands
    with forward_ad.dual_level():
        top = gk.mips_topk(forward_ad.make_dual(queries, torch.ones(B, D)), rows, K, backend=backend)
        tangent = forward_ad.unpack_dual(top.values).tangent
    close(tangent, rows[top.indices].sum(-1))


def test_tangents_of_fillers_are_zero(operands: Any, backend: str) -> None:
    queries, rows = operands
    allow = torch.arange(N) < 2
    _, tangent = jvp(lambda q: gk.mips_topk(q, rows, K, allow=allow, backend=backend).values, (queries,), (queries,))
    assert (tangent[:, 2:] == 0).all()
    assert (tangent[:, :2] != 0).all()


@pytest.mark.parametrize("options", [{"coarse": torch.int8}, {"dtype": torch.int8}], ids=["certified", "int8"])
def test_tangents_through_a_table(options: dict[str, Any], operands: Any, backend: str) -> None:
    queries, rows = operands
    table = gk.ItemTable.from_rows(rows, **options)
    _, tangent = jvp(lambda q: gk.mips_topk(q, table, K, backend=backend).values, (queries,), (torch.ones(B, D),))
    close(tangent, table.rows(gk.mips_topk(queries, table, K, backend=backend).indices).sum(-1))


@pytest.mark.parametrize("in_dims", [(0, None), (None, 0), (0, 0), (1, 2)], ids=str)
def test_vmap_of_any_operand(in_dims: tuple[int | None, ...], operands: Any, backend: str) -> None:
    batched = [
        x if d is None else torch.randn(5, *x.shape).movedim(0, d) for x, d in zip(operands, in_dims, strict=True)
    ]
    close(vmap(values_of(backend), in_dims)(*batched), vmap(dense_values, in_dims)(*batched))


def test_vmap_of_filters(operands: Any, backend: str) -> None:
    queries, rows = operands
    allow, exclude = torch.rand(5, N) < 0.5, torch.randint(-1, N, (5, B, 3))

    def indices(allow: torch.Tensor, exclude: torch.Tensor) -> torch.Tensor:
        return gk.mips_topk(queries, rows, K, allow=allow, exclude=exclude, backend=backend).indices

    want = torch.stack([indices(*x) for x in zip(allow, exclude, strict=True)])
    assert torch.equal(vmap(indices)(allow, exclude), want)


def test_errors_inside_a_transform_name_the_argument(operands: Any, backend: str) -> None:
    queries, rows = operands
    with pytest.raises(ValueError, match=r"exclude must hold ids in .*, got 99"):
        vmap(lambda e: gk.mips_topk(queries, rows, K, exclude=e, backend=backend).values)(torch.full((2, B, 1), 99))


# ---- candidate_cross_attention ----


def dense_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    logits = torch.einsum("bchd,blhd->bhcl", q, k) * D**-0.5 + bias.mT[:, :, None]
    return torch.einsum("bhcl,blhd->bchd", logits.softmax(-1), v)


def attention_of(backend: str) -> Function:
    return lambda q, k, v, bias: gk.candidate_cross_attention(q, k, v, bias_k=bias, backend=backend)  # type: ignore[return-value]


@pytest.fixture
def attended() -> tuple[torch.Tensor, ...]:
    return torch.randn(2, 3, 2, D), torch.randn(2, 5, 2, D), torch.randn(2, 5, 2, D), torch.randn(2, 5, 2)


@pytest.mark.parametrize("argument", range(4))
def test_gradient_of_attention(argument: int, attended: Any, backend: str) -> None:
    def loss(attend: Function) -> Function:
        return lambda *x: attend(*x).square().sum()

    close(grad(loss(attention_of(backend)), argument)(*attended), grad(loss(dense_attention), argument)(*attended))


def test_jacobian_and_vjp_of_attention(attended: Any, backend: str) -> None:
    close(jacrev(attention_of(backend))(*attended), jacrev(dense_attention)(*attended))
    (out, pull), (want, want_pull) = (vjp(attend, *attended) for attend in (attention_of(backend), dense_attention))
    close(out, want)
    close(pull(torch.ones_like(out)), want_pull(torch.ones_like(out)))


def test_gradients_of_attention_by_sample(attended: Any, backend: str) -> None:
    def loss(attend: Function) -> Function:
        return lambda q: attend(q, *attended[1:]).square().sum()

    q = torch.randn(4, *attended[0].shape)
    close(vmap(grad(loss(attention_of(backend))))(q), vmap(grad(loss(dense_attention)))(q))


def dense_lse(q: torch.Tensor, k: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    logits = torch.einsum("bchd,blhd->bhcl", q, k) * D**-0.5 + bias.mT[:, :, None]
    return logits.logsumexp(-1).mT


@pytest.mark.parametrize("argument", range(3))
def test_derivatives_of_lse(argument: int, attended: Any, backend: str) -> None:
    """With values and without; reverse mode and by sample."""
    q, k, v, bias = attended

    def lse(q: torch.Tensor, k: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return gk.candidate_cross_attention(q, k, bias_k=bias, return_lse=True, backend=backend)[1]

    def lse_of_both(q: torch.Tensor, k: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return gk.candidate_cross_attention(q, k, v, bias_k=bias, return_lse=True, backend=backend)[1]

    want = jacrev(dense_lse, argument)(q, k, bias)
    close(jacrev(lse, argument)(q, k, bias), want)
    close(jacrev(lse_of_both, argument)(q, k, bias), want)
    many = torch.randn(4, *q.shape)
    close(
        vmap(grad(lambda q: lse(q, k, bias).square().sum()))(many),
        vmap(grad(lambda q: dense_lse(q, k, bias).square().sum()))(many),
    )


@pytest.mark.parametrize("transform", [jacfwd, hessian], ids=lambda f: f.__name__)
def test_attention_refuses_forward_mode(transform: Any, attended: Any, backend: str) -> None:
    with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
        transform(lambda q: attention_of(backend)(q, *attended[1:]).sum())(attended[0])
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="no forward-mode derivative"):
        attention_of(backend)(forward_ad.make_dual(attended[0], attended[0]), *attended[1:])


def test_attention_refuses_a_second_derivative(attended: Any, backend: str) -> None:
    with pytest.raises(NotImplementedError, match="no second derivative"):
        grad(lambda q: grad(lambda q: attention_of(backend)(q, *attended[1:]).sum())(q).sum())(attended[0])


# ---- score_candidates ----


def test_score_candidates_maps_and_refuses_derivatives(backend: str) -> None:
    ids, rows, keys, values = torch.randint(0, N, (2, 7)), torch.randn(N, D), torch.randn(9, D), torch.randn(9, 5)
    head = {"user_hidden": torch.randn(2, 5), "item_weight": torch.randn(D, 5), "out_weight": torch.randn(5)}

    def scores(keys: torch.Tensor) -> torch.Tensor:
        cu_seqlens = torch.tensor([0, 4, 9])
        return gk.score_candidates(ids, rows, keys, values, cu_seqlens=cu_seqlens, **head, backend=backend)

    many = torch.stack([keys, keys.flip(0)])
    close(vmap(scores)(many), torch.stack([scores(x) for x in many]))
    with pytest.raises(NotImplementedError, match="score_candidates has no derivative"):
        jvp(scores, (keys,), (keys,))
    with pytest.raises(ValueError, match="keys must not require a gradient"):
        grad(lambda keys: scores(keys).sum())(keys)
