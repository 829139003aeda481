"""Losses and gradients of corpus_cross_entropy against float64, on every backend."""

import pytest
import torch
from corpus_oracle import Loss, check_loss, loss_problem
from hypothesis import given, settings
from hypothesis import strategies as st
from ranker_oracle import backends_of
from torch.nn import functional as F

import grank_kernels as gk

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("form", ["none", "padded", "pair", "windows"])
def test_errors_are_at_most_twice_those_of_torch(form: str, dtype: torch.dtype, backend: str) -> None:
    check_loss(loss_problem(37, 501, 24, form=form, dtype=dtype), backend)


@pytest.mark.parametrize(
    ("R", "N", "d"), [(1, 1, 8), (0, 5, 4), (3, 1, 1), (5, 2, 3), (130, 97, 17), (2, 5000, 40), (9, 260, 130)]
)
@pytest.mark.parametrize("bias", [False, True])
def test_shapes(R: int, N: int, d: int, bias: bool, backend: str) -> None:
    check_loss(loss_problem(R, N, d, bias=bias), backend)


@pytest.mark.parametrize("backend", backends_of("corpus_cross_entropy"))
@settings(max_examples=15)
@given(
    R=st.integers(0, 70),
    N=st.integers(1, 300),
    d=st.integers(1, 70),
    form=st.sampled_from(["none", "padded", "pair", "windows"]),
    bias=st.booleans(),
    scale=st.sampled_from([1.0, 0.1, -0.5, 0.0]),
    seed=st.integers(0, 1000),
)
def test_whatever_hypothesis_comes_up_with(
    R: int, N: int, d: int, form: str, bias: bool, scale: float, seed: int, backend: str
) -> None:
    check_loss(loss_problem(R, N, d, form=form, bias=bias, scale=scale, seed=seed), backend)


def test_rows_without_target_cost_nothing(backend: str) -> None:
    problem = loss_problem(12, 50, 8)
    users = problem.users.clone()
    users[4] = torch.nan  # a row without target
    loss, grad_users, grad_items, grad_bias = problem.but(users=users).call(backend)
    assert problem.targets[4] == -1
    assert loss[4] == 0
    assert not grad_users[4].any()
    assert grad_items.isfinite().all()
    assert grad_bias.isfinite().all()


def test_no_target_at_all(backend: str) -> None:
    problem = loss_problem(3, 50, 8).but(targets=torch.full((3,), -1))
    assert not any(x.any() for x in problem.call(backend))


def test_the_target_is_eligible_where_it_is_excluded(backend: str) -> None:
    users, items, targets = torch.randn(4, 8), torch.randn(6, 8), torch.tensor([0, 5, 3, 2])
    everything = torch.arange(6).expand(4, -1)
    assert not gk.corpus_cross_entropy(users, items, targets, exclude=everything, backend=backend).any()
    exclude = torch.stack([targets, targets], 1)
    want = gk.corpus_cross_entropy(users, items, targets, backend=backend)
    assert torch.equal(gk.corpus_cross_entropy(users, items, targets, exclude=exclude, backend=backend), want)


@pytest.mark.parametrize("size", [1e4, -1e4, 1e6, 1e30])
def test_large_logits_are_weighed_as_torch_weighs_them(size: float, backend: str) -> None:
    """Products that are exact in float32; two are equal and the largest."""
    items = torch.tensor([[1.0], [1.0], [0.5], [-1.0]])
    problem = Loss(torch.full((4, 1), size), items, torch.arange(4))
    got, want = problem.call(backend), problem.plain()
    for ours, torchs in zip(got, want, strict=True):
        torch.testing.assert_close(ours, torchs, rtol=1e-5, atol=1e-5 * max(1.0, float(torchs.abs().max())))


def test_a_learnt_target_has_a_precise_gradient(backend: str) -> None:
    """With a probability of 1 - 1e-7 the gradient is made of 1 - p, which has no digits as a difference of float32."""
    problem = Loss(torch.tensor([[8.0, 1.0]]), torch.tensor([[2.0, 0.0], [0.0, 0.0], [0.0, 1.0]]), torch.tensor([0]))
    for ours, exact in zip(problem.call(backend), problem.exact(), strict=True):
        torch.testing.assert_close(ours.double(), exact.double(), rtol=2e-5, atol=0)


@pytest.mark.parametrize("number", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("where", ["bias of the target", "bias of another", "users", "items"])
def test_numbers_that_are_not_finite(where: str, number: float, backend: str) -> None:
    problem = loss_problem(6, 40, 8, form="none")
    bias, users, items = problem.bias.clone(), problem.users.clone(), problem.items.clone()  # type: ignore[union-attr]
    target = int(problem.targets[0])
    match where:
        case "bias of the target":
            bias[target] = number
        case "bias of another":
            bias[(target + 1) % 40] = number
        case "users":
            users[0, 3] = number
        case "items":
            items[target, 3] = number
    problem = problem.but(bias=bias, users=users, items=items)
    got, want = problem.call(backend)[0], problem.plain()[0]
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5, equal_nan=True)


def test_one_probability_over_all_items(backend: str) -> None:
    """Without any other item's probability the loss is 0, and so is the gradient."""
    bias = torch.tensor([0.0, -torch.inf, -torch.inf])
    problem = Loss(torch.randn(2, 4), torch.randn(3, 4), torch.tensor([0, 0]), None, bias)
    assert not any(x.any() for x in problem.call(backend))


def test_layouts(backend: str) -> None:
    problem = loss_problem(20, 100, 16)
    want = problem.call(backend)
    wide = torch.randn(100, 40)
    wide[:, 3:19] = problem.items
    strided = problem.but(items=wide[:, 3:19], users=problem.users.T.contiguous().T)
    for ours, contiguous in zip(strided.call(backend), want, strict=True):
        torch.testing.assert_close(ours, contiguous, rtol=1e-6, atol=1e-6)


def test_autocast_multiplies_in_its_dtype(backend: str) -> None:
    problem = loss_problem(20, 100, 16)
    want = problem.but(users=problem.users.bfloat16(), items=problem.items.bfloat16()).call(backend)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = problem.call(backend)
    assert [x.dtype for x in got] == [torch.float32] * 4
    for ours, casted in zip(got, want, strict=True):
        assert torch.equal(ours, casted.float())


def test_arrays(backend: str) -> None:
    problem = loss_problem(5, 30, 8)
    arrays = (x.numpy() for x in (problem.users, problem.items, problem.targets))
    got = gk.corpus_cross_entropy(*arrays, backend=backend)
    want = F.cross_entropy(problem.users @ problem.items.T, problem.targets, reduction="none", ignore_index=-1)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
