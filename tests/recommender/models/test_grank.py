"""GRank: which inputs its parts depend on (test_blocks has the attention), and that training and serving agree."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from grank_kernels import mips_topk
from grank_kernels.recommender.data import Batch, Histories, TrainingWindows
from grank_kernels.recommender.models import GRank, GRankConfig, grank

N, D = 40, 16
CONFIG = GRankConfig(
    dim=D, heads=2, short_history=8, long_history=12, hidden=24, auxiliary_weight=1.0, ranking_weight=1.0
)
ROWS = {
    "full": CONFIG,
    "auxiliary": replace(CONFIG, ranker=False),
    "ranker": replace(CONFIG, auxiliary=False),
    "pure": replace(CONFIG, auxiliary=False, ranker=False),
}

pytestmark = pytest.mark.usefixtures("one_thread")


def build(config: GRankConfig) -> GRank:
    """In double precision, with weights large enough that every part changes the scores."""
    model = GRank(N, config).double().eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def some_histories(*lengths: int) -> Histories:
    items = [torch.randperm(N)[:length].tolist() for length in lengths]
    return Histories.from_lists(items, [[item % 3 > 0 for item in own] for own in items])


@pytest.fixture
def batch() -> Batch:
    return some_histories(16, 12, 9, 8, 3, 1, 0).pad()


def scores(model: GRank, batch: Batch, candidates: Tensor) -> Tensor:
    users = model.user_vectors(batch)
    logits = (users @ model.item_vectors().T).gather(1, candidates.clamp(min=0))
    return model.rank(batch, users, candidates, logits)


def test_user_vectors_are_the_same_bits_with_and_without_the_branch(batch: Batch) -> None:
    full = build(CONFIG).float()
    pure = GRank(N, ROWS["pure"]).eval()
    missing = pure.load_state_dict(full.state_dict(), strict=False)
    assert not missing.missing_keys
    assert any("auxiliary" in key for key in missing.unexpected_keys)
    assert torch.equal(full.user_vectors(batch), pure.user_vectors(batch))
    windows = some_histories(16, 12, 2).pad()
    losses, alone = full.losses(windows), pure.losses(windows)
    assert set(losses) == {"retrieval", "auxiliary", "ranking"}
    assert set(alone) == {"retrieval"}
    assert torch.equal(losses["retrieval"], alone["retrieval"])


def test_user_vectors_have_their_norm(batch: Batch) -> None:
    model = build(replace(CONFIG, temperature=0.1))
    torch.testing.assert_close(model.user_vectors(batch).norm(dim=1), torch.full((7,), 10.0).double())
    torch.testing.assert_close(model.item_vectors().norm(dim=1), torch.ones(N).double())


@pytest.mark.parametrize("name", ROWS)
def test_permuting_candidates_permutes_scores(name: str, batch: Batch) -> None:
    model = build(ROWS[name])
    candidates = torch.stack([torch.randperm(N)[:20] for _ in batch.items])
    order = torch.randperm(20)
    expected = scores(model, batch, candidates)
    torch.testing.assert_close(scores(model, batch, candidates[:, order]), expected[:, order])
    torch.testing.assert_close(scores(model, batch, candidates[:, :1]), expected[:, :1])  # nor do they see each other


@pytest.mark.parametrize("name", ["full", "auxiliary", "ranker"])
def test_candidates_past_the_end_score_minus_infinity(name: str, batch: Batch) -> None:
    model = build(ROWS[name])
    candidates = torch.tensor([[3, -1, 4]]).expand(7, 3)
    got = scores(model, batch, candidates)
    assert (got[:, 1] == -torch.inf).all()
    torch.testing.assert_close(got[:, [0, 2]], scores(model, batch, candidates[:, [0, 2]]))


@pytest.mark.parametrize("name", ROWS)
def test_padding_and_what_is_too_old_are_not_seen(name: str, batch: Batch) -> None:
    model = build(ROWS[name])
    candidates = torch.arange(20).expand(7, 20)
    users, ranked = model.user_vectors(batch), scores(model, batch, candidates)
    assert ranked.isfinite().all()
    wider = Batch(F.pad(batch.items, (0, 5), value=-1), F.pad(batch.feedback, (0, 5)))
    torch.testing.assert_close(model.user_vectors(wider), users)
    torch.testing.assert_close(scores(model, wider, candidates), ranked)
    newest = batch.newest(model.history)
    assert newest.items.shape[1] == model.history
    torch.testing.assert_close(scores(model, newest, candidates), ranked)
    for b in range(7):
        alone = Batch(batch.items[b : b + 1, : batch.lengths[b]], batch.feedback[b : b + 1, : batch.lengths[b]])
        torch.testing.assert_close(scores(model, alone, candidates[:1]), ranked[b : b + 1])


@pytest.mark.parametrize("name", ["full", "auxiliary", "ranker"])
def test_a_second_stage_counts_what_the_first_does_not(name: str, batch: Batch) -> None:
    """A Ranker sees further back than the Generator; feedback reaches the scores through u and U."""
    model = build(ROWS[name])
    candidates = torch.arange(20).expand(7, 20)
    before = scores(model, batch, candidates)
    older = batch.items.clone()
    older[0, 5] = (older[0, 5] + 1) % N  # of 16: the eleventh from the end
    changed = (scores(model, batch._replace(items=older), candidates) != before).any(1).tolist()
    assert changed == [model.ranker is not None, *6 * [False]]
    disliked = batch._replace(feedback=torch.zeros_like(batch.feedback))
    assert (model.user_vectors(disliked)[:5] != model.user_vectors(batch)[:5]).any(1).all()


@pytest.fixture
def every_moment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows with 1, 2, 4 or 8 moments have each of theirs as often among 8."""

    def moments(window: Batch, number: int) -> Tensor:
        return torch.arange(number) % (window.lengths - 1).unsqueeze(1)

    monkeypatch.setattr(grank, "draw_moments", moments)


@pytest.mark.usefixtures("every_moment")
@pytest.mark.parametrize("name", ROWS)
def test_training_asks_what_serving_answers(name: str) -> None:
    """With every moment and every item among the candidates, each loss is a mean over what serving would score."""
    model = build(replace(ROWS[name], moments=8, negatives=N))
    histories = some_histories(9, 5, 2, 9, 3)
    losses = model.losses(histories.pad())
    first, second = [], []
    for own in histories.pad().items.tolist():
        own = [item for item in own if item >= 0]
        second.append([])
        for stop in range(1, len(own)):
            past = Histories.from_lists([own[:stop]], [[item % 3 > 0 for item in own[:stop]]]).pad()
            users = model.user_vectors(past)
            logits = users @ model.item_vectors().T
            outputs = model.rank(past, users, torch.arange(N).unsqueeze(0), logits) - logits
            unseen = torch.ones(N, dtype=torch.bool).scatter(0, past.items[0], False)
            for scored, found in ((logits, first), (outputs, second[-1])):
                found.append(F.cross_entropy(scored[0].where(unseen, -torch.inf), torch.tensor(own[stop])))
    torch.testing.assert_close(losses["retrieval"], torch.stack(first).mean())
    if name == "full":
        name = "ranker"  # which is what ranks, if there is one
    if name != "pure":
        torch.testing.assert_close(
            losses[{"ranker": "ranking"}.get(name, name)],
            torch.stack([torch.stack(moments).mean() for moments in second]).mean(),
        )


@pytest.mark.usefixtures("every_moment")
def test_the_ranker_trains_on_the_long_history() -> None:
    """A window may begin before what the Generator reads; the Ranker's moments lie in the whole of it."""
    model = build(replace(ROWS["ranker"], moments=8, negatives=N))
    batch = some_histories(13, 5).pad()
    before = model.losses(batch)
    older = batch.items.clone()
    older[0, 2] = next(item for item in range(N) if item not in older[0])
    after = model.losses(batch._replace(items=older))
    assert torch.equal(before["retrieval"], after["retrieval"])
    assert not torch.equal(before["ranking"], after["ranking"])


@pytest.mark.usefixtures("every_moment")
def test_weights_scale_their_losses() -> None:
    model = build(replace(CONFIG, moments=8, negatives=N))
    batch = some_histories(9, 5).pad()
    before = model.losses(batch)
    model.config = replace(model.config, auxiliary_weight=0.5, ranking_weight=3.0)
    after = model.losses(batch)
    torch.testing.assert_close(after["auxiliary"], 0.5 * before["auxiliary"])
    torch.testing.assert_close(after["ranking"], 3.0 * before["ranking"])


@pytest.mark.parametrize("name", ROWS)
def test_every_parameter_learns(name: str) -> None:
    model = build(ROWS[name])
    model.objective(model.losses(some_histories(16, 12, 2).pad())).backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.isfinite().all(), key
        if key == "ranker.out.bias":  # the same for all candidates, and InfoNCE compares them
            torch.testing.assert_close(parameter.grad, torch.zeros_like(parameter))
        else:
            assert parameter.grad.any(), key


def test_it_learns() -> None:
    """Each user's items are consecutive numbers, so the next item follows from the history."""
    walks = (torch.arange(40).unsqueeze(1) * 7 + torch.arange(12)) % N
    histories = Histories.from_lists(walks.tolist())
    model = GRank(N, replace(CONFIG, dropout=0.0, ranker_dropout=0.0))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for epoch in range(30):
        for windows in TrainingWindows(histories, targets=8, context=5, batch_items=200, epoch=epoch):
            optimizer.zero_grad()
            model.objective(model.losses(windows)).backward()
            optimizer.step()
    model.eval()
    batch = histories.pad()
    with torch.no_grad():
        users = model.user_vectors(batch)
        top = mips_topk(users, model.item_vectors(), 10, exclude=(histories.offsets, histories.items))
        ranked = top.indices.gather(1, model.rank(batch, users, top.indices, top.values).argsort(1, descending=True))
    wanted = (walks[:, -1] + 1) % N
    assert (top.indices[:, 0] == wanted).float().mean() > 0.9
    assert (ranked[:, 0] == wanted).float().mean() > 0.9
