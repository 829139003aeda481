import pytest
import torch
from torch.nn import functional as F

from grank_kernels.recommender.data import Batch, Histories
from grank_kernels.recommender.models import Sequential, SequentialConfig, UniGRF, UniGRFConfig
from grank_kernels.recommender.models.blocks import KVCache
from grank_kernels.recommender.models.unigrf import _Weighter

pytestmark = pytest.mark.usefixtures("one_thread")

N = 40
BACKBONES = ("hstu", "llama")


def model(backbone: str, **settings: object) -> UniGRF:
    torch.manual_seed(0)
    made = UniGRF(N, UniGRFConfig(backbone=backbone, dim=16, history=8, **settings)).eval()  # type: ignore[arg-type]
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return made


@pytest.fixture
def batch() -> Batch:
    items = [torch.randperm(N)[:length].tolist() for length in (9, 5, 2, 9)]
    return Histories.from_lists(items, [[item % 3 > 0 for item in own] for own in items]).pad()


@pytest.mark.parametrize("backbone", BACKBONES)
def test_ranking_a_candidate_is_reading_it_as_the_next_item(backbone: str, batch: Batch) -> None:
    unigrf = model(backbone)
    histories = Histories.from_lists([[1, 2, 3], [4], []], [[True, False, True], [True], []])
    candidates = torch.tensor([[5, 6, -1], [7, 8, 9], [10, 11, 12]])
    got = unigrf.rank(histories.pad(), torch.empty(3, 16), candidates, torch.empty(3, 3))
    assert got[0, 2] == -torch.inf
    for row, own in enumerate([[1, 2, 3], [4], []]):
        for column in range(3):
            candidate = int(candidates[row, column])
            if candidate < 0:
                continue
            feedback = histories.feedback[histories.offsets[row] : histories.offsets[row + 1]].tolist()
            longer = Histories.from_lists([[*own, candidate]], [[*feedback, False]]).pad()
            at_item = unigrf._read(longer)[0][:, ::2][0, len(own)]
            torch.testing.assert_close(got[row, column], unigrf.score(at_item)[0])


@pytest.mark.parametrize("backbone", BACKBONES)
def test_feedback_changes_the_query_and_later_scores(backbone: str) -> None:
    unigrf = model(backbone)
    liked = Histories.from_lists([[1, 2, 3]], [[True, True, True]]).pad()
    disliked = Histories.from_lists([[1, 2, 3]], [[True, True, False]]).pad()
    assert not torch.allclose(unigrf.user_vectors(liked), unigrf.user_vectors(disliked))
    candidates, logits = torch.tensor([[9]]), torch.zeros(1, 1)
    users = torch.empty(1, 16)
    assert not torch.allclose(
        unigrf.rank(liked, users, candidates, logits), unigrf.rank(disliked, users, candidates, logits)
    )


@pytest.mark.parametrize("backbone", BACKBONES)
def test_losses_are_of_the_next_item_and_of_the_feedback(backbone: str, batch: Batch) -> None:
    unigrf = model(backbone, enhancer=False, ranking_weight=0.25)
    losses = unigrf.losses(batch)
    outputs, _ = unigrf._read(batch)
    ranking, retrieval = [], []
    vectors = unigrf.item_vectors()
    for row, length in enumerate(batch.lengths.tolist()):
        for t in range(length):
            logit = unigrf.score(outputs[row, 2 * t])[0]
            ranking.append(F.binary_cross_entropy_with_logits(logit, batch.feedback[row, t].float()))
            if t + 1 < length:
                logits = vectors @ unigrf._queries(outputs[row, 2 * t + 1])
                logits[batch.items[row, : t + 1]] = -torch.inf
                retrieval.append(F.cross_entropy(logits, batch.items[row, t + 1]))
    torch.testing.assert_close(losses["ranking"], 0.25 * torch.stack(ranking).mean())
    torch.testing.assert_close(losses["retrieval"], torch.stack(retrieval).mean())


@pytest.mark.parametrize("backbone", BACKBONES)
def test_the_enhancer_trains_retrieval_alone_by_what_ranking_thinks(backbone: str, batch: Batch) -> None:
    unigrf = model(backbone, enhancer_after=1, dropout=0.0).train()
    assert set(unigrf.losses(batch)) == {"retrieval", "ranking"}  # not yet
    enhanced = unigrf.losses(batch)["enhanced"]
    assert unigrf.training
    enhanced.backward()
    assert unigrf.items.grad is not None
    assert unigrf.items.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in unigrf.score.parameters())


def test_the_enhancer_by_hand() -> None:
    """Of the best two candidates of retrieval, ranking is sure of one and dislikes the other."""
    settings = {"enhancer_pool": 2, "hard_negatives": 1, "hard_weight": 3.0, "enhancer_moments": 3}
    unigrf = model("llama", favourite=0.9, favourite_weight=0.25, **settings)
    batch = Histories.from_lists([[0, 1]]).pad()
    vectors = unigrf.item_vectors()
    outputs, caches = unigrf._read(batch)
    queries = unigrf._queries(outputs[:, 1:-1:2])
    logits = vectors @ queries[0, 0]
    disliked, loved = logits.index_fill(0, torch.tensor([0, 1]), -torch.inf).topk(2).indices.tolist()

    def judged(candidates: torch.Tensor, visible: torch.Tensor, caches: list[KVCache]) -> torch.Tensor:
        assert (visible == 2).all()  # behind the first item and its feedback
        return torch.where(candidates == loved, 5.0, -5.0)

    unigrf._feedback_logits = judged  # type: ignore[method-assign]
    mass = logits[1:].exp()  # the first has been seen
    mass[disliked - 1] *= 3
    expected = mass.sum().log() - 0.75 * logits[1] - 0.25 * logits[loved]
    torch.testing.assert_close(unigrf._enhanced(batch, queries, unigrf.corpus(batch.items), caches), expected)


@pytest.mark.parametrize("length", [N - 1, N])
def test_the_enhancer_where_the_corpus_runs_out(length: int) -> None:
    unigrf = model("llama", enhancer_after=0).train()
    batch = Histories.from_lists([torch.randperm(N)[:length].tolist() for _ in range(20)]).pad()
    enhanced = unigrf.losses(batch)["enhanced"]
    enhanced.backward()
    assert enhanced.isfinite()
    assert unigrf.items.grad is not None
    assert unigrf.items.grad.isfinite().all()


def test_the_weighter_favours_the_slower_task() -> None:
    weighter = _Weighter(2, 2, 1.0).train()
    for losses in ([4.0, 1.0], [4.0, 1.0], [2.0, 1.0], [2.0, 1.0]):
        own = torch.tensor(losses, requires_grad=True)
        total = weighter(own, own.detach())
        assert total.item() == pytest.approx((weighter.weights * torch.tensor(losses)).sum().item())
    assert weighter.weights.tolist() == pytest.approx((2 * torch.tensor([0.5, 1.0]).softmax(0)).tolist())
    assert not weighter.weights.requires_grad
    kept = _Weighter(2, 2, 1.0)
    kept.load_state_dict(weighter.state_dict())
    assert torch.equal(kept.weights, weighter.weights)
    weighter.eval()
    weighter(torch.tensor([100.0, 1.0]), torch.tensor([100.0, 1.0]))
    assert torch.equal(kept.total, weighter.total)  # validation is not observed


def test_switches_of_the_ablation(batch: Batch) -> None:
    assert set(model("hstu", retrieval=False, enhancer=False).losses(batch)) == {"ranking"}
    only = model("hstu", ranking=False, enhancer=False)
    assert set(only.losses(batch)) == {"retrieval"}
    assert not only.ranks
    plain = model("hstu", weighter=False, enhancer=False)
    losses = plain.losses(batch)
    torch.testing.assert_close(plain.objective(losses), losses["retrieval"] + losses["ranking"])
    with pytest.raises(ValueError, match="enhancer needs both retrieval and ranking"):
        model("hstu", ranking=False)
    with pytest.raises(ValueError, match="retrieval or ranking must be True"):
        model("hstu", ranking=False, retrieval=False, enhancer=False)


@pytest.mark.parametrize("backbone", ["transformer", "hstu", "llama"])
def test_sequential_reads_the_newest_item_and_ignores_padding(backbone: str) -> None:
    torch.manual_seed(0)
    sequential = Sequential(N, SequentialConfig(backbone=backbone, dim=16, history=8)).eval()
    histories = Histories.from_lists([[1, 2, 3], [4, 5, 6, 7, 8], []])
    together = sequential.user_vectors(histories.pad())
    for row in range(3):
        alone = sequential.user_vectors(histories.select(torch.tensor([row])).pad())
        torch.testing.assert_close(together[row], alone[0])
    assert not together[2].any()
    norms = together[:2].norm(dim=1) * sequential.config.temperature
    torch.testing.assert_close(norms, torch.ones(2))
    torch.testing.assert_close(sequential.item_vectors().norm(dim=1), torch.ones(N))
