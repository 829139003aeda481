"""Losses over the whole corpus, without the matrix of logits."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

_CHUNK = 128 * 4096
"""Logits of a chunk: 2 MiB of float32, so that every pass over them but the first finds them in the L2 cache."""


class _SoftmaxLoss(torch.autograd.Function):
    """Mean cross-entropy of `users @ items.T`; the gradient is made with the loss, chunk by chunk."""

    @staticmethod
    def forward(ctx: Any, users: Tensor, items: Tensor, targets: Tensor, seen: Tensor | None) -> Tensor:
        n, N = len(users), len(items)
        wide = N + 1 if seen is not None else N  # the last column takes what is no item
        user_grad = torch.empty_like(users)
        item_grad = torch.zeros_like(items)
        total = users.new_zeros((), dtype=torch.float64)
        step = max(1, _CHUNK // wide)
        buffer = users.new_empty(min(step, n), wide)
        for begin in range(0, n, step):
            rows = slice(begin, min(begin + step, n))
            logits = buffer[: rows.stop - begin]
            scores = logits[:, :N]
            torch.mm(users[rows], items.T, out=scores)
            target = targets[rows, None]
            at_target = scores.gather(1, target)
            if seen is not None:
                logits[:, N] = float("-inf")
                logits.scatter_(1, seen[rows], float("-inf"))
                scores.scatter_(1, target, at_target)  # an item that comes again may be seen and wanted
            top = scores.amax(1, keepdim=True)
            scores.sub_(top).exp_()
            mass = scores.sum(1, keepdim=True)
            total += (mass.log() + top - at_target).sum(dtype=torch.float64)
            scores.div_(mass * n)
            scores.scatter_add_(1, target, scores.new_full((1, 1), -1 / n).expand_as(target))
            torch.mm(scores, items, out=user_grad[rows])
            item_grad.addmm_(scores.T, users[rows])
        ctx.save_for_backward(user_grad, item_grad)
        return (total / n).to(users.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        user_grad, item_grad = ctx.saved_tensors
        return user_grad * grad, item_grad * grad, None, None


def softmax_loss(users: Tensor, items: Tensor, targets: Tensor, seen: Tensor | None = None) -> Tensor:
    return _SoftmaxLoss.apply(users, items, targets, seen)
