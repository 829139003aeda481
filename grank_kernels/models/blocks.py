"""Causal transformer blocks of three families, each with a side stream of candidates.

Every block maps `(x, candidates)` to `(x, candidates)` with shared weights:

- `x` (B, T, d), the history: row t sees the rows up to t;
- `candidates` (B, C, d) or None: candidate c sees the first `visible[b, c]` rows of `x`, and itself. Candidates never see
  each other, and `x` never sees candidates, so `x` comes out the same, bit for bit, whether there are any or none.

That is GRank's decomposed attention (arXiv 2510.15299): `O(T^2 d + C T d)` instead of `O((T + C)^2 d)`. It scores many
candidates in one pass over a history, in training as in serving.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


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

    def forward(self, x: Tensor, candidates: Tensor | None, visible: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """See the module."""
        q, k, v = self._project(x, None)
        y = self._merge(F.scaled_dot_product_attention(q, k, v, is_causal=True))
        if candidates is None or visible is None:
            return y, None
        cq, ck, cv = self._project(candidates, visible)
        scale = q.shape[-1] ** -0.5
        seen = torch.arange(k.shape[2], device=k.device) < visible[:, None, :, None]
        logits = (cq @ k.mT * scale).masked_fill(~seen, float("-inf"))
        weights = torch.cat([logits, (cq * ck).sum(-1, keepdim=True) * scale], -1).softmax(-1)
        return y, self._merge(weights[..., :-1] @ v + weights[..., -1:] * cv)

    def _project(self, x: Tensor, positions: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        B, T, _ = x.shape
        q, k, v = self.qkv(x).view(B, T, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        if self.rotary:
            places = torch.arange(T, device=x.device).expand(B, T) if positions is None else positions
            turn = _rotation(places, q.shape[-1])
            q, k = _rotate(q, turn), _rotate(k, turn)
        return q, k, v

    def _merge(self, heads: Tensor) -> Tensor:
        merged: Tensor = self.out(heads.transpose(1, 2).flatten(2))
        return merged


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

    def forward(self, x: Tensor, candidates: Tensor | None, visible: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """See the module."""
        y, d = self.attention(
            self.attention_norm(x), None if candidates is None else self.attention_norm(candidates), visible
        )
        return self._finish(x, y), None if candidates is None else self._finish(candidates, d)

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

    `r` is one learned number for each distance between positions and head. No softmax: what a row attends to adds up, so
    the strength of an interest counts, not only its share.
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

    def forward(self, x: Tensor, candidates: Tensor | None, visible: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """See the module."""
        T = x.shape[1]
        places = torch.arange(T, device=x.device)
        u, v, q, k = self._project(x)
        behind = places[:, None] - places
        bias = self.distance[:, behind.clamp(min=0)]
        weights = F.silu(q @ k.mT + bias).tril() / self.length
        y = self._finish(x, weights @ v, u)
        if candidates is None or visible is None:
            return y, None
        cu, cv, cq, ck = self._project(candidates)
        behind = visible[..., None] - places  # a candidate stands right behind the last row that it sees
        bias = self.distance[:, behind.clamp(min=0)].transpose(0, 1)
        weights = F.silu(cq @ k.mT + bias).masked_fill(behind[:, None] <= 0, 0.0) / self.length
        own = F.silu((cq * ck).sum(-1, keepdim=True) + self.distance[:, :1, None]) / self.length
        return y, self._finish(candidates, weights @ v + own * cv, cu)

    def _project(self, x: Tensor) -> list[Tensor]:
        B, T, _ = x.shape
        parts = F.silu(self.uvqk(self.norm(x))).view(B, T, 4, self.heads, -1).permute(2, 0, 3, 1, 4)
        return list(parts)

    def _finish(self, x: Tensor, attended: Tensor, u: Tensor) -> Tensor:
        y = self.attended_norm(attended.transpose(1, 2).flatten(2)) * u.transpose(1, 2).flatten(2)
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
        if kind not in BLOCKS:
            raise ValueError(f"backbone must be one of {', '.join(BLOCKS)}, got {kind!r}")
        self.length = length
        self.position = None if kind == "llama" else nn.Parameter(0.02 * torch.randn(length + 1, dim))
        self.blocks = nn.ModuleList(BLOCKS[kind](dim, heads, dropout, length) for _ in range(blocks))
        self.norm = nn.RMSNorm(dim)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self, x: Tensor, candidates: Tensor | None = None, visible: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Run the stack.

        Args:
            x: (B, T, d), T up to `length`.
            candidates: (B, C, d).
            visible: (B, C) int64: how many rows of `x` each candidate sees.

        Returns:
            Outputs of `x` and of `candidates`, None without them.
        """
        if self.position is not None:
            x = x + self.position[: x.shape[1]]
            if candidates is not None and visible is not None:
                candidates = candidates + self.position[visible]
        x = self.dropout(x)
        candidates = None if candidates is None else self.dropout(candidates)
        for block in self.blocks:
            x, candidates = block(x, candidates, visible)
        return self.norm(x), None if candidates is None else self.norm(candidates)
