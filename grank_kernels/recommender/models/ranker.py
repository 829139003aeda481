"""The Ranker, GRank's second stage, and its folded form for serving."""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from grank_kernels.recommender.models.layers import mlp


class FoldedRanker(NamedTuple):
    """A Ranker and some users' histories as operands of `score_candidates`, from `Ranker.fold`.

    `score_candidates(candidates, items, **folded._asdict())` are the Ranker's outputs for any candidates.

    Attributes:
        keys: (T, d), the T items of all histories, one user after the other.
        values: (T, h).
        cu_seqlens: (B + 1,) int64, where each user's rows begin.
        user_hidden: (B, h).
        item_weight: (d, h).
        out_weight: (h,).
        out_bias: of the output.
        softmax_scale: of the logits.
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
    """How well a candidate fits a user's long history (arXiv 2510.15299, the Ranker).

    One single-head cross-attention from the candidate to the history, whose items pass an MLP of their own first, then
    `MLP([o, e, u])` with one hidden layer. The width of that layer, the item's own vector beside its MLP, and a vector
    for each place, counted from the newest item, that is added to keys, are ours.

    Item vectors have norm 1 and are stretched by `sqrt(d)`, to the variance that linear layers and attention expect.
    """

    def __init__(self, dim: int, history: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.history = history
        self.stretch = dim**0.5
        self.recency = nn.Parameter(0.02 * torch.randn(history, dim))
        self.history_mlp = mlp(dim, dim, dim)
        self.query = nn.Linear(dim, dim, bias=False)
        self.key = nn.Linear(dim, dim, bias=False)
        self.value = nn.Linear(dim, dim, bias=False)
        # The head's first layer over [o, e, u], in three parts: the last is the same for all candidates of a user.
        self.hidden_attended = nn.Linear(dim, hidden, bias=False)
        self.hidden_item = nn.Linear(dim, hidden, bias=False)
        self.hidden_user = nn.Linear(dim, hidden)
        self.dropout = nn.Dropout(dropout)
        self.out = nn.Linear(hidden, 1)
        nn.init.zeros_(self.out.weight)  # start from the first stage's order

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
            history: (B, L, d) float32 item vectors, oldest first; the newest `self.history` items count.
            lengths: (B,) int64, how many there are; what stands behind them does not matter.
            users: (R, d) from the Generator.
            candidates: (R, C, d) item vectors.
            moments: whose history each of the R sees, (R,) int64 rows of `history`, and how many items of it, (R,)
                int64. None: R = B, each sees all of its own.

        Returns:
            (R, C) float32. Of an empty history o is 0.
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
        mask = counts | ~counts.any(1, keepdim=True)  # nothing to attend to: all values are 0, and so is o
        e = self.stretch * candidates
        o = F.scaled_dot_product_attention(self.query(e), keys, values, attn_mask=mask.unsqueeze(1))
        hidden = self.hidden_attended(o) + self.hidden_item(e) + self.hidden_user(users).unsqueeze(1)
        scores: Tensor = self.out(self.dropout(F.relu(hidden)))
        return scores.squeeze(-1)

    def _read(self, history: Tensor, lengths: Tensor) -> Tensor:
        """What keys and values are made of, (B, L, d)."""
        behind = torch.arange(history.shape[1], device=history.device) >= lengths.unsqueeze(1)
        x = self.stretch * history.masked_fill(behind.unsqueeze(-1), 0.0)
        read: Tensor = x + self.history_mlp(x)
        return read

    def _ages(self, stops: Tensor, length: int) -> tuple[Tensor, Tensor]:
        """How many items are newer, and which of them count: both (R, length), where `stops` (R,) have been seen."""
        age = stops.unsqueeze(1) - 1 - torch.arange(length, device=stops.device)
        return age.clamp(0, self.history - 1), (age >= 0) & (age < self.history)

    @torch.no_grad()
    def fold(
        self, history: Tensor, lengths: Tensor, users: Tensor, *, dtype: torch.dtype | None = None
    ) -> FoldedRanker:
        """All of the Ranker that does not depend on the candidates, once a request instead of once a candidate.

        The query of a candidate is linear in its row e, and so is the head's first layer in what was attended to. By
        associativity both products with a weight move to the history, and what is left are the operands of
        `score_candidates`, whose query is the row of the item table itself:

            (e Wq^T) K^T = e (K Wq)^T         keys   = K Wq
            (a V) Wo^T   = a (V Wo^T)         values = V Wo^T

        with K and V the keys and values of `forward`, Wq the weight of `query` and Wo that of `hidden_attended`. There
        is no dropout, as in evaluation.

        Args:
            history: (B, L, d) float32 item vectors, oldest first; the newest `self.history` items count.
            lengths: (B,) int64, how many there are.
            users: (B, d) from the Generator.
            dtype: float16 or bfloat16 to round the operands to; None keeps float32.

        Returns:
            Copies: training may go on meanwhile.
        """
        age, counts = self._ages(lengths, history.shape[1])
        x = self._read(history, lengths)[counts]  # its size is in the data: a GPU is waited for here, once a request
        operands = (
            (self.key(x) + self.recency[age[counts]]) @ self.query.weight,
            self.hidden_attended(self.value(x)),
            self.hidden_user(users),
            self.stretch * self.hidden_item.weight.T,
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
            self.stretch * history.shape[2] ** -0.5,  # what scaled_dot_product_attention takes, of a stretched row
        )
