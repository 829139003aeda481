"""The folded Ranker is the Ranker, to rounding, on every backend of score_candidates."""

import pytest
import torch
from torch.nn import functional as F

import grank_kernels as gk
from grank_kernels.backends import BACKENDS
from grank_kernels.ops.dispatch import choose
from grank_kernels.recommender.models import Ranker

N, D, HIDDEN, HISTORY = 60, 24, 40, 12
LENGTHS = (16, 12, 11, 3, 1, 0)

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    some = torch.ones(1, D)
    try:
        return choose("score_candidates", request.param, some, some, torch.ones(1, HIDDEN))
    except ValueError as reason:
        pytest.skip(str(reason))


@pytest.fixture
def ranker() -> Ranker:
    ranker = Ranker(D, HISTORY, HIDDEN, dropout=0.5).eval()
    for parameter in ranker.parameters():  # recency and the output start too small to matter
        torch.nn.init.normal_(parameter, std=D**-0.5)
    return ranker


@pytest.fixture
def inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Table, histories, users, candidates."""
    B, L = len(LENGTHS), max(LENGTHS)
    padding = torch.arange(L) >= torch.tensor(LENGTHS)[:, None]
    history = torch.randint(1, N, (B, L)).masked_fill(padding, -1)
    table = torch.randn(N, D)
    table[0] = torch.nan  # the row that padding would read
    return table, history, torch.randn(B, D), torch.randint(1, N, (B, 30))


def read(table: torch.Tensor, history: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The rows of histories, and how many there are."""
    return table[history.clamp(min=0)], (history >= 0).sum(1)


def folded_scores(
    ranker: Ranker, inputs: tuple[torch.Tensor, ...], backend: str, dtype: torch.dtype | None = None
) -> torch.Tensor:
    table, history, users, candidates = inputs
    items = table if dtype is None else table.to(dtype)
    folded = ranker.fold(*read(table, history), users, dtype=dtype)
    return gk.score_candidates(candidates, items, **folded._asdict(), backend=backend)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_folded_is_unfolded(dtype: torch.dtype, ranker: Ranker, inputs: tuple[torch.Tensor, ...], backend: str) -> None:
    with torch.no_grad():
        got = folded_scores(ranker, inputs, backend, None if dtype == torch.float32 else dtype)
        table, history, users, candidates = inputs
        plain = ranker.to(dtype)(*read(table.to(dtype), history), users.to(dtype), table.to(dtype)[candidates])
        exact = ranker.double()(*read(table.double(), history), users.double(), table.double()[candidates])
    assert exact.std() > 0.1
    lost = float((plain - exact).abs().max())
    assert float((got - exact).abs().max()) <= 2 * lost


def test_every_part_counts(ranker: Ranker, inputs: tuple[torch.Tensor, ...], backend: str) -> None:
    """Or the comparison would say nothing of a part whose weights are 0."""
    want = folded_scores(ranker, inputs, backend)
    for name, parameter in ranker.named_parameters():
        with torch.no_grad():
            before = parameter.clone()
            parameter.mul_(2)
            assert not torch.allclose(folded_scores(ranker, inputs, backend), want), name
            parameter.copy_(before)
    assert torch.equal(folded_scores(ranker, inputs, backend), want)


def test_fold_of_the_operands_is_rounded_once(ranker: Ranker, inputs: tuple[torch.Tensor, ...]) -> None:
    table, history, users, _ = inputs
    full, half = (ranker.fold(*read(table, history), users, dtype=dtype) for dtype in (None, torch.float16))
    for name, x, y in zip(full._fields, full, half, strict=True):
        if isinstance(x, torch.Tensor) and x.is_floating_point():
            assert not x.requires_grad
            assert y.dtype == torch.float16, name
            assert torch.equal(x.half(), y), name
    assert full.cu_seqlens.tolist() == [0, 12, 24, 35, 38, 39, 39]
    assert full.keys.shape == (39, D)
    assert full.values.shape == (39, HIDDEN)


def test_fold_of_nothing(ranker: Ranker, inputs: tuple[torch.Tensor, ...], backend: str) -> None:
    """No history, no columns of history, no users."""
    table, history, users, candidates = inputs
    none = torch.full_like(history, -1)
    want = ranker(*read(table, none), users, table[candidates]).detach()
    torch.testing.assert_close(folded_scores(ranker, (table, none, users, candidates), backend), want)
    torch.testing.assert_close(folded_scores(ranker, (table, none[:, :0], users, candidates), backend), want)
    assert folded_scores(ranker, (table, history[:0], users[:0], candidates[:0]), backend).shape == (0, 30)


def test_padding_and_other_users_do_not_matter(ranker: Ranker, inputs: tuple[torch.Tensor, ...], backend: str) -> None:
    table, history, users, candidates = inputs
    want = folded_scores(ranker, inputs, backend)
    assert want.isfinite().all()
    longer = (table, F.pad(history, (0, 5), value=-1), users, candidates)
    assert torch.equal(folded_scores(ranker, longer, backend), want)
    for b in range(len(history)):
        one = slice(b, b + 1)
        alone = (table, history[one], users[one], candidates[one])
        torch.testing.assert_close(folded_scores(ranker, alone, backend), want[one])


def test_candidates_of_an_int8_table(ranker: Ranker, inputs: tuple[torch.Tensor, ...], backend: str) -> None:
    table, history, users, candidates = inputs
    items = gk.ItemTable.from_rows(table[1:], dtype=torch.int8, ids=torch.arange(1, N) * 7)
    folded = ranker.fold(*read(table, history), users)._asdict()
    got = gk.score_candidates(candidates * 7, items, **folded, backend=backend)
    rounded = items.rows(candidates.reshape(-1) * 7)
    ids = torch.arange(candidates.numel()).reshape(candidates.shape)
    torch.testing.assert_close(got, gk.score_candidates(ids, rounded, **folded, backend="reference"))
