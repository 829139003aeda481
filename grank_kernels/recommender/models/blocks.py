"""Causal transformer blocks of three families, which more tokens can join later.

Every block does two things with the same weights:

- `block(x)`, x (B, T, d) the history: row t sees the rows up to t. It returns the outputs and a `Memory` of the rows;
- `block.join(tokens, visible, memory)`, tokens (B, C, d): token c sees the first `visible[b, c]` rows of the history
  and itself. Tokens never see each other, and the history has been and gone: it cannot see them, and its outputs are
  the same, bit for bit, whoever joins.

That is GRank's decomposed attention (arXiv 2510.15299): `O(T^2 d + C T d)` instead of `O((T + C)^2 d)`. It scores many
candidates after one pass over a history, in training as in serving.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Memory(NamedTuple):
    """What tokens that join a block look at: keys and values of the history's rows, (B, heads, T, d / heads) each."""

    keys: Tensor
    values: Tensor


class SoftmaxAttention(nn.Module):
    """Multi-head causal softmax attention, with rotary positions if asked for (RoFormer, arXiv 2104.09864)."""

    def __init__(self, dim: int, heads: int, *, rotary: bool) -> None:
        super().__init__()
        if dim % heads or (rotary and dim // heads % 2):
            raise ValueError(
                f"dim must be a multiple of heads{' to an even quotient' if rotary else ''}, got dim={dim}, "
                f"heads={heads}"
            )
        self.heads, self.rotary = heads, rotary
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.out = nn.Linear(dim, dim, bias=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Memory]:
        """See the module."""
        q, k, v = self._project(x, torch.arange(x.shape[1], device=x.device).expand(x.shape[:2]))
        return self._merge(_causal_attention(q, k, v)), Memory(k, v)

    def join(self, tokens: Tensor, visible: Tensor, memory: Memory) -> Tensor:
        """See the module."""
        q, k, v = self._project(tokens, visible)
        q = q * q.shape[-1] ** -0.5
        hidden = torch.arange(memory.keys.shape[2], device=q.device) >= visible[:, None, :, None]
        logits = (q @ memory.keys.mT).masked_fill(hidden, float("-inf"))
        weights = torch.cat([logits, (q * k).sum(-1, keepdim=True)], -1).softmax(-1)
        return self._merge(weights[..., :-1] @ memory.values + weights[..., -1:] * v)

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
    """Softmax attention of every row to the rows up to it, all (B, heads, T, width).

    PyTorch's fused attention for CPUs does not multiply in bfloat16 when float32 products may be made of it. At T = 64
    plain products take a seventh of its time, at T = 200 half, at T = 400 nine tenths (measured on a processor with
    AMX, forward and backward), and the logits of histories this short are small.
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

    def forward(self, x: Tensor) -> tuple[Tensor, Memory]:
        """See the module."""
        attended, memory = self.attention(self.attention_norm(x))
        return self._finish(x, attended), memory

    def join(self, tokens: Tensor, visible: Tensor, memory: Memory) -> Tensor:
        """See the module."""
        return self._finish(tokens, self.attention.join(self.attention_norm(tokens), visible, memory))

    def _finish(self, x: Tensor, attended: Tensor) -> Tensor:
        x = x + self.dropout(attended)
        finished: Tensor = x + self.dropout(self.feed_forward(self.feed_forward_norm(x)))
        return finished


class TransformerBlock(_PreNormBlock):
    """Softmax attention and a GELU feed-forward layer, as in SASRec (arXiv 1808.09781), with the norm in front."""

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
    """RMSNorm, rotary positions, SwiGLU: Llama's block (arXiv 2302.13971), one of UniGRF's two backbones."""

    def __init__(self, dim: int, heads: int, dropout: float, length: int) -> None:
        super().__init__(SoftmaxAttention(dim, heads, rotary=True), _SwiGLU(dim, 8 * dim // 3), dim, dropout)


class HSTUBlock(nn.Module):
    """HSTU's block (arXiv 2402.17152, equations 1 to 3), without the bias by time.

        U, V, Q, K = SiLU(norm(X) W)        A = SiLU(Q K^T + r) / length, causal
        Y = X + (norm(A V) * U) Wo

    `r` is one learned number for each distance between positions and head. No softmax: what a row attends to adds up,
    so the strength of an interest counts, not only its share.
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

    def forward(self, x: Tensor) -> tuple[Tensor, Memory]:
        """See the module."""
        places = torch.arange(x.shape[1], device=x.device)
        u, v, q, k = self._project(x)
        logits = (q @ k.mT).add_(self._bias(places[:, None] - places))
        return self._finish(x, F.silu(logits) @ v, u), Memory(k, v)

    def join(self, tokens: Tensor, visible: Tensor, memory: Memory) -> Tensor:
        """See the module."""
        u, v, q, k = self._project(tokens)
        # A token stands right behind the last row that it sees.
        behind = visible[..., None] - torch.arange(memory.keys.shape[2], device=q.device)
        bias = self._bias(behind.masked_fill(behind == 0, -1)).transpose(0, 1)
        own = F.silu((q * k).sum(-1, keepdim=True) + self.distance[:, :1, None])
        attended = F.silu((q @ memory.keys.mT).add_(bias)) @ memory.values + own * v
        return self._finish(tokens, attended, u)

    def _bias(self, behind: Tensor) -> Tensor:
        """The bias r by distance, (heads, *behind); so low in front that SiLU makes exactly 0 of any logit there."""
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
    """Positions, dropout, a stack of blocks and a last norm.

    Args:
        kind: "transformer", "llama" or "hstu". Llama's positions are rotary; the others add a learned vector.
        dim: width.
        blocks: how many.
        heads: of each.
        dropout: of inputs and outputs of blocks.
        length: rows that a history may have.
    """

    def __init__(self, kind: str, *, dim: int, blocks: int, heads: int, dropout: float, length: int) -> None:
        super().__init__()
        self.length = length
        self.position = None if kind == "llama" else nn.Parameter(0.02 * torch.randn(length + 1, dim))
        self.blocks = nn.ModuleList(BLOCKS[kind](dim, heads, dropout, length) for _ in range(blocks))
        self.norm = nn.RMSNorm(dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> tuple[Tensor, list[Memory]]:
        """Histories (B, T, d), T up to `length`, to their outputs and a memory of each block."""
        if self.position is not None:
            x = x + self.position[: x.shape[1]]
        x = self.dropout(x)
        memories = []
        for block in self.blocks:
            x, memory = block(x)
            memories.append(memory)
        return self.norm(x), memories

    def join(self, tokens: Tensor, visible: Tensor, memories: list[Memory]) -> Tensor:
        """Outputs of tokens that join histories already read.

        Args:
            tokens: (B, C, d).
            visible: (B, C) int64 in [0, T]: how many rows of the history each sees; it stands right behind them.
            memories: what `forward` returned.

        Returns:
            (B, C, d).
        """
        if self.position is not None:
            tokens = tokens + F.embedding(visible, self.position)
        tokens = self.dropout(tokens)
        for block, memory in zip(self.blocks, memories, strict=True):
            tokens = block.join(tokens, visible, memory)  # type: ignore[operator]  # torch types it as a tensor
        joined: Tensor = self.norm(tokens)
        return joined
