"""The dual tower: which inputs its vectors depend on, and that it learns."""

from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from grank_kernels.recommender.data import Batch, Histories, TrainingWindows
from grank_kernels.recommender.models import DualTower, DualTowerConfig

N = 30
CONFIG = DualTowerConfig(dim=8, hidden=16, history=6)

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def model() -> DualTower:
    return DualTower(N, CONFIG).double().eval()


def test_user_vectors(model: DualTower) -> None:
    batch = Histories.from_lists([[1, 2, 3, 4, 5, 6, 7, 8], [4, 9], []], [8 * [True], [False, True], []]).pad()
    users = model.user_vectors(batch)
    torch.testing.assert_close(users.norm(dim=1), torch.full((3,), 20.0).double())
    torch.testing.assert_close(model.item_vectors().norm(dim=1), torch.ones(N).double())
    torch.testing.assert_close(model.user_vectors(batch.newest(6)), users)
    alone = Batch(batch.items[1:2, :2], batch.feedback[1:2, :2])
    torch.testing.assert_close(model.user_vectors(alone), users[1:2])
    turned = Batch(alone.items.flip(1), alone.feedback.flip(1))
    assert not torch.allclose(model.user_vectors(turned), users[1:2])  # another item is the newest
    liked = alone._replace(feedback=torch.ones_like(alone.feedback))
    assert not torch.allclose(model.user_vectors(liked), users[1:2])


def test_training_asks_what_serving_answers(model: DualTower) -> None:
    histories = Histories.from_lists([[1, 2, 3, 4, 5], [9, 8], [7, 9, 11, 13]])
    found = []
    for own in ([1, 2, 3, 4, 5], [9, 8], [7, 9, 11, 13]):
        for stop in range(1, len(own)):
            past = Histories.from_lists([own[:stop]]).pad()
            logits = (model.user_vectors(past) @ model.item_vectors().T)[0].clone()
            logits[own[:stop]] = -torch.inf
            found.append(F.cross_entropy(logits, torch.tensor(own[stop])))
    torch.testing.assert_close(model.losses(histories.pad())["retrieval"], torch.stack(found).mean())


def test_it_learns() -> None:
    """Users with even numbers meet even items only, users with odd numbers odd ones."""
    lists = [[int(item) * 2 + user % 2 for item in torch.randperm(N // 2)[:8]] for user in range(60)]
    histories = Histories.from_lists(lists)
    model = DualTower(N, replace(CONFIG, dropout=0.0))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for epoch in range(20):
        for windows in TrainingWindows(histories, targets=6, batch_items=200, epoch=epoch):
            optimizer.zero_grad()
            model.losses(windows)["retrieval"].backward()
            optimizer.step()
    with torch.no_grad():
        best = (model.eval().user_vectors(histories.pad()) @ model.item_vectors().T).topk(5).indices
    assert (best % 2 == torch.arange(60).unsqueeze(1) % 2).float().mean() > 0.95
