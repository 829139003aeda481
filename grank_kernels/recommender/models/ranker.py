"""The Ranker, GRank's second stage, and its folded form for serving."""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from grank_kernels.recommender.models.layers import mlp


class FoldedRanker(NamedTuple):
    """A Ranker and B users' histories as operands of `score_candidates`; `Ranker.fold` computes them.

    `score_candidates(candidates, items, **folded._asdict())` returns the Ranker's outputs for any candidates.

    Attributes:
        keys: (T, d), for the T items of all histories, one user after the other.
        values: (T, h).
        cu_seqlens: (B + 1,) int64, the first row of each user.
        user_hidden: (B, h).
        item_weight: (d, h).
        out_weight: (h,).
        out_bias: bias of the output.
        softmax_scale: scale of the attention logits.
    """

    keys: Tensor
    values: Tensor
    cu_seqlens: Tensor
    user_hidden: Tensor
    item_weight: Tensor
    out_weight: Tensor
    out_bias: float
    softmax_scale: float


class Ranker(nn.Module):
    """Scores candidates by their fit to a user's long history (arXiv 2510.15299, the Ranker).

    Single-head cross-attention from the candidate to the history, whose items first pass an MLP, then `MLP([o, e, u])`
    of the attention output, the item and the user, with one hidden layer. Ours are the width of that layer, the
    residual connection around the history's MLP, and a learned vector for each position, counted from the newest item,
    that is added to the keys.

    Item vectors have norm 1 and are scaled by `sqrt(d)` to unit variance, which linear layers and attention expect.
    """

    def __init__(self, dim: int, history: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.history = history
        self.scale = dim**0.5
        self.recency = nn.Parameter(0.02 * torch.randn(history, dim))
        self.history_mlp = mlp(dim, dim, dim)
        self.query = nn.Linear(dim, dim, bias=False)
        self.key = nn.Linear(dim, dim, bias=False)
        self.value = nn.Linear(dim, dim, bias=False)
        # The head's first layer over [o, e, u] in three parts; the part of u is the same for all candidates of a user.
        self.hidden_attended = nn.Linear(dim, hidden, bias=False)
        self.hidden_item = nn.Linear(dim, hidden, bias=False)
        self.hidden_user = nn.Linear(dim, hidden)
        self.dropout = nn.Dropout(dropout)
        self.out = nn.Linear(hidden, 1)
        nn.init.zeros_(self.out.weight)  # at first the order is the first stage's

    def forward(
        self,
        history: Tensor,
        lengths: Tensor,
        users: Tensor,
        candidates: Tensor,
        moments: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """Scores of the candidates.

        Args:
            history: (B, L, d) float32 item vectors, oldest first; the newest `self.history` of them are read.
            lengths: (B,) int64, number of items of each history; rows after them are ignored.
            users: (R, d) from the Generator.
            candidates: (R, C, d) item vectors.
            moments: for each of R queries, its row of `history`, (R,) int64, and the number of items of it that the
                query attends to, (R,) int64. None: R = B, each attends to its whole history.

        Returns:
            (R, C) float32. With an empty history the attention output o is 0.
        """
        x = self._read(history, lengths)
        keys, values = self.key(x), self.value(x)
        stops = lengths
        if moments is not None:
            rows, stops = moments
            keys, values = keys[rows], values[rows]
        age, counts = self._ages(stops, history.shape[1])
        keys = keys + F.embedding(age, self.recency)
        values = values.masked_fill(~counts.unsqueeze(-1), 0.0)
        mask = counts | ~counts.any(1, keepdim=True)  # an empty history attends to values of 0
        e = self.scale * candidates
        o = F.scaled_dot_product_attention(self.query(e), keys, values, attn_mask=mask.unsqueeze(1))
        hidden = self.hidden_attended(o) + self.hidden_item(e) + self.hidden_user(users).unsqueeze(1)
        scores: Tensor = self.out(self.dropout(F.relu(hidden)))
        return scores.squeeze(-1)

    def _read(self, history: Tensor, lengths: Tensor) -> Tensor:
        """The encoded history, (B, L, d), from which keys and values are projected."""
        behind = torch.arange(history.shape[1], device=history.device) >= lengths.unsqueeze(1)
        x = self.scale * history.masked_fill(behind.unsqueeze(-1), 0.0)
        read: Tensor = x + self.history_mlp(x)
        return read

    def _ages(self, stops: Tensor, length: int) -> tuple[Tensor, Tensor]:
        """For the first `stops` (R,) items: number of newer items, and whether the item is read; both (R, length)."""
        age = stops.unsqueeze(1) - 1 - torch.arange(length, device=stops.device)
        return age.clamp(0, self.history - 1), (age >= 0) & (age < self.history)

    @torch.no_grad()
    def fold(
        self, history: Tensor, lengths: Tensor, users: Tensor, *, dtype: torch.dtype | None = None
    ) -> FoldedRanker:
        """Operands of `score_candidates`: everything that does not depend on the candidates, computed once a request.

        The query of a candidate is linear in its row e, and the head's first layer is linear in the attention output.
        By associativity both weights are multiplied into the history, and the item table's row is the query itself:

            (e Wq^T) K^T = e (K Wq)^T         keys   = K Wq
            (a V) Wo^T   = a (V Wo^T)         values = V Wo^T

        with K and V the keys and values of `forward`, Wq the weight of `query` and Wo that of `hidden_attended`. There
        is no dropout, as in evaluation.

        Args:
            history: (B, L, d) float32 item vectors, oldest first; the newest `self.history` of them are read.
            lengths: (B,) int64, number of items of each history.
            users: (B, d) from the Generator.
            dtype: float16 or bfloat16 to round the operands to; None keeps float32.

        Returns:
            Copies, which later changes of the weights do not affect.
        """
        age, counts = self._ages(lengths, history.shape[1])
        x = self._read(history, lengths)[counts]  # a data-dependent size: one host synchronisation a request
        operands = (
            (self.key(x) + self.recency[age[counts]]) @ self.query.weight,
            self.hidden_attended(self.value(x)),
            self.hidden_user(users),
            self.scale * self.hidden_item.weight.T,
            self.out.weight[0],
        )
        keys, values, user_hidden, item_weight, out_weight = (
            y.to(dtype or y.dtype, copy=True, memory_format=torch.contiguous_format) for y in operands
        )
        return FoldedRanker(
            keys,
            values,
            F.pad(counts.sum(1).cumsum(0), (1, 0)),
            user_hidden,
            item_weight,
            out_weight,
            float(self.out.bias),
            self.scale * history.shape[2] ** -0.5,  # scaled_dot_product_attention's, times the scale of the row
        )
