"""Layers that the models share."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class SelfAttentionBlock(nn.Module):
    """Pre-norm transformer block: `x + attention(norm(x))`, then `x + feed_forward(norm(x))`."""

    def __init__(self, dim: int, heads: int, dropout: float) -> None:
        super().__init__()
        if dim % heads:
            raise ValueError(f"dim must be a multiple of heads, got dim={dim}, heads={heads}")
        self.heads = heads
        self.dropout = dropout
        self.attention_norm = nn.RMSNorm(dim)
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.out = nn.Linear(dim, dim, bias=False)
        self.feed_forward = nn.Sequential(nn.RMSNorm(dim), mlp(dim, 2 * dim, dim))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """`x` (B, T, d) -> (B, T, d); `mask` bool, broadcastable to (B, T, T): row t may look at column s."""
        B, T, d = x.shape
        q, k, v = self.qkv(self.attention_norm(x)).view(B, T, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        heads = F.scaled_dot_product_attention(q, k, v, attn_mask=mask.unsqueeze(-3))
        x = x + F.dropout(self.out(heads.transpose(1, 2).reshape(B, T, d)), self.dropout, self.training)
        return x + F.dropout(self.feed_forward(x), self.dropout, self.training)


def mlp(inputs: int, hidden: int, outputs: int) -> nn.Sequential:
    """Linear, GELU, linear."""
    return nn.Sequential(nn.Linear(inputs, hidden), nn.GELU(), nn.Linear(hidden, outputs))


def causal_mask(length: int, device: torch.device) -> Tensor:
    """`(length, length)` bool: row t may look at the columns up to and including t."""
    return torch.ones(length, length, dtype=torch.bool, device=device).tril()


def masked_lookup(table: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of `table` (N, d) for `ids`, zeros where an id is negative; and the bool mask of the ids that are not."""
    valid = ids >= 0
    return F.embedding(ids.clamp(min=0), table).masked_fill(~valid.unsqueeze(-1), 0.0), valid


def prefix_means(x: Tensor, counts: Tensor, visible: Tensor) -> Tensor:
    """Means over the beginnings of histories.

    Args:
        x: (B, T, d).
        counts: (B, T) bool: the rows of x that count.
        visible: (B, M) int64 in [0, T]: lengths of the beginnings.

    Returns:
        (B, M, d): of the first `visible` rows the mean of those that count, 0 where none does.
    """
    sums = F.pad((x * counts.unsqueeze(-1)).cumsum(1), (0, 0, 1, 0))
    numbers = F.pad(counts.cumsum(1), (1, 0)).gather(1, visible).clamp(min=1)
    return sums.gather(1, visible.unsqueeze(-1).expand(-1, -1, x.shape[2])) / numbers.unsqueeze(-1)
