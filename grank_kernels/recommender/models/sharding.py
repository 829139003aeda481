"""Embedding tables larger than one device's memory: each rank trains a part of the rows.

The table is a `DTensor` sharded by rows, so AdamW, gradient clipping and checkpoints are PyTorch's own; FSDP2 shards
the other weights. PyTorch has no suitable lookup: its row-wise embedding (`RowwiseParallel`) makes a gradient of the
whole table on every rank, and FSDP2 would gather the whole table. TorchRec has one, but each release needs one version
of PyTorch and NVIDIA GPUs. So a lookup here fetches rows from the ranks that hold them by two all-to-alls, and its
gradient takes the same way back.
"""

import sys
from typing import TYPE_CHECKING, TypeGuard

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor

    from grank_kernels.recommender.models.embedding_model import EmbeddingModel


def is_sharded(x: Tensor) -> "TypeGuard[DTensor]":
    """Whether a tensor is a DTensor. Before its module is imported, which takes 2 s, there is none."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(x, module.DTensor)


def shard(model: "EmbeddingModel", mesh: "DeviceMesh") -> None:
    """Shard a model's weights among the ranks of a one-dimensional mesh; collective.

    Afterwards the model's methods are collective: every rank calls them in the same order, each with its own batch.
    Gradients are means over the ranks, as in data-parallel training.
    """
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
    from torch.distributed.tensor import Shard, distribute_tensor

    ranks = mesh.size()
    model.items = nn.Parameter(distribute_tensor(model.items.detach(), mesh, [Shard(0)]))
    model.items.register_hook(lambda gradient: gradient / ranks)  # type: ignore[no-untyped-call]
    model.group = mesh.get_group()
    fully_shard(model, mesh=mesh, ignored_params={model.items})
    for method in ("losses", "user_vectors", "searchable", "rank"):
        register_fsdp_forward_method(model, method)


def lookup(table: Tensor, ids: Tensor) -> Tensor:
    """Rows (..., d) of a table (N, d), sharded or not, for ids (...) in [0, N); differentiable."""
    if not is_sharded(table):
        return F.embedding(ids, table)
    from torch.distributed._functional_collectives import all_to_all_single_autograd

    group, rank = table.device_mesh.get_group(), table.device_mesh.get_local_rank()
    ranks = dist.get_world_size(group)
    step = -(-table.shape[0] // ranks)  # rows of a rank; the last ranks may have fewer
    wanted, places = torch.unique(ids, return_inverse=True)
    asked = torch.bincount(wanted // step, minlength=ranks)
    answered = torch.empty_like(asked)
    dist.all_to_all_single(answered, asked, group=group)
    to_ask, to_answer = asked.tolist(), answered.tolist()
    numbers = wanted.new_empty(sum(to_answer))
    dist.all_to_all_single(numbers, wanted, to_answer, to_ask, group=group)
    own = F.embedding(numbers - rank * step, table.to_local())
    return F.embedding(places, all_to_all_single_autograd(own, to_ask, to_answer, group))
