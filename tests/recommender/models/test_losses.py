import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from grank_kernels.recommender.models import losses
from grank_kernels.recommender.models.losses import softmax_loss

pytestmark = pytest.mark.usefixtures("one_thread")


def gradients(loss: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss, inputs)


@pytest.fixture(params=[1, 7, 10**6], ids=lambda rows: f"chunk={rows}")
def chunk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(losses, "_CHUNK", request.param * 31)


@pytest.mark.usefixtures("chunk")
@pytest.mark.parametrize("with_seen", [False, True])
@pytest.mark.parametrize("with_bias", [False, True])
def test_softmax_loss_is_cross_entropy(with_seen: bool, with_bias: bool) -> None:
    n, N, d = 23, 30, 8
    users = torch.randn(n, d, dtype=torch.float64, requires_grad=True)
    items = torch.randn(N, d, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(N, (n,))
    seen = torch.randint(N + 1, (n, 6))  # targets among them stay
    logits = users @ items.T
    bias = torch.randn(N, dtype=torch.float64) if with_bias else None
    if bias is not None:
        logits = logits + bias * (torch.arange(N) != targets[:, None])
    if with_seen:
        hidden = torch.zeros(n, N + 1, dtype=torch.bool).scatter(1, seen, True)[:, :N]
        logits = logits.masked_fill(hidden.scatter(1, targets[:, None], False), -torch.inf)
    expected = F.cross_entropy(logits, targets)
    got = softmax_loss(users, items, targets, seen if with_seen else None, bias)
    torch.testing.assert_close(got, expected)
    for a, b in zip(gradients(3 * got, users, items), gradients(3 * expected, users, items), strict=True):
        torch.testing.assert_close(a, b)


def test_softmax_loss_survives_large_logits_and_no_rows() -> None:
    users = torch.full((2, 1), 1e3, requires_grad=True)
    items = torch.tensor([[1.0], [2.0], [-5.0]], requires_grad=True)
    loss = softmax_loss(users, items, torch.tensor([0, 1]))
    assert loss.item() == 500  # 1000 short of the best, and the best
    loss.backward()
    assert users.grad is not None
    assert users.grad.isfinite().all()
    none = softmax_loss(users[:0], items, torch.empty(0, dtype=torch.long))
    assert none.item() == 0
    assert not gradients(none, items)[0].any()
