"""What `test_joint_training.py` starts on every rank: steps of several ranks, compared with their joint batch's."""

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from launches import Case, run_cases
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from grank_kernels import mips_topk
from grank_kernels.recommender.data import Batch, Histories
from grank_kernels.recommender.models import (
    DualTower,
    DualTowerConfig,
    GRank,
    GRankConfig,
    Sequential,
    SequentialConfig,
    UniGRF,
    UniGRFConfig,
)
from grank_kernels.recommender.models.corpus import all_gather_ragged
from grank_kernels.recommender.models.embedding_model import EmbeddingModel
from grank_kernels.recommender.models.sharding import lookup, shard

N = 41
CASES: dict[str, Case] = {}
MODELS: dict[str, Callable[[str], EmbeddingModel]] = {
    "sequential": lambda softmax: Sequential(
        N, SequentialConfig("hstu", dim=8, history=12, dropout=0.0, softmax=softmax)
    ),
    "dual_tower": lambda softmax: DualTower(N, DualTowerConfig(dim=8, hidden=16, dropout=0.0, softmax=softmax)),
    "unigrf": lambda softmax: UniGRF(
        N,
        UniGRFConfig(
            "llama",
            dim=8,
            history=12,
            dropout=0.0,
            softmax=softmax,
            enhancer_after=0,
            enhancer_pool=6,
            hard_negatives=2,
            favourite=0.5,
            weighter_interval=2,
        ),
    ),
    "grank": lambda softmax: GRank(
        N,
        GRankConfig(
            dim=8,
            short_history=6,
            long_history=12,
            hidden=8,
            dropout=0.0,
            ranker_dropout=0.0,
            softmax=softmax,
            negatives=5,
        ),
    ),
}


def model(name: str, softmax: str) -> EmbeddingModel:
    made = MODELS[name](softmax).double().train()
    for parameter in made.parameters():  # some start at 0, and what is behind them would not learn
        torch.nn.init.normal_(parameter, std=0.3)
    made.observe(Histories.from_lists([torch.randint(N, (500,)).tolist()]))
    return made


def batches(world: int) -> list[Batch]:
    """One for each rank, of different sizes: as many users on each, since moments are drawn by user."""
    lengths = torch.randint(2, 13, (world, 4)).tolist()
    lengths[0] = [3] * 4
    lists = [[torch.randint(N, (length,)).tolist() for length in of_rank] for of_rank in lengths]
    return [Histories.from_lists(rows, [[item % 3 > 0 for item in row] for row in rows]).pad() for rows in lists]


def joined(parts: list[Batch]) -> Batch:
    width = max(part.items.shape[1] for part in parts)
    items = [torch.nn.functional.pad(part.items, (0, width - part.items.shape[1]), value=-1) for part in parts]
    liked = [torch.nn.functional.pad(part.feedback, (0, width - part.feedback.shape[1])) for part in parts]
    return Batch(torch.cat(items), torch.cat(liked))


def drawn_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is random in a loss is the same for a user in either batch."""
    monkeypatch.setattr(torch, "rand", lambda *shape, device=None: torch.empty(*shape).fill_(0.5))
    monkeypatch.setattr(torch, "rand_like", partial(torch.full_like, fill_value=0.5))


def step(each: EmbeddingModel, batch: Batch) -> Tensor:
    objective = each.objective(each.losses(batch))
    objective.backward()  # type: ignore[no-untyped-call]
    return objective.detach()


def whole(gradient: Tensor | None) -> Tensor:
    assert gradient is not None
    return gradient.full_tensor() if isinstance(gradient, DTensor) else gradient


def learns_as_one(name: str, softmax: str, sharded: bool, rank: int, world: int, folder: Path) -> None:
    torch.manual_seed(5)
    one = model(name, softmax)
    several = copy.deepcopy(one)
    if sharded:
        shard(several, init_device_mesh("cpu", (world,)))
        local = several.items
        assert isinstance(local, DTensor)
        assert len(local.to_local()) <= -(-N // world)
    else:
        several.group = dist.group.WORLD
    with pytest.MonkeyPatch.context() as monkeypatch:
        drawn_alike(monkeypatch)
        for _ in range(5):  # the weighter looks at two times two
            parts = batches(world)
            expected, got = step(one, joined(parts)), step(several, parts[rank])
            dist.all_reduce(got)
            torch.testing.assert_close(got / world, expected)
    for (parameter_name, a), b in zip(one.named_parameters(), several.parameters(), strict=True):
        gradient = whole(b.grad)
        if not sharded:  # as DistributedDataParallel does
            dist.all_reduce(gradient)
            gradient /= world
        torch.testing.assert_close(gradient, a.grad, msg=lambda text, of=parameter_name: f"{of}: {text}")  # type: ignore[misc]


def serves_as_one(name: str, rank: int, world: int, folder: Path) -> None:
    """Vectors, search and second stage of a model that is split."""
    torch.manual_seed(5)
    one = model(name, "batch").float().eval()
    several = copy.deepcopy(one)
    shard(several, init_device_mesh("cpu", (world,)))
    batch = batches(world)[rank]
    with torch.no_grad():
        users = several.user_vectors(batch)
        torch.testing.assert_close(users, one.user_vectors(batch))
        torch.testing.assert_close(several.item_vectors(), one.item_vectors())
        found = mips_topk(users, several.searchable(), 7)
        expected = mips_topk(users, one.item_vectors(), 7)
        torch.testing.assert_close(found.values, expected.values)
        scores = several.rank(batch, users, found.indices, found.values)
        torch.testing.assert_close(scores, one.rank(batch, users, found.indices, found.values))


for _name in MODELS:
    for _softmax in ("corpus", "batch"):
        CASES[f"{_name}_{_softmax}"] = partial(learns_as_one, _name, _softmax, False)
    CASES[f"{_name}_sharded"] = partial(learns_as_one, _name, "batch", True)
    CASES[f"{_name}_serves"] = partial(serves_as_one, _name)


def looks_up_rows_of_all_ranks(rank: int, world: int, folder: Path) -> None:
    mesh = init_device_mesh("cpu", (world,))
    for rows in (1, world, 4 * world + 1):  # some ranks have none
        table = torch.randn(rows, 3, dtype=torch.float64)
        split = distribute_tensor(table, mesh, [Shard(0)]).requires_grad_()
        of_ranks = [torch.randint(rows, (2, 5 * r)) for r in range(world)]  # rank 0 asks for none
        found = lookup(split, of_ranks[rank])
        assert torch.equal(found, table[of_ranks[rank]])
        weight = torch.arange(found.numel()).view(found.shape)
        (found * weight).sum().backward()  # type: ignore[no-untyped-call]
        expected = torch.zeros_like(table)
        for ids in of_ranks:
            weight = torch.arange(ids.numel() * 3).view(-1, 3).double()
            expected.index_add_(0, ids.flatten(), weight)
        assert torch.equal(whole(split.grad), expected)
        assert len(split.grad.to_local()) == len(split.to_local())  # type: ignore[union-attr]


def gathers_lists_of_different_lengths(rank: int, world: int, folder: Path) -> None:
    lists = [torch.arange(3 * r, 5 * r) for r in range(world)]
    assert torch.equal(all_gather_ragged(lists[rank], dist.group.WORLD), torch.cat(lists))


CASES |= {run.__name__: run for run in (looks_up_rows_of_all_ranks, gathers_lists_of_different_lengths)}

if __name__ == "__main__":
    run_cases(CASES)
