"""Symmetric int8 quantisation by row, the only definition in Python, with bounds of its error.

An int8 copy of float rows is *certified* if it has a bound, for every row, of the error of any score. Notation: a query
q and a row x in the precision that is searched, and their float score s, summed in any order; two matrices A and B with
B^T A = I (the identity, or the basis of `basis_for`), y = A x and p = B q, and their int8 copies y~ = scale * y8 and
p~ = query_scale * p8. In real numbers

    q.x = p.y = p~.y~ + p.(y - y~) + (p - p~).y~ ,     hence by Cauchy-Schwarz
    |q.x - p~.y~| <= |p| |y - y~| + |p - p~| |y~|

and s differs from q.x by at most g |q| |x|, g = (d + 16) 2^-22: d + d / 128 + 2 roundings of 2^-24 a term, or of 2^-23
on machines that truncate, and as much again for the roundings in float64: B^T A differs from I by less than 2^-30. With
W = 1 / 150 and w = max(|x|, |y~|) a row needs one number, and a query another:

    error  = |y - y~| + W w                                        `certify`, of the row alone
    radius = max(|p|, (|p - p~| + g |q|) / W)                      `certify_queries`, of the query alone
    |s - query_scale * scale * p8.y8| <= radius * error

W is |p - p~| / |p| of Gaussian queries of 128 numbers, whose radius is then |p|. Other roundings to float32 are those
of p, the coarse score, its sum with a bound and their comparison: at most ten of 2^-24 |p| |y|, in all 2^-13.4 of
radius * error. The factor `SLACK` of the radius covers them. Underflow loses at most 2^-126 a step, and 2^-126 of a
number where subnormals are flushed: smaller norms count as `LEAST`, and the slack alone is then above 2^-70 |q|.
Overflow is impossible for norms below `MOST`, since A and B change a norm by less than 2^11. Rows outside these limits
have the numbers 0, and their norm or infinity as error; queries outside have the radius NaN, and are left to the exact
scan.
"""

import math
from typing import NamedTuple

import torch

WEIGHT = 1 / 150
SLACK = 1 + 2.0**-13
LEAST, MOST = 2.0**-40, 2.0**50  # of a norm
_MOST_BASIS_WIDTH = 1024  # a basis costs d^2 multiplications a row
_SAMPLE = 4096  # rows
_LEAST_VARIANCE = 2.0**-20  # of a direction, relative to the largest: A and B change a norm by less than 2^11
_GAIN = 0.75


class Coarse(NamedTuple):
    """The certified int8 copy of a table's rows."""

    rows: torch.Tensor  # (N, d) int8
    scale: torch.Tensor  # (N,) float32
    error: torch.Tensor  # (N,) float32
    basis: torch.Tensor | None  # (2, d, d) float64: A, which multiplies rows, and B, which multiplies queries; None: I


def quantise(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Int8 numbers and one scale a row: `x` is approximately `scale[:, None] * numbers`.

    `scale = max|x| / 127`, `numbers = round_half_even(x / scale)`. A row of zeros, or with an infinity or NaN, has the
    numbers 0 and the scale 0, infinity or NaN: its products with finite numbers are 0 or NaN.

    Args:
        x: (n, d) float32.

    Returns:
        numbers (n, d) int8 in [-127, 127], scale (n,) float32.
    """
    scale = x.abs().amax(1) / 127 if x.shape[1] else x.new_zeros(len(x))
    numbers = (x / scale[:, None]).round().clamp(-127, 127).nan_to_num(0)
    return numbers.to(torch.int8), scale


def certify(rows: torch.Tensor, basis: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The int8 copy of rows and its error bounds; the result of a row depends on that row and the basis alone.

    Args:
        rows: (n, d) in the precision that is searched.
        basis: (2, d, d) float64, from `basis_for`.

    Returns:
        numbers (n, d) int8, scale (n,) float32, error (n,) float32, rounded up; infinity for rows with an infinity or
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
    error = error.float().where(norm <= MOST, torch.inf)  # 2^-20 exceeds this rounding and those before
    return numbers, scale, error


def certify_queries(
    queries: torch.Tensor, basis: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The int8 copies of queries and their radii.

    Args:
        queries: (B, d) float32, float16 or bfloat16.
        basis: (2, d, d) float64, of the table.

    Returns:
        numbers (B, d) int8, scale (B,) float32, radius (B,) float32; NaN for queries to which the bound does not apply:
        zeros, an infinity or NaN, or a norm outside [`LEAST`, `MOST`].
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
    """Queries (B, d) in the basis of the int8 copy, float32."""
    return queries.float() if basis is None else (queries.double() @ basis[1].T).float()


def basis_for(rows: torch.Tensor) -> torch.Tensor | None:
    """A basis in which the bound is tighter by a quarter, for random queries and a sample of the rows; else None.

    If few directions have most of the rows' variance, they determine the scale, and few bits are left for the others,
    which a query may depend on. A gives all directions equal variance and rotates them at random, so that no number of
    a row or query is much larger than the others.

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
    x /= x.norm(dim=1, keepdim=True)  # a few long rows must not determine the basis
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
