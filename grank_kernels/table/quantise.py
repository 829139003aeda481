"""Symmetric int8 quantisation by row, the one definition of it in Python, and how far it can be from the truth.

An int8 copy of float rows is *certified*: of every row it keeps how far any score can be off. Notation: a query q and a
row x, as they are searched, and their float score s, summed in any order; two matrices A and B with B^T A = I (the
identity, or what `basis_for` finds), y = A x and p = B q, and their int8 copies y~ = scale * y8, p~ = query_scale * p8.
In real numbers

    q.x = p.y = p~.y~ + p.(y - y~) + (p - p~).y~ ,     hence by Cauchy-Schwarz
    |q.x - p~.y~| <= |p| |y - y~| + |p - p~| |y~|

and s is off from q.x by at most g |q| |x|, g = (d + 16) 2^-22: d + d / 128 + 2 roundings of 2^-24 a term, or of 2^-23
where a machine truncates, and as much again for what float64 rounds: B^T A differs from I by less than 2^-30. With
W = 1 / 150 and w = max(|x|, |y~|) a row needs one number, and a query one:

    error  = |y - y~| + W w                                        `certify`, of the row alone
    radius = max(|p|, (|p - p~| + g |q|) / W)                      `certify_queries`, of the query alone
    |s - query_scale * scale * p8.y8| <= radius * error

W is what |p - p~| / |p| is for Gaussian queries of 128 numbers; there radius is |p|. What else is rounded to float32 is
p, the coarse score, its sum with a bound and their comparison: ten times at most, by 2^-24 of |p| |y|, which is 2^-13.4
of radius * error in all, for which `SLACK` is put on the radius. Underflow takes at most 2^-126 a step, and 2^-126 of a
number where subnormals are flushed: norms below `LEAST` count as that much, and the slack alone is then above
2^-70 |q|. Overflow is impossible below `MOST`, as A and B change a norm by less than 2^11. Rows outside have numbers 0
and keep their norm as their error, or infinity; queries outside, whose radius is NaN, are left to the exact scan.
"""

import math
from typing import NamedTuple

import torch

WEIGHT = 1 / 150
SLACK = 1 + 2.0**-13
LEAST, MOST = 2.0**-40, 2.0**50  # of a norm
_MOST_BASIS_WIDTH = 1024  # a basis takes d^2 multiplications a row
_SAMPLE = 4096  # rows
_LEAST_VARIANCE = 2.0**-20  # of a direction beside the largest, so that A and B change a norm by less than 2^11
_GAIN = 0.75


class Coarse(NamedTuple):
    """The certified int8 copy of a table's rows."""

    rows: torch.Tensor  # (N, d) int8
    scale: torch.Tensor  # (N,) float32
    error: torch.Tensor  # (N,) float32
    basis: torch.Tensor | None  # (2, d, d) float64: A, by which rows are multiplied before, and B, for queries; None: I


def quantise(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Int8 numbers and one scale a row: `x` is about `scale[:, None] * numbers`.

    `scale = max|x| / 127`, `numbers = round_half_even(x / scale)`. A row of zeros, or one with an infinity or NaN,
    has numbers 0 and the scale 0, infinity or NaN: its products with finite numbers are 0 or NaN.

    Args:
        x: (n, d) float32.

    Returns:
        numbers (n, d) int8 in [-127, 127], scale (n,) float32.
    """
    scale = x.abs().amax(1) / 127 if x.shape[1] else x.new_zeros(len(x))
    numbers = (x / scale[:, None]).round().clamp(-127, 127).nan_to_num(0)
    return numbers.to(torch.int8), scale


def certify(rows: torch.Tensor, basis: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The int8 copy of some rows and its errors, row by row: a row's result depends on that row and the basis alone.

    Args:
        rows: (n, d) in the precision that they are searched in.
        basis: (2, d, d) float64, of `basis_for`.

    Returns:
        numbers (n, d) int8, scale (n,) float32, error (n,) float32, rounded up; infinity for a row with an infinity or
        NaN, or with a norm above `MOST`.
    """
    x = rows.double()
    norm = x.norm(dim=1)
    y = x if basis is None else x @ basis[0].T
    searched = (norm >= LEAST) & (norm <= MOST)
    numbers, scale = quantise(y.float().where(searched[:, None], 0.0))
    copy = numbers * scale.double()[:, None]
    off = torch.where(searched, (y - copy).norm(dim=1), norm)
    error = (off + WEIGHT * torch.maximum(norm, copy.norm(dim=1)).clamp(min=LEAST)) * (1 + 2.0**-20)
    error = error.float().where(norm <= MOST, torch.inf)  # 2^-20 is more than this rounding and those before
    return numbers, scale, error


def certify_queries(
    queries: torch.Tensor, basis: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The int8 copies of some queries and their radii.

    Args:
        queries: (B, d) float32, float16 or bfloat16.
        basis: (2, d, d) float64, the table's.

    Returns:
        numbers (B, d) int8, scale (B,) float32, radius (B,) float32; NaN for a query to which the bound does not apply:
        one of zeros, with an infinity or NaN, or with a norm outside [`LEAST`, `MOST`].
    """
    norm = queries.double().norm(dim=1)
    turned = in_basis(queries, basis)
    p = turned.double()
    numbers, scale = quantise(turned)
    off = (p - numbers * scale.double()[:, None]).norm(dim=1)
    rounding = (queries.shape[1] + 16) * 2.0**-22
    radius = torch.maximum(p.norm(dim=1), (off + rounding * norm) / WEIGHT) * SLACK
    return numbers, scale, radius.float().where((norm >= LEAST) & (norm <= MOST), torch.nan)


def in_basis(queries: torch.Tensor, basis: torch.Tensor | None) -> torch.Tensor:
    """Queries (B, d) as the int8 copy meets them, float32."""
    return queries.float() if basis is None else (queries.double() @ basis[1].T).float()


def basis_for(rows: torch.Tensor) -> torch.Tensor | None:
    """A basis in which the bound is tighter by a quarter, as random queries meet a sample of these rows; else None.

    Where few directions hold most of the rows' length, they set the scale, and the others, which may be what a query
    asks for, are left few bits. A makes all directions of equal variance and then turns them at random, so that no
    number of a row or of a query stands out.

    Args:
        rows: (N, d).

    Returns:
        (2, d, d) float64, or None.
    """
    d = rows.shape[1]
    x = rows[:: max(1, math.ceil(len(rows) / _SAMPLE))].double()
    norm = x.norm(dim=1)
    x = x[(norm >= LEAST) & (norm <= MOST)]
    if not 1 < d <= min(_MOST_BASIS_WIDTH, len(x) // 2):
        return None
    x /= x.norm(dim=1, keepdim=True)  # of a few long rows nothing follows for the rest
    variance, directions = torch.linalg.eigh(x.T @ x / len(x))
    deviation = variance.clamp(min=_LEAST_VARIANCE * float(variance[-1])).sqrt()
    random = torch.randn(2, d, d, dtype=torch.float64, generator=torch.Generator().manual_seed(d)).to(x.device)
    turn, size = torch.linalg.qr(random[0]).Q, d**-0.5  # the root mean square of a number of x
    basis = torch.stack([turn * (size / deviation) @ directions.T, turn * (deviation / size) @ directions.T])
    spread = (random[1] @ x.T).square().mean(1).sqrt()
    width = [
        float((certify_queries(random[1], each)[2] / spread).mean() * certify(x, each)[2].double().mean())
        for each in (None, basis)
    ]
    return basis if width[1] < _GAIN * width[0] else None
