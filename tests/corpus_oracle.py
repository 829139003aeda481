"""The loss over the whole corpus in float64, and calls of the package with its gradients."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.nn import functional as F

import grank_kernels as gk

Results = list[torch.Tensor]  # loss, and the gradients of users, items and, where there is one, bias


@dataclass(frozen=True)
class Loss:
    """Arguments of `corpus_cross_entropy`, and the ids that each row excludes."""

    users: torch.Tensor
    items: torch.Tensor
    targets: torch.Tensor
    exclude: Any = None
    bias: torch.Tensor | None = None
    scale: float = 1.0

    def but(self, **changes: Any) -> "Loss":
        return replace(self, **changes)

    def excluded(self, r: int) -> list[int]:
        if self.exclude is None:
            return []
        if isinstance(self.exclude, torch.Tensor):
            found = self.exclude[r]
        else:
            offsets, ids, *windows = self.exclude
            w = int(windows[0][r]) if windows else r
            found = ids[int(offsets[w]) : int(offsets[w + 1])]
        return [i for i in found.tolist() if i >= 0]

    def barred(self) -> torch.Tensor:
        """(R, N) bool: what the softmax leaves out."""
        mask = torch.zeros(len(self.users), len(self.items), dtype=torch.bool)
        for r, target in enumerate(self.targets.tolist()):
            mask[r, [i for i in self.excluded(r) if i != target]] = True
        return mask

    def grad_loss(self) -> torch.Tensor:
        return torch.linspace(0.5, 1.5, len(self.users))

    def call(self, backend: str | None) -> Results:
        return self._with_gradients(
            lambda users, items, bias: gk.corpus_cross_entropy(
                users, items, self.targets, exclude=self.exclude, bias=bias, scale=self.scale, backend=backend
            )
        )

    def plain(self, dtype: torch.dtype | None = None) -> Results:
        """With the (R, N) matrix: torch in users' dtype, or in another."""

        def loss(users: torch.Tensor, items: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
            product = (
                self.scale
                * (users if dtype is None else users.to(dtype))
                @ (items if dtype is None else items.to(dtype)).T
            )
            logits = product.to(dtype or torch.float32)
            logits = logits if bias is None else logits + bias.to(logits.dtype)
            left = logits.masked_fill(self.barred(), -torch.inf)
            return F.cross_entropy(left, self.targets, reduction="none", ignore_index=-1)

        return self._with_gradients(loss)

    def exact(self) -> Results:
        """In float64."""
        wide = self.but(
            users=self.users.double(), items=self.items.double(), bias=None if self.bias is None else self.bias.double()
        )
        return wide.plain(torch.float64)

    def _with_gradients(self, function: Any) -> Results:
        leaves = [None if x is None else x.detach().requires_grad_() for x in (self.users, self.items, self.bias)]
        loss = function(*leaves)
        learnt = [x for x in leaves if x is not None]
        return [loss.detach(), *torch.autograd.grad(loss, learnt, self.grad_loss().to(loss.dtype))]


def loss_problem(
    R: int,
    N: int,
    d: int,
    *,
    form: str = "padded",
    dtype: torch.dtype = torch.float32,
    bias: bool = True,
    scale: float = 0.7,
    seed: int = 0,
) -> Loss:
    """Random operands; every fifth row has no target, some targets are excluded, too."""
    g = torch.Generator().manual_seed(seed)
    users, items = torch.randn(R, d, generator=g).to(dtype), torch.randn(N, d, generator=g).to(dtype)
    targets = torch.randint(N, (R,), generator=g)
    lists = torch.randint(-1, N, (R, 9), generator=g)
    lists[::3, 0] = targets[::3]
    targets[4::5] = -1
    exclude: Any = {"padded": lists, "none": None}.get(form)
    if form == "pair":
        exclude = (torch.arange(R + 1) * 9, lists.flatten())
    elif form == "windows":
        W = min(max(R // 4, 1), R)
        windows = torch.randint(max(W, 1), (R,), generator=g)
        exclude = (torch.arange(W + 1) * 9, lists[:W].flatten(), windows)
    return Loss(users, items, targets, exclude, torch.randn(N, generator=g) if bias else None, scale)


def check_loss(problem: Loss, backend: str, slack: float = 2e-6) -> Results:
    """That no error against float64 is more than twice torch's own in that dtype."""
    got = problem.call(backend)
    for i, (ours, torchs, exact) in enumerate(zip(got, problem.plain(), problem.exact(), strict=True)):
        assert ours.shape == exact.shape
        error, allowed = ((x.double() - exact).abs().amax() if x.numel() else torch.zeros(()) for x in (ours, torchs))
        size = exact.abs().amax() if exact.numel() else 0.0
        assert error <= 2 * allowed + slack * (1 + size), f"result {i}: {error:.2e}, torch {allowed:.2e}"
    return got
