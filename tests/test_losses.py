import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from grank_kernels.models import losses
from grank_kernels.models.losses import retrieval_loss, softmax_loss

pytestmark = pytest.mark.usefixtures("one_thread")


def gradients(loss: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss, inputs)


@pytest.fixture(params=[1, 7, 10**6], ids=lambda rows: f"chunk={rows}")
def chunk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(losses, "_CHUNK", request.param * 31)


@pytest.mark.usefixtures("chunk")
@pytest.mark.parametrize("with_seen", [False, True])
def test_softmax_loss_is_cross_entropy(with_seen: bool) -> None:
    n, N, d = 23, 30, 8
    users = torch.randn(n, d, dtype=torch.float64, requires_grad=True)
    items = torch.randn(N, d, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(N, (n,))
    seen = torch.randint(N + 1, (n, 6))  # targets among them stay
    logits = users @ items.T
    if with_seen:
        hidden = torch.zeros(n, N + 1, dtype=torch.bool).scatter(1, seen, True)[:, :N]
        logits = logits.masked_fill(hidden.scatter(1, targets[:, None], False), -torch.inf)
    expected = F.cross_entropy(logits, targets)
    got = softmax_loss(users, items, targets, seen if with_seen else None)
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


def test_retrieval_loss_leaves_out_what_was_seen_before_and_nothing_else() -> None:
    N, d = 12, 4
    items = torch.randn(N, d)
    windows = torch.tensor([[3, 5, 7, 5], [2, 4, -1, -1]])
    asked = windows[:, 1:] >= 0
    queries = torch.randn(4, d)
    expected = []
    for query, past, target in zip(queries, ([3], [3, 5], [3, 5, 7], [2]), (5, 7, 5, 4), strict=True):
        logits = items @ query
        keep = [item for item in range(N) if item not in past or item == target]
        expected.append(-F.log_softmax(logits[keep], 0)[keep.index(target)])
    got = retrieval_loss(queries, items, windows, asked, None)
    torch.testing.assert_close(got, torch.stack(expected).mean())


def test_drawn_negatives_estimate_the_softmax_over_all() -> None:
    """The mean over draws of `exp` of the corrected logits is the sum over the corpus, so the losses come near."""
    N, d = 400, 8
    items, queries = 0.5 * torch.randn(N, d), 0.5 * torch.randn(1, d)
    windows = torch.tensor([[3, 5]])
    asked = torch.ones(1, 1, dtype=torch.bool)
    exact = F.cross_entropy(queries @ items.T, windows[0, 1:])
    drawn = torch.stack([retrieval_loss(queries, items, windows, asked, 200) for _ in range(300)])
    error = drawn.std() / 300**0.5
    assert abs(drawn.mean() - exact) < 5 * error + 0.01  # Jensen: a log of a mean of 200 is biased by less than 1 %
    assert torch.equal(
        retrieval_loss(queries, items, windows, asked, N), retrieval_loss(queries, items, windows, asked, None)
    )
