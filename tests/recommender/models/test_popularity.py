"""Popularity of items: counted in training, part of the weights, and the answer for users without a history."""

import pytest
import torch
from torch import Tensor

from grank_kernels.mips_topk import TopK, mips_topk
from grank_kernels.recommender.data import Cases, Histories
from grank_kernels.recommender.models import Recommender
from grank_kernels.recommender.models.registry import MODELS, build_model, model_settings
from grank_kernels.recommender.training.evaluation import recommend

pytestmark = pytest.mark.usefixtures("one_thread")

N = 12
TRAIN = Histories.from_lists([[5, 3, 7], [3, 7], [7], [], [0, 3, 11]])
POPULAR = [3, 7, 0, 5, 11]  # by number of rows, equal ones by item number
EMPTY = Histories.from_lists([[1, 2], [], [4]])


def trained(name: str, backbone: str = "") -> Recommender:
    torch.manual_seed(0)
    values = {"dim": 8} | ({"backbone": backbone} if backbone else {})
    model = build_model(name, N, model_settings(name, values)).eval()
    model.observe(TRAIN)
    return model


def search(model: Recommender, k: int) -> TopK:
    users: Tensor = model.user_vectors(EMPTY.pad(model.history))
    return mips_topk(users, model.item_vectors(), k, exclude=(EMPTY.offsets, EMPTY.items))


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_counts_are_part_of_the_weights(name: str) -> None:
    model = trained(name)
    assert model.popularity is not None
    assert model.popularity.tolist() == torch.bincount(TRAIN.items, minlength=N).tolist()
    other = build_model(name, N, model_settings(name, {"dim": 8}))
    other.load_state_dict(model.state_dict())
    assert other.popularity is not None
    assert torch.equal(other.popularity, model.popularity)


@pytest.mark.parametrize("name", MODELS)
def test_weights_saved_without_counts_still_load(name: str) -> None:
    model = trained(name)
    state = model.state_dict()
    del state["popularity"]
    other = build_model(name, N, model_settings(name, {"dim": 8}))
    other.load_state_dict(state)
    assert other.popularity is not None
    assert not other.popularity.any()
    assert "popularity" not in state


@pytest.mark.parametrize(
    ("name", "backbone"),
    [("sequential", "transformer"), ("sequential", "hstu"), ("sequential", "llama"), ("unigrf", "hstu")],
)
@pytest.mark.parametrize("k", [5, 2 * N])
@torch.no_grad()
def test_a_user_without_a_history_gets_the_most_popular_items(name: str, backbone: str, k: int) -> None:
    model = trained(name, backbone)
    found = search(model, k)
    replaced, popular = model.with_fallback(found, EMPTY.lengths)
    assert popular.tolist() == [False, True, False]
    assert replaced.indices[1, :5].tolist() == POPULAR
    assert replaced.values[1, :5].tolist() == [3, 3, 1, 1, 1]
    assert (replaced.indices[1, N:] == -1).all()
    for row in (0, 2):
        assert torch.equal(replaced.values[row], found.values[row])
        assert torch.equal(replaced.indices[row], found.indices[row])


@torch.no_grad()
def test_the_most_popular_items_obey_the_filters() -> None:
    model = trained("sequential")
    allow = torch.arange(N) != 7
    exclude = torch.tensor([[-1], [3], [-1]])
    found = model.with_fallback(search(model, 4), EMPTY.lengths, exclude=exclude, allow=allow)[0]
    assert found.indices[1].tolist() == [0, 5, 11, 1]


@pytest.mark.parametrize("name", ["sequential", "unigrf"])
def test_an_evaluation_recommends_the_most_popular_items_too(name: str) -> None:
    cases = Cases(torch.arange(3), EMPTY, Histories.from_lists([[0], [7], [3]]))
    found = recommend(trained(name), cases, 5)
    assert found.retrieved[1].tolist() == POPULAR
    assert found.ranked is None or found.ranked[1].tolist() == POPULAR
    assert (found.ranked is not None) == (name == "unigrf")


@pytest.mark.parametrize("name", ["dual_tower", "grank"])
@torch.no_grad()
def test_models_with_an_answer_of_their_own_keep_it(name: str) -> None:
    model = trained(name)
    assert model.user_vectors(EMPTY.pad(model.history))[1].any()
    found = search(model, 5)
    kept, popular = model.with_fallback(found, EMPTY.lengths)
    assert kept is found
    assert not popular.any()
