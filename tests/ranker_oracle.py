"""score_candidates and candidate_cross_attention in plain torch, user by user, in any dtype.

float64 gives the reference result, the dtype of the inputs gives the error of plain torch. A problem holds its inputs,
calls the package on a backend's device, and returns the result on the CPU.
"""

import math
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch.nn import functional as F

import grank_kernels as gk
from grank_kernels.backends import BACKENDS

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
FLOATING = (
    "keys",
    "values",
    "user_hidden",
    "item_weight",
    "out_weight",
)  # of score_candidates; all of one dtype
HEAD = {"relu": F.relu, "silu": F.silu, "gelu": F.gelu}


def backends_of(op: str) -> list[Any]:
    """Backends of an op as parameters, with a reason to skip if one cannot run on this machine.

    Without "cuda", which takes float16 and bfloat16 only: test_<op>_cuda.py runs the same tests on it.
    """
    found = []
    for name, module in BACKENDS.items():
        if hasattr(module, op) and name != "cuda":
            reason = module.unavailable()
            found.append(pytest.param(name, marks=pytest.mark.skipif(reason is not None, reason=str(reason))))
    return found


def device_of(backend: str) -> str:
    return "cuda" if backend == "cuda" else "cpu"


def on(backend: str, x: Any) -> Any:
    """A tensor or a table on the backend's device; other values unchanged."""
    return x.to(device_of(backend)) if isinstance(x, (torch.Tensor, gk.ItemTable)) else x


def offsets_of(lengths: list[int]) -> torch.Tensor:
    return torch.tensor([0, *lengths]).cumsum(0)


def largest(x: torch.Tensor) -> float:
    return float(x.detach().abs().max()) if x.numel() > 0 else 0.0


def allowed(plain: torch.Tensor, exact: torch.Tensor, dtype: torch.dtype, size: torch.Tensor) -> float:
    """Tolerance: twice the error of plain torch in the dtype, and one rounding of the largest sum of |terms|.

    The second part because torch's error may be near 0 by chance if there are few results.
    """
    return 2 * largest(plain.double() - exact) + torch.finfo(dtype).eps * largest(size)


# ---- score_candidates ----


@dataclass
class Scoring:
    candidate_ids: torch.Tensor
    items: "torch.Tensor | gk.ItemTable"
    keys: torch.Tensor
    values: torch.Tensor
    cu_seqlens: torch.Tensor
    user_hidden: torch.Tensor
    item_weight: torch.Tensor
    out_weight: torch.Tensor
    out_bias: float = 0.25
    softmax_scale: float | None = None
    activation: str = "relu"

    def scores(self, backend: str | None) -> torch.Tensor:
        given = {name: on(backend or "cpu", x) for name, x in vars(self).items()}
        return gk.score_candidates(**given, backend=backend).cpu()

    def rows(self) -> torch.Tensor:
        """Rows of the table; int8 rows times their scale."""
        return self.items if isinstance(self.items, torch.Tensor) else self.items.rows(torch.arange(len(self.items)))

    def scale(self) -> float:
        return self.rows().shape[1] ** -0.5 if self.softmax_scale is None else self.softmax_scale

    def formula(self, dtype: torch.dtype) -> torch.Tensor:
        """Scores (B, C), computed in a dtype."""
        rows = self.rows()
        scores = torch.full(self.candidate_ids.shape, -torch.inf, dtype=dtype)
        weight, out = self.item_weight.to(dtype), self.out_weight.to(dtype)
        for b, (start, stop) in enumerate(pairwise(self.cu_seqlens.tolist())):
            keys, values = self.keys[start:stop].to(dtype), self.values[start:stop].to(dtype)
            there = self.candidate_ids[b] >= 0
            e = rows[self.candidate_ids[b][there]].to(dtype)
            attended = torch.softmax(self.scale() * (e @ keys.T), 1) @ values
            hidden = attended + e @ weight + self.user_hidden[b].to(dtype)
            scores[b, there] = HEAD[self.activation](hidden) @ out + self.out_bias
        return scores

    def lse(self, bias: torch.Tensor | None, floor: float) -> torch.Tensor:
        """(B, C) in float64: the logarithm of exp(floor) plus the sum of the exponentials of the logits."""
        rows, found = self.rows().double(), []
        for ids, (start, stop) in zip(self.candidate_ids, pairwise(self.cu_seqlens.tolist()), strict=True):
            logits = self.scale() * (rows[ids.clamp(min=0)] @ self.keys[start:stop].double().T)
            logits = logits if bias is None else logits + bias[start:stop].double()
            found.append(F.pad(logits, (1, 0), value=floor).logsumexp(1))
        return torch.stack(found)

    def sizes(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(sum of |terms|, bound of the rounding error) of every score, (B, C) each.

        Sums are float32; table rows and softmax weights may be rounded to the dtype of the keys first. A sum of n
        products has an error of at most n roundings of the sum of their absolute values.
        """
        single, unit = 2.0**-24, torch.finfo(self.keys.dtype).eps / 2
        wide = self.but(items=self.rows().double(), **{name: vars(self)[name].double() for name in FLOATING})
        weight, out = wide.item_weight.abs(), wide.out_weight.abs()
        d, h = weight.shape
        size, bound = (torch.zeros(self.candidate_ids.shape, dtype=torch.float64) for _ in range(2))
        for b, (start, stop) in enumerate(pairwise(self.cu_seqlens.tolist())):
            there, L = self.candidate_ids[b] >= 0, stop - start
            e, keys, values = wide.items[self.candidate_ids[b][there]], wide.keys[start:stop], wide.values[start:stop]
            weights, sizes = (self.scale() * (e @ keys.T)).softmax(1), abs(self.scale()) * (e.abs() @ keys.abs().T)
            logit = (unit + (d + 4) * single) * F.pad(sizes, (1, 0)).amax(1, keepdim=True)
            attended, user = weights @ values.abs(), wide.user_hidden[b].abs()
            hidden = attended + e.abs() @ weight + user  # at least the |hidden layer|
            error = torch.expm1(2 * logit + unit + 2 * (L + 8) * single) * attended
            error = error + (unit + (d + 16) * single) * hidden  # 16 roundings for the activation
            steepest = 1.13  # largest slope of gelu
            size[b, there] = hidden @ out + abs(self.out_bias)
            bound[b, there] = steepest * error @ out + (h + 4) * single * size[b, there]
        return size, bound

    def but(self, **changes: Any) -> "Scoring":
        return replace(self, **changes)


def scoring(
    lengths: list[int],
    C: int = 30,
    d: int = 16,
    h: int = 16,
    N: int = 100,
    *,
    dtype: torch.dtype = torch.float32,
    table: torch.dtype | None = None,
    **more: Any,
) -> Scoring:
    """Random inputs of ordinary size; with many candidates a tenth of the ids is negative."""
    B, T = len(lengths), sum(lengths)
    rows, ids = torch.randn(N, d), torch.randint(0, N, (B, C))
    if C > 20:
        ids[torch.rand(B, C) < 0.1] = -1
    items = gk.ItemTable.from_rows(rows, dtype=table) if table == torch.int8 else rows.to(table or dtype)
    return Scoring(
        ids,
        items,
        torch.randn(T, d).to(dtype),
        torch.randn(T, h).to(dtype),
        offsets_of(lengths),
        torch.randn(B, h).to(dtype),
        (torch.randn(d, h) * d**-0.5).to(dtype),
        torch.randn(h).to(dtype),
        **more,
    )


# ---- candidate_cross_attention ----


@dataclass
class Attention:
    """The arguments of candidate_cross_attention, in any of their forms."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    cu_seqlens_q: torch.Tensor | None = None
    cu_seqlens_k: torch.Tensor | None = None
    seqused_k: torch.Tensor | None = None
    softmax_scale: float | None = None
    bias_k: torch.Tensor | None = None
    activation: str = "softmax"

    def attend(self, backend: str | None, **more: Any) -> Any:
        given = {name: on(backend or "cpu", x) for name, x in vars(self).items()}
        return gk.candidate_cross_attention(**given, **more, backend=backend)

    def leaves(self) -> list[torch.Tensor]:
        """Inputs with a gradient: q, k, v and, if given, bias_k."""
        return [x for x in (self.q, self.k, self.v, self.bias_k) if x is not None]

    def gradients(self, backend: str | None, grad_out: torch.Tensor) -> list[torch.Tensor]:
        problem = self.cast(None)
        out = problem.attend(backend)
        found = torch.autograd.grad(out, problem.leaves(), on(backend or "cpu", grad_out))
        return [grad.cpu() for grad in found]

    def cast(self, dtype: torch.dtype | None) -> "Attention":
        """A copy with q, k, v and bias_k as leaves, in another dtype if one is given."""
        cast = {
            name: None if x is None else x.detach().to(dtype or x.dtype, copy=True).requires_grad_()
            for name, x in (("q", self.q), ("k", self.k), ("v", self.v), ("bias_k", self.bias_k))
        }
        return replace(self, **cast)

    def scale(self) -> float:
        return self.q.shape[-1] ** -0.5 if self.softmax_scale is None else self.softmax_scale

    def lse_formula(self) -> torch.Tensor:
        """`lse`, in the dtype of q."""
        users = []
        for q, k, _, bias in self.users():
            logits = self.scale() * torch.einsum("chd,lhd->hcl", q, k)
            if bias is not None:
                logits = logits + bias.T[:, None]
            none = (logits == -torch.inf).all(-1)  # logsumexp has gradient NaN there
            total = logits.masked_fill(none[..., None], 0.0).logsumexp(-1).masked_fill(none, torch.inf)
            users.append(total.T)
        if self.cu_seqlens_q is None:
            return torch.stack(users)
        before, after = int(self.cu_seqlens_q[0]), len(self.q) - int(self.cu_seqlens_q[-1])
        return F.pad(torch.cat(users), (0, 0, before, after), value=torch.inf)

    def formula(self) -> torch.Tensor:
        """`out`, in the dtype of q."""
        users = []
        for q, k, v, bias in self.users():
            logits = self.scale() * torch.einsum("chd,lhd->hcl", q, k)
            if bias is not None:
                logits = logits + bias.T[:, None]
            weights = logits.softmax(-1) if self.activation == "softmax" else F.silu(logits) / max(len(k), 1)
            users.append(torch.einsum("hcl,lhd->chd", weights, v))
        if self.cu_seqlens_q is None:
            return torch.stack(users)
        before, after = int(self.cu_seqlens_q[0]), len(self.q) - int(self.cu_seqlens_q[-1])
        return F.pad(torch.cat(users), (0, 0, 0, 0, before, after))

    def users(self) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]]:
        """q, k, v and bias of each user."""
        B = len(self.k) if self.cu_seqlens_k is None else len(self.cu_seqlens_k) - 1
        return [
            (self.of_q(self.q, b), *(None if x is None else self.of_k(x, b) for x in (self.k, self.v, self.bias_k)))
            for b in range(B)
        ]

    def of_q(self, x: torch.Tensor, b: int) -> torch.Tensor:
        """A user's rows of a tensor shaped like q or out."""
        if self.cu_seqlens_q is not None:
            return x[int(self.cu_seqlens_q[b]) : int(self.cu_seqlens_q[b + 1])]
        return x if x.dim() == 3 else x[b]

    def of_k(self, x: torch.Tensor, b: int) -> torch.Tensor:
        """A user's rows of a tensor shaped like k."""
        if self.cu_seqlens_k is not None:
            return x[int(self.cu_seqlens_k[b]) : int(self.cu_seqlens_k[b + 1])]
        return x[b] if self.seqused_k is None else x[b, : int(self.seqused_k[b])]

    def but(self, **changes: Any) -> "Attention":
        return replace(self, **changes)


def attention(
    lengths: list[int],
    C: int = 9,
    H: int = 2,
    D: int = 16,
    *,
    queries: str = "dense",
    history: str = "ragged",
    dtype: torch.dtype = torch.float32,
    bias: bool = False,
    **more: Any,
) -> Attention:
    """Random inputs of ordinary size, with NaN in padding and in rows of no user.

    `queries` are "dense", "shared" or "ragged" (C for the first user, one less for the next, and so on); `history` is
    "dense" (two columns longer than the longest) or "ragged" (with rows of no user at both ends).
    """
    B = len(lengths)
    if history == "dense":
        L = max(lengths, default=0) + 2
        shape, more["seqused_k"] = (B, L, H, D), torch.tensor(lengths, dtype=torch.int64)
        nobody = torch.arange(L) >= more["seqused_k"][:, None]
    else:
        shape, more["cu_seqlens_k"] = (sum(lengths) + 5, H, D), offsets_of(lengths) + 2
        row = torch.arange(shape[0])
        nobody = (row < 2) | (row >= 2 + sum(lengths))
    if queries == "ragged":
        counts = [max(C - b, 0) for b in range(B)]
        more["cu_seqlens_q"] = offsets_of(counts) + 1
        q = torch.randn(sum(counts) + 2, H, D)
        q[0] = q[-1] = torch.nan
    else:
        q = torch.randn((C, H, D) if queries == "shared" else (B, C, H, D))
    k, v, b = (torch.randn(size).masked_fill(_as_wide(nobody, size), torch.nan) for size in (shape, shape, shape[:-1]))
    return Attention(q.to(dtype), k.to(dtype), v.to(dtype), bias_k=b.to(dtype) if bias else None, **more)


def _as_wide(mask: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    return mask.reshape(mask.shape + (1,) * (len(shape) - mask.dim()))


def true_gradients(problem: Attention, grad_out: torch.Tensor, dtype: torch.dtype) -> list[torch.Tensor]:
    """Gradients of the formula, computed in a dtype."""
    cast = problem.cast(dtype)
    found = torch.autograd.grad(cast.formula(), cast.leaves(), grad_out.to(dtype), allow_unused=True)
    return [torch.zeros_like(x) if grad is None else grad for x, grad in zip(cast.leaves(), found, strict=True)]


Five = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def attention_sizes(problem: Attention, grad_out: torch.Tensor, b: int) -> tuple[Five, Five]:
    """(sums of |terms|, bounds of the rounding error) of user b's out and gradients of q, k, v, bias_k.

    `g` bounds the |gradients| of the weights, `w` those of the logits: `p (g + sum(p g))` for the softmax, `1.1 g / L`
    for silu (slope below 1.1, curvature below 1). Rounding: sums are float32 in any order; weights, gradients of logits
    and results may be rounded to the dtype of q, and weights below 2^-124, nearly subnormal, may become 0.
    """
    single, info = 2.0**-24, torch.finfo(problem.q.dtype)
    q, k, v, bias = (None if x is None else x.double() for x in problem.users()[b])
    grad, scale = problem.of_q(grad_out, b).double().abs(), problem.scale()
    (C, _, D), L = q.shape, max(len(k), 1)
    bias = torch.zeros(k.shape[:2], dtype=torch.float64) if bias is None else bias
    logits = scale * torch.einsum("chd,lhd->hcl", q, k) + bias.T[:, None]
    sizes = abs(scale) * torch.einsum("chd,lhd->hcl", q.abs(), k.abs()) + bias.abs().T[:, None]
    off = (D + 8) * single * (F.pad(sizes, (1, 0)).amax(-1, keepdim=True) + math.log(L))  # bounds the error of lse too
    rest = 2 * info.eps + (D + L + C + 32) * single
    g = torch.einsum("chd,lhd->hcl", grad, v.abs())
    if problem.activation == "softmax":
        p = logits.softmax(-1)
        w, relative = p * (g + (p * g).sum(-1, keepdim=True)), torch.expm1(2 * off) + rest
        p_error, w_error = (relative + rest) * p, 3 * relative * w
    else:
        p, w = F.silu(logits).abs() / L, 1.1 * g / L
        p_error, w_error = 1.1 * off / L + 2 * rest * p, (off + 2 * rest) * w

    def contract(p: torch.Tensor, w: torch.Tensor) -> Five:
        return (
            torch.einsum("hcl,lhd->chd", p, v.abs()),
            torch.einsum("hcl,lhd->chd", w, k.abs()) * abs(scale),
            torch.einsum("hcl,chd->lhd", w, q.abs()) * abs(scale),
            torch.einsum("hcl,chd->lhd", p, grad),
            w.sum(1).T,
        )

    tiny = 2.0**-124
    bounds = contract(p_error + tiny, w_error + tiny * (1 + g + g.sum(-1, keepdim=True)))
    return contract(p, w), tuple(x + info.tiny for x in bounds)  # type: ignore[return-value]
