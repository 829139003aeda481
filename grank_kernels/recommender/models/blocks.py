"""Causal transformer blocks of three families, with a second path for candidates.

A block has two entry points with the same weights:

- `block(x)`, x (B, T, d) the history: row t attends to rows 0 to t. Returns the outputs and the rows' keys and values;
- `block.join(tokens, visible, cache)`, tokens (B, C, d): token c attends to the first `visible[b, c]` rows of the
  history and to itself. Tokens never attend to each other, and the history never attends to a token, so its outputs
  are the same bits with and without them.

This is GRank's decomposed attention (arXiv 2510.15299): `O(T^2 d + C T d)` instead of `O((T + C)^2 d)`. Many candidates
are scored after one pass over a history, in training as in serving.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class KVCache(NamedTuple):
    """Keys and values of the history's rows in one block, (B, heads, T, d / heads) each."""

    keys: Tensor
    values: Tensor


class SoftmaxAttention(nn.Module):
    """Multi-head causal softmax attention, optionally with rotary positions (RoFormer, arXiv 2104.09864)."""

    def __init__(self, dim: int, heads: int, *, rotary: bool) -> None:
        super().__init__()
        if dim % heads or (rotary and dim // heads % 2):
            of = "2 * heads, for rotary positions" if rotary else "heads"
            raise ValueError(f"dim must be a multiple of {of}, got dim={dim}, heads={heads}")
        self.heads, self.rotary = heads, rotary
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.out = nn.Linear(dim, dim, bias=False)

    def forward(self, x: Tensor) -> tuple[Tensor, KVCache]:
        """See the module's docstring."""
        q, k, v = self._project(x, torch.arange(x.shape[1], device=x.device).expand(x.shape[:2]))
        return self._merge(_causal_attention(q, k, v)), KVCache(k, v)

    def join(self, tokens: Tensor, visible: Tensor, cache: KVCache) -> Tensor:
        """See the module's docstring."""
        q, k, v = self._project(tokens, visible)
        q = q * q.shape[-1] ** -0.5
        hidden = torch.arange(cache.keys.shape[2], device=q.device) >= visible[:, None, :, None]
        logits = (q @ cache.keys.mT).masked_fill(hidden, float("-inf"))
        weights = torch.cat([logits, (q * k).sum(-1, keepdim=True)], -1).softmax(-1)
        return self._merge(weights[..., :-1] @ cache.values + weights[..., -1:] * v)

    def _project(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        B, T, d = x.shape
        q, k, v = self.qkv(x).view(B, T, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        if self.rotary:
            turn = _rotation(positions, q.shape[-1])
            q, k = _rotate(q, turn), _rotate(k, turn)
        return q, k, v

    def _merge(self, heads: Tensor) -> Tensor:
        merged: Tensor = self.out(heads.transpose(1, 2).flatten(2))
        return merged


def _causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal softmax attention; all tensors are (B, heads, T, width).

    On a CPU it is plain matrix products: PyTorch's fused CPU attention ignores
    `torch.set_float32_matmul_precision("medium")`. On a processor with AMX the plain products take 1/7 of its time at
    T = 64, 1/2 at T = 200 and 9/10 at T = 400, forward and backward; the (T, T) logits are small at these lengths.
    """
    if q.device.type != "cpu":
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)
    T = q.shape[2]
    ahead = torch.full((T, T), float("-inf"), dtype=q.dtype).triu(1)
    logits = (q * q.shape[-1] ** -0.5 @ k.mT).add_(ahead)
    attended: Tensor = logits.softmax(-1) @ v
    return attended


def _rotation(positions: Tensor, width: int) -> tuple[Tensor, Tensor]:
    frequencies = 10_000.0 ** (-torch.arange(0, width, 2, device=positions.device) / width)
    angles = positions[:, None, :, None] * frequencies
    return angles.cos(), angles.sin()


def _rotate(x: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
    cos, sin = turn
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)


class _PreNormBlock(nn.Module):
    """`x + attention(norm(x))`, then `x + feed_forward(norm(x))`."""

    def __init__(self, attention: SoftmaxAttention, feed_forward: nn.Module, dim: int, dropout: float) -> None:
        super().__init__()
        self.attention, self.feed_forward = attention, feed_forward
        self.attention_norm, self.feed_forward_norm = nn.RMSNorm(dim), nn.RMSNorm(dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> tuple[Tensor, KVCache]:
        """See the module's docstring."""
        attended, cache = self.attention(self.attention_norm(x))
        return self._finish(x, attended), cache

    def join(self, tokens: Tensor, visible: Tensor, cache: KVCache) -> Tensor:
        """See the module's docstring."""
        return self._finish(tokens, self.attention.join(self.attention_norm(tokens), visible, cache))

    def _finish(self, x: Tensor, attended: Tensor) -> Tensor:
        x = x + self.dropout(attended)
        finished: Tensor = x + self.dropout(self.feed_forward(self.feed_forward_norm(x)))
        return finished


class TransformerBlock(_PreNormBlock):
    """Softmax attention and a GELU feed-forward layer as in SASRec (arXiv 1808.09781), in pre-norm form."""

    def __init__(self, dim: int, heads: int, dropout: float, length: int) -> None:
        feed_forward = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))
        super().__init__(SoftmaxAttention(dim, heads, rotary=False), feed_forward, dim, dropout)


class _SwiGLU(nn.Module):
    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.inputs = nn.Linear(dim, 2 * hidden, bias=False)
        self.out = nn.Linear(hidden, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.inputs(x).chunk(2, -1)
        out: Tensor = self.out(F.silu(gate) * value)
        return out


class LlamaBlock(_PreNormBlock):
    """Llama's block (arXiv 2302.13971): RMSNorm, rotary positions, SwiGLU. One of UniGRF's two backbones."""

    def __init__(self, dim: int, heads: int, dropout: float, length: int) -> None:
        super().__init__(SoftmaxAttention(dim, heads, rotary=True), _SwiGLU(dim, 8 * dim // 3), dim, dropout)


class HSTUBlock(nn.Module):
    """HSTU's block (arXiv 2402.17152, equations 1 to 3), without the relative time bias.

        U, V, Q, K = SiLU(norm(X) W)        A = SiLU(Q K^T + r) / length, causal
        Y = X + (norm(A V) * U) Wo

    `r` is a learned bias for each distance between positions and each head. There is no softmax: weights do not sum to
    1, so the number of related items counts, not only their share.
    """

    def __init__(self, dim: int, heads: int, dropout: float, length: int) -> None:
        super().__init__()
        if dim % heads:
            raise ValueError(f"dim must be a multiple of heads, got dim={dim}, heads={heads}")
        self.heads, self.length = heads, length
        self.norm = nn.LayerNorm(dim)
        self.uvqk = nn.Linear(dim, 4 * dim, bias=False)
        self.distance = nn.Parameter(0.02 * torch.randn(heads, length + 1))
        self.attended_norm = nn.LayerNorm(dim)
        self.out = nn.Linear(dim, dim)
        self.dropout = nn.Dropout(dropout)
        nn.init.normal_(self.uvqk.weight, std=0.02)

    def forward(self, x: Tensor) -> tuple[Tensor, KVCache]:
        """See the module's docstring."""
        places = torch.arange(x.shape[1], device=x.device)
        u, v, q, k = self._project(x)
        logits = (q @ k.mT).add_(self._bias(places[:, None] - places))
        return self._finish(x, F.silu(logits) @ v, u), KVCache(k, v)

    def join(self, tokens: Tensor, visible: Tensor, cache: KVCache) -> Tensor:
        """See the module's docstring."""
        u, v, q, k = self._project(tokens)
        # A token's position is the one after the last row that it attends to.
        behind = visible[..., None] - torch.arange(cache.keys.shape[2], device=q.device)
        bias = self._bias(behind.masked_fill(behind == 0, -1)).transpose(0, 1)
        own = F.silu((q * k).sum(-1, keepdim=True) + self.distance[:, :1, None])
        attended = F.silu((q @ cache.keys.mT).add_(bias)) @ cache.values + own * v
        return self._finish(tokens, attended, u)

    def _bias(self, behind: Tensor) -> Tensor:
        """The bias r by distance, (heads, *behind). At negative distances it is -1e4, whose SiLU is exactly 0."""
        return self.distance[:, behind.clamp(min=0)].masked_fill(behind < 0, -1e4)

    def _project(self, x: Tensor) -> list[Tensor]:
        B, T, d = x.shape
        parts = F.silu(self.uvqk(self.norm(x))).view(B, T, 4, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        return list(parts)

    def _finish(self, x: Tensor, attended: Tensor, u: Tensor) -> Tensor:
        y = self.attended_norm(attended.transpose(1, 2).flatten(2) / self.length) * u.transpose(1, 2).flatten(2)
        finished: Tensor = x + self.out(self.dropout(y))
        return finished


BLOCKS: dict[str, type[TransformerBlock] | type[LlamaBlock] | type[HSTUBlock]] = {
    "transformer": TransformerBlock,
    "llama": LlamaBlock,
    "hstu": HSTUBlock,
}


class Backbone(nn.Module):
    """Position embeddings, dropout, a stack of blocks and a final norm.

    Args:
        kind: "transformer", "llama" or "hstu". Llama's positions are rotary; the others add a learned vector.
        dim: width d.
        blocks: number of blocks.
        heads: number of heads of each block.
        dropout: dropout rate of the blocks' inputs and outputs.
        length: largest number of rows of a history.
    """

    def __init__(self, kind: str, *, dim: int, blocks: int, heads: int, dropout: float, length: int) -> None:
        super().__init__()
        self.length = length
        self.position = None if kind == "llama" else nn.Parameter(0.02 * torch.randn(length + 1, dim))
        self.blocks = nn.ModuleList(BLOCKS[kind](dim, heads, dropout, length) for _ in range(blocks))
        self.norm = nn.RMSNorm(dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> tuple[Tensor, list[KVCache]]:
        """The outputs of histories (B, T, d), T up to `length`, and the cache of each block."""
        if self.position is not None:
            x = x + self.position[: x.shape[1]]
        x = self.dropout(x)
        caches = []
        for block in self.blocks:
            x, cache = block(x)
            caches.append(cache)
        return self.norm(x), caches

    def join(self, tokens: Tensor, visible: Tensor, caches: list[KVCache]) -> Tensor:
        """The outputs of tokens that attend to histories.

        Args:
            tokens: (B, C, d).
            visible: (B, C) int64 in [0, T]: number of history rows that each token attends to, and its position.
            caches: what `forward` returned for the histories.

        Returns:
            (B, C, d).
        """
        if self.position is not None:
            tokens = tokens + F.embedding(visible, self.position)
        tokens = self.dropout(tokens)
        for block, cache in zip(self.blocks, caches, strict=True):
            tokens = block.join(tokens, visible, cache)  # type: ignore[operator]  # torch types it as a tensor
        joined: Tensor = self.norm(tokens)
        return joined
