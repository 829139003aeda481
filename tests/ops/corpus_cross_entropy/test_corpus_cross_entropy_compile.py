"""corpus_cross_entropy under torch.library.opcheck, torch.compile and torch.func."""

from typing import Any

import pytest
import torch
from corpus_oracle import Loss, loss_problem

import grank_kernels as gk

pytestmark = pytest.mark.usefixtures("one_thread")


def op_arguments(problem: Loss, backend: str) -> tuple[Any, ...]:
    exclude = problem.exclude or (None, None, None)
    return (problem.users, problem.items, problem.targets, *exclude, problem.bias, problem.scale, backend)


@pytest.mark.parametrize("learnt", [False, True])
@pytest.mark.parametrize(
    "case",
    [
        pytest.param({"form": "windows"}, id="windows"),
        pytest.param({"form": "none", "bias": False, "dtype": torch.bfloat16}, id="plain"),
    ],
)
def test_opcheck(case: dict[str, Any], learnt: bool, backend: str) -> None:
    arguments = op_arguments(loss_problem(7, 30, 8, **case), backend)
    for x in arguments:
        if isinstance(x, torch.Tensor) and x.is_floating_point():
            x.requires_grad_(learnt)
    torch.library.opcheck(torch.ops.grank.corpus_cross_entropy.default, arguments)


def test_opcheck_of_the_gradient(backend: str) -> None:
    arguments = op_arguments(loss_problem(7, 30, 8, form="windows"), backend)
    loss, normaliser, _ = torch.ops.grank.corpus_cross_entropy.default(*arguments)
    torch.library.opcheck(
        torch.ops.grank.corpus_cross_entropy_backward.default, (torch.ones(7), loss, normaliser, *arguments)
    )


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile(dynamic: bool, backend: str) -> None:
    def mean_loss(users: torch.Tensor, items: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return gk.corpus_cross_entropy(2 * users, items, targets, scale=0.3, backend=backend).mean()

    problem = loss_problem(7, 30, 8)
    leaves = [x.requires_grad_() for x in (problem.users, problem.items)]
    compiled = torch.compile(mean_loss, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    got, want = (f(*leaves, problem.targets) for f in (compiled, mean_loss))
    torch.testing.assert_close(got, want)
    for x, y in zip(torch.autograd.grad(got, leaves), torch.autograd.grad(want, leaves), strict=True):
        torch.testing.assert_close(x, y)


def test_func_grad_and_vmap(backend: str) -> None:
    problem = loss_problem(6, 30, 8)

    def total(users: torch.Tensor) -> torch.Tensor:
        return gk.corpus_cross_entropy(users, problem.items, problem.targets, backend=backend).sum()

    users = problem.users.requires_grad_()
    (want,) = torch.autograd.grad(total(users), users)
    torch.testing.assert_close(torch.func.grad(total)(problem.users.detach()), want)
    batch = torch.stack([problem.users.detach(), problem.users.detach() * 2])
    torch.testing.assert_close(torch.func.vmap(total)(batch), torch.stack([total(x) for x in batch]))


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")  # torch's own, in forward mode
def test_derivatives_that_do_not_exist(backend: str) -> None:
    problem = loss_problem(6, 30, 8)

    def total(items: torch.Tensor) -> torch.Tensor:
        return gk.corpus_cross_entropy(problem.users, items, problem.targets, backend=backend).sum()

    with pytest.raises(NotImplementedError, match="corpus_cross_entropy has no forward-mode derivative"):
        torch.func.jvp(total, (problem.items,), (problem.items,))
    with pytest.raises(NotImplementedError, match="corpus_cross_entropy has no second derivative"):
        torch.func.grad(lambda items: torch.func.grad(total)(items).sum())(problem.items)
