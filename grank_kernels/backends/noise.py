"""Gumbel noise as a function of (seed, row, item): no state, so that chunks, shards and backends draw the same.

A key of the row and a key of the item are added and hashed by splitmix64's finaliser (Steele, Lea and Flood, "Fast
splittable pseudorandom number generators", 2014). Its upper 53 bits are a uniform number v in (0, 1), and the noise is
`-log(-log1p(-v))` in float64: v near 0 gives the largest noise, where float64 is dense.
"""

import torch

_GOLDEN = 0x9E3779B97F4A7C15  # 2^64 / golden ratio, odd
_ODD = 0xD1342543DE82EF95  # a second odd constant, for rows


def _signed(x: int) -> int:
    """The int64 with the lower 64 bits of x."""
    return (x + (1 << 63)) % (1 << 64) - (1 << 63)


def _shifted(x: torch.Tensor, bits: int) -> torch.Tensor:
    """Logical shift to the right: torch's is arithmetic."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix(x: torch.Tensor) -> torch.Tensor:
    """splitmix64's finaliser, a bijection of 64 bits."""
    x = (x ^ _shifted(x, 30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ _shifted(x, 27)) * _signed(0x94D049BB133111EB)
    return x ^ _shifted(x, 31)


def row_keys(seed: int, rows: int, device: torch.device) -> torch.Tensor:
    """(R,) int64."""
    start = _mix(torch.full((1,), _signed(seed), dtype=torch.int64, device=device) + _signed(_GOLDEN))
    return _mix(start + torch.arange(1, rows + 1, device=device) * _signed(_ODD))


def item_keys(items: int, device: torch.device) -> torch.Tensor:
    """(N,) int64."""
    return _mix(torch.arange(1, items + 1, device=device) * _signed(_GOLDEN))


def gumbel(rows: torch.Tensor, items: torch.Tensor) -> torch.Tensor:
    """Noise of pairs of keys, float64, by broadcasting."""
    bits = _shifted(_mix(rows + items), 11)
    uniform = (bits.double() + 0.5) * 2.0**-53
    return uniform.neg_().log1p_().neg_().log_().neg_()
