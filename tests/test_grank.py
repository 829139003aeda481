from pathlib import Path

import pytest
import torch
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch.nn import functional as F

from grank_kernels.data import Interactions, LeaveOneOut, last_items, leave_one_out
from grank_kernels.evaluation import hit_and_ndcg, recommend
from grank_kernels.models import GRank
from grank_kernels.training import train_grank

N = 50


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def model() -> GRank:
    torch.manual_seed(0)
    model = GRank(N, dim=16, heads=2, short_history=8, long_history=12, hidden=16).eval()
    for parameter in model.parameters():  # position vectors and the like start too small to matter
        torch.nn.init.normal_(parameter, std=0.3)
    return model


@pytest.fixture
def history() -> torch.Tensor:
    rows = torch.randint(1, N, (6, 16), generator=torch.Generator().manual_seed(1))
    lengths = torch.tensor([16, 12, 8, 3, 1, 0])
    return rows.where(torch.arange(16) >= 16 - lengths.unsqueeze(1), -1)


def circle(users: int = 40, items: int = 30, length: int = 20) -> LeaveOneOut:
    """Users who take the items in turns, each from a start of their own."""
    rows = (torch.arange(users).unsqueeze(1) * 7 + torch.arange(length)) % items
    who = torch.arange(users).repeat_interleave(length)
    return leave_one_out(Interactions.from_columns(who, rows.flatten(), range(rows.numel()), [1] * rows.numel()))


def scores(model: GRank, history: torch.Tensor, candidates: torch.Tensor) -> torch.Tensor:
    users = model.user_vectors(history)
    logits = (users @ model.items.T).gather(1, candidates.clamp(min=0))
    return model.rank(history, users, candidates, logits)


def test_shapes(model: GRank, history: torch.Tensor) -> None:
    assert model.user_vectors(history).shape == (6, 16)
    assert model.generator(model.items, history).shape == (6, 8, 16)
    assert model.generator(model.items, history[:, -3:]).shape == (6, 3, 16)
    assert scores(model, history, torch.zeros(6, 4, dtype=torch.long)).shape == (6, 4)


def test_permuting_candidates_permutes_scores(model: GRank, history: torch.Tensor) -> None:
    candidates = torch.stack([torch.randperm(N)[:20] for _ in range(6)])
    order = torch.randperm(20)
    expected = scores(model, history, candidates)
    torch.testing.assert_close(scores(model, history, candidates[:, order]), expected[:, order])
    torch.testing.assert_close(scores(model, history, candidates[:, :1]), expected[:, :1])  # nor do they see each other


def test_candidates_past_the_end_score_minus_infinity(model: GRank, history: torch.Tensor) -> None:
    candidates = torch.tensor([[3, -1, 4]]).expand(6, 3)
    got = scores(model, history, candidates)
    assert (got[:, 1] == -torch.inf).all()
    torch.testing.assert_close(got[:, [0, 2]], scores(model, history, candidates[:, [0, 2]]))


def test_padding_is_not_seen(model: GRank, history: torch.Tensor) -> None:
    candidates = torch.arange(1, 21).expand(6, 20)
    users, ranked = model.user_vectors(history), scores(model, history, candidates)
    longer = F.pad(history, (5, 0), value=-1)
    assert torch.equal(model.user_vectors(longer), users)
    assert torch.equal(scores(model, longer, candidates), ranked)
    short = history[3:4, -3:]  # a row without any padding at all
    torch.testing.assert_close(model.user_vectors(short), users[3:4])
    torch.testing.assert_close(scores(model, short, candidates[:1]), ranked[3:4])


def test_nan_does_not_leak_from_padding(model: GRank, history: torch.Tensor) -> None:
    candidates = torch.arange(1, 21).expand(6, 20)
    expected = scores(model, history, candidates)
    with torch.no_grad():
        model.items[0] = torch.nan  # the row that padding would read, which no history and no candidate holds
    users = model.user_vectors(history)
    got = model.rank(history, users, candidates, users @ model.items[1:21].T)
    torch.testing.assert_close(got, expected)
    got.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_empty_history_scores_by_item_and_user_alone(model: GRank) -> None:
    history = torch.full((1, 16), -1)
    candidates = torch.arange(10).unsqueeze(0)
    users = model.user_vectors(history)
    hidden = F.relu(model.ranker.hidden_item(model.items[:10]) + model.ranker.hidden_user(users))
    expected = model.ranker.out(hidden).squeeze(1) + model.items[:10] @ users[0]
    torch.testing.assert_close(scores(model, history, candidates)[0], expected)


def test_user_vectors_do_not_see_the_future(model: GRank, history: torch.Tensor) -> None:
    full = model.generator(model.items, history)
    for t in range(8):
        later = history.clone()
        later[:, 8 + t + 1 :] = torch.randint(N, (7 - t,))
        assert torch.equal(model.generator(model.items, later)[:, : t + 1], full[:, : t + 1])
    changed = history.clone()
    changed[:, -1] = (changed[:, -1] + 1) % N
    assert not torch.isclose(model.user_vectors(changed), full[:, -1]).all(1).any()


def test_histories_end_where_the_model_says(model: GRank, history: torch.Tensor) -> None:
    candidates = torch.arange(20).expand(1, 20)
    base = history[:1]
    old, long, short = (base.clone() for _ in range(3))
    old[:, :4] = 7  # beyond 12: nobody reads it
    long[:, 4:8] = 7  # beyond 8: only the Ranker does
    short[:, 8:] = 7
    assert torch.equal(scores(model, old, candidates), scores(model, base, candidates))
    assert torch.equal(model.user_vectors(long), model.user_vectors(base))
    assert not torch.equal(scores(model, long, candidates), scores(model, base, candidates))
    assert not torch.isclose(model.user_vectors(short), model.user_vectors(base)).all()


def test_retrieval_loss_is_the_softmax_over_unseen_items(model: GRank, history: torch.Tensor) -> None:
    windows = history[:4]  # 15 columns of history and a target
    expected = []
    for row in windows:
        for column in range(8, 16):  # the Generator reads 8, so the last 8 columns are targets
            if row[column - 1] < 0:
                continue
            u = model.generator(model.items, row[None, :-1])[0, column - 8]
            seen = set(row[:column].tolist()) - {int(row[column])}
            logits = torch.stack(
                [u @ e if i not in seen else torch.tensor(-torch.inf) for i, e in enumerate(model.items)]
            )
            expected.append(F.cross_entropy(logits, row[column]))
    torch.testing.assert_close(model.losses(windows)[0], torch.stack(expected).mean())


def test_ranking_loss_is_the_softmax_over_target_and_negatives(model: GRank) -> None:
    model.negatives = N - 1  # all of them, so that the draw does not matter
    window = torch.full((1, 13), -1)
    window[0, -2:] = torch.tensor([4, 9])  # one moment: 9 after 4
    users = model.user_vectors(window[:, :-1])
    everything = torch.arange(N).unsqueeze(0)
    outputs = model.rank(window[:, :-1], users, everything, torch.zeros(1, N))
    torch.testing.assert_close(model.losses(window)[1], F.cross_entropy(outputs, torch.tensor([9])))


def test_both_losses_train_what_they_should(model: GRank, history: torch.Tensor) -> None:
    retrieval, ranking = model.losses(history[:4])
    retrieval.backward(retain_graph=True)
    assert all(p.grad is None for p in model.ranker.parameters())
    assert all(p.grad is not None and p.grad.any() for p in model.generator.parameters())
    model.zero_grad()
    ranking.backward()  # one stage, end to end: the second loss also reaches the Generator and the item table
    trained = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert trained | {"ranker.out.bias"} == {name for name, _ in model.named_parameters()}  # a bias moves no softmax


def test_training_learns_and_is_reproducible(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    split = circle()
    sizes = {"dim": 16, "short_history": 8, "long_history": 12, "hidden": 16, "negatives": 8}
    first, again, other = (train_grank(split, epochs=10, seed=seed, learning_rate=1e-2, **sizes) for seed in (3, 3, 4))
    for a, b in zip(first.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(first.items, other.items)
    assert not first.training
    assert list(tmp_path.iterdir()) == []
    lists = recommend(first, split.test, 10)
    assert hit_and_ndcg(lists.first, split.test.targets, 1).hr > 0.9  # the next item of the circle; chance is 1 in 11
    assert hit_and_ndcg(lists.second, split.test.targets, 1).hr > 0.9


def test_training_that_was_ended_early_does_not_look_like_success(monkeypatch: pytest.MonkeyPatch) -> None:
    def terminated(model: GRank, windows: torch.Tensor) -> None:
        raise SIGTERMException  # what Lightning makes of the signal

    monkeypatch.setattr(GRank, "losses", terminated)
    with pytest.raises(SystemExit) as status:
        train_grank(circle(), epochs=1)
    assert status.value.code == 143


def test_recommend_equals_scoring_every_unseen_item(model: GRank) -> None:
    cases = circle().test
    lists = recommend(model, cases, N)
    history = last_items(cases.items, cases.offsets[:-1], cases.offsets[1:], 12)
    for case in range(5):
        seen = cases.items[cases.offsets[case] : cases.offsets[case + 1]].tolist()
        unseen = torch.tensor([item for item in range(N) if item not in seen])
        with torch.no_grad():
            first = model.user_vectors(history[case : case + 1])[0] @ model.items[unseen].T
            second = scores(model, history[case : case + 1], unseen.unsqueeze(0))[0]
        for got, expected in ((lists.first, first), (lists.second, second)):
            assert got[case, : len(unseen)].tolist() == unseen[expected.argsort(descending=True)].tolist()
            assert (got[case, len(unseen) :] == -1).all()
