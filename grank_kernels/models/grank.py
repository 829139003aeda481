"""GRank (arXiv 2510.15299): a Generator that retrieves and a Ranker that orders what it found."""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from grank_kernels.models.layers import SelfAttentionBlock, causal_mask, masked_lookup, mlp


class Generator(nn.Module):
    """GRank's first stage (arXiv 2510.15299, the Generator): a short history -> the user vector u.

    Pre-norm causal self-attention. The paper reads u at a query token of user features behind the history; here u is
    read at the newest item, so one pass yields the user vector of every moment of the history, and all of them train.
    The paper gives 4 blocks, d = 128 and 64 items; heads and feed-forward widths are not published.
    """

    def __init__(self, dim: int, history: int, blocks: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.history = history
        self.dropout = dropout
        self.position = nn.Parameter(0.02 * torch.randn(history, dim))
        self.blocks = nn.ModuleList(SelfAttentionBlock(dim, heads, dropout) for _ in range(blocks))
        self.norm = nn.RMSNorm(dim)

    def forward(self, table: Tensor, history: Tensor) -> Tensor:
        """User vectors at every moment.

        Args:
            table: (N, d) float32 item vectors.
            history: (B, L) int64 item ids, oldest first, padded on the left with -1; the last `self.history` count.

        Returns:
            (B, T, d), `T = min(L, self.history)`: row t has seen the columns up to t. The last row is today's u.
        """
        items, valid = masked_lookup(table, history[:, -self.history :])
        d, T = items.shape[2], items.shape[1]
        x = F.dropout(items * d**0.5 + self.position[-T:], self.dropout, self.training)
        # Padding sees itself, so that its rows stay finite; nothing else sees padding.
        mask = causal_mask(T, x.device) & valid.unsqueeze(1) | torch.eye(T, dtype=torch.bool, device=x.device)
        for block in self.blocks:
            x = block(x, mask)
        users: Tensor = self.norm(x)
        return users


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
    """GRank's second stage (the paper's Ranker): how well a candidate fits a user's long history.

    One single-head cross-attention from the candidate to the history, whose items pass an MLP of their own first, then
    `MLP([o, e, u])` with one hidden layer. The width of that layer, and the item's own vector beside its MLP in keys
    and values, are ours.
    """

    def __init__(self, dim: int, history: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.history = history
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

    def forward(self, table: Tensor, history: Tensor, users: Tensor, candidates: Tensor) -> Tensor:
        """Scores of the candidates.

        Args:
            table: (N, d) float32 item vectors.
            history: (B, L) int64, oldest first, padded on the left with -1; the last `self.history` columns count.
            users: (B, d) from the Generator.
            candidates: (B, C) int64 in [0, N).

        Returns:
            (B, C) float32. Of an empty history o is 0.
        """
        x, valid = self._read(table, history)
        values = self.value(x).masked_fill(~valid.unsqueeze(-1), 0.0)
        mask = valid | ~valid.any(1, keepdim=True)  # nothing to attend to: all values are 0, and so is o
        e = F.embedding(candidates, table)
        o = F.scaled_dot_product_attention(self.query(e), self.key(x), values, attn_mask=mask.unsqueeze(1))
        hidden = self.hidden_attended(o) + self.hidden_item(e) + self.hidden_user(users).unsqueeze(1)
        scores: Tensor = self.out(self.dropout(F.relu(hidden)))
        return scores.squeeze(-1)

    def _read(self, table: Tensor, history: Tensor) -> tuple[Tensor, Tensor]:
        """What keys and values are made of, (B, L, d), and which of it is no padding, (B, L) bool."""
        items, valid = masked_lookup(table, history[:, -self.history :])
        x = items + self.recency[self.history - items.shape[1] :]
        return x + self.history_mlp(x), valid

    @torch.no_grad()
    def fold(self, table: Tensor, history: Tensor, users: Tensor, *, dtype: torch.dtype | None = None) -> FoldedRanker:
        """All of the Ranker that does not depend on the candidates, once a request instead of once a candidate.

        The query of a candidate is linear in its row e, and so is the head's first layer in what was attended to. By
        associativity both products with a weight move to the history, and what is left are the operands of
        `score_candidates`, whose query is the row of the item table itself:

            (e Wq^T) K^T = e (K Wq)^T         keys   = K Wq
            (a V) Wo^T   = a (V Wo^T)         values = V Wo^T

        with K and V the keys and values of `forward`, Wq the weight of `query` and Wo that of `hidden_attended`. There
        is no dropout, as in evaluation.

        Args:
            table: (N, d) float32 item vectors.
            history: (B, L) int64, oldest first, padded on the left with -1; the last `self.history` columns count.
            users: (B, d) from the Generator.
            dtype: float16 or bfloat16 to round the operands to; None keeps float32.

        Returns:
            Copies: training may go on meanwhile.
        """
        x, valid = self._read(table, history)
        x = x[valid]  # its size is in the data, so a GPU is waited for here, once a request
        operands = (
            self.key(x) @ self.query.weight,
            self.hidden_attended(self.value(x)),
            self.hidden_user(users),
            self.hidden_item.weight.T,
            self.out.weight[0],
        )
        keys, values, user_hidden, item_weight, out_weight = (
            y.to(dtype or y.dtype, copy=True, memory_format=torch.contiguous_format) for y in operands
        )
        return FoldedRanker(
            keys,
            values,
            F.pad(valid.sum(1).cumsum(0), (1, 0)),
            user_hidden,
            item_weight,
            out_weight,
            float(self.out.bias),
            table.shape[1] ** -0.5,  # what scaled_dot_product_attention takes
        )


class GRank(nn.Module):
    """Retrieve, then rank, over one item table that every part shares (arXiv 2510.15299).

    The second stage's score is the first stage's logit, which `mips_topk` has returned anyway, plus the Ranker's
    output. The sum is ours: the paper scores with the MLP alone, and has four billion interactions to learn it from.

    Args:
        num_items: size of the corpus.
        dim: width of item and user vectors (128 in the paper).
        blocks: self-attention blocks of the Generator (4 in the paper).
        heads: heads of each block.
        short_history: items the Generator reads (64 in the paper).
        long_history: items the Ranker reads (up to 1000 in the paper).
        hidden: width of the Ranker's head.
        dropout: of the Generator.
        ranker_dropout: of the Ranker's hidden layer.
        negatives: candidates from which the Ranker must tell the target in training.
        ranked: moments of each training window that train the Ranker.

    Where the paper is not named, and where these defaults differ from it, they are ours, settled by a few runs on the
    validation items of MovieLens-100K. On that data set, with a first stage trained on the full softmax, the second
    stage's gain in the runs made was within the standard error of one test figure.
    """

    def __init__(
        self,
        num_items: int,
        *,
        dim: int = 64,
        blocks: int = 2,
        heads: int = 1,
        short_history: int = 64,
        long_history: int = 128,
        hidden: int = 64,
        dropout: float = 0.2,
        ranker_dropout: float = 0.5,
        negatives: int = 32,
        ranked: int = 2,
    ) -> None:
        super().__init__()
        self.items = nn.Parameter(0.02 * torch.randn(num_items, dim))
        self.generator = Generator(dim, short_history, blocks, heads, dropout)
        self.ranker = Ranker(dim, long_history, hidden, ranker_dropout)
        self.negatives = negatives
        self.ranked = ranked

    def user_vectors(self, history: Tensor) -> Tensor:
        """Queries for `mips_topk` over `self.items`: history (B, L) int64, left-padded with -1 -> (B, d)."""
        users: Tensor = self.generator(self.items, history)[:, -1]
        return users

    def rank(self, history: Tensor, users: Tensor, candidates: Tensor, logits: Tensor) -> Tensor:
        """Second-stage scores of retrieved candidates.

        Args:
            history: (B, L) int64, left-padded with -1; the last `long_history` columns count.
            users: (B, d) from `user_vectors`.
            candidates: (B, C) int64, the indices that `mips_topk` returned; -1 scores `-inf`.
            logits: (B, C) float32, the values that it returned: `<u, e>`.

        Returns:
            (B, C).
        """
        corrections: Tensor = self.ranker(self.items, history, users, candidates.clamp(min=0))
        return (logits + corrections).masked_fill(candidates < 0, float("-inf"))

    def losses(self, windows: Tensor) -> tuple[Tensor, Tensor]:
        """The InfoNCE losses of both stages, the paper's `L_NTP` and `L_CA`, to be minimised together.

        First stage: the softmax runs over all items that the user has not seen, which is what retrieval searches. The
        paper takes the other targets of the batch as negatives and corrects for how often they come up (logQ). At a few
        thousand items the whole corpus costs no more than the attention does, and needs no correction.

        Second stage: the negatives are drawn from the first stage's own softmax, so they are the candidates the Ranker
        will meet, and corrected by logQ: `logit + output - logQ` is the output alone. It learns how much likelier the
        target is than the first stage thought.

        Args:
            windows: (B, W) int64 from `TrainingWindows`: each column is the target of what stands before it.

        Returns:
            Two scalars.
        """
        history, targets = windows[:, :-1], windows[:, 1:]
        users = self.generator(self.items, history)
        rows, columns = (history[:, -users.shape[1] :] >= 0).nonzero(as_tuple=True)
        users = users[rows, columns]
        columns = columns + max(0, history.shape[1] - self.generator.history)  # from the Generator's to the window's
        target = targets[rows, columns]
        seen = _first_seen(history, len(self.items))[rows] <= columns.unsqueeze(1)
        logits = (users @ self.items.T).masked_fill(seen.scatter(1, target.unsqueeze(1), False), float("-inf"))
        retrieval = F.cross_entropy(logits, target)

        pick = torch.randint(len(rows), (len(windows) * self.ranked,), device=rows.device)
        rows, columns, target = rows[pick], columns[pick], target[pick].unsqueeze(1)
        with torch.no_grad():
            # Never quite 0, so that there are enough to draw from however many items a user has seen.
            proposal = logits[pick].softmax(1).clamp(min=1e-9).scatter(1, target, 0.0)
            negatives = proposal.multinomial(min(self.negatives, len(self.items) - 1))
        candidates = torch.cat([target, negatives], 1)
        outputs = self.ranker(self.items, _until(history[rows], columns), users[pick], candidates)
        return retrieval, F.cross_entropy(outputs, torch.zeros_like(rows))


def _first_seen(history: Tensor, num_items: int) -> Tensor:
    """(B, num_items) int16: the column of `history` (B, L) where each item first stands, 32767 for the others."""
    columns = torch.arange(history.shape[1], dtype=torch.int16, device=history.device).expand(history.shape)
    slots = history.where(history >= 0, num_items)
    first = torch.full((len(history), num_items + 1), 32767, dtype=torch.int16, device=history.device)
    return first.scatter_reduce(1, slots, columns, "amin")[:, :-1]


def _until(history: Tensor, columns: Tensor) -> Tensor:
    """Each row of `history` (B, L) as it stood at its column, which moves into the last place; -1 fills the front."""
    source = torch.arange(1 - history.shape[1], 1, device=history.device) + columns.unsqueeze(1)
    return history.gather(1, source.clamp(min=0)).where(source >= 0, -1)
