"""Symmetric int8 quantisation by row, the one definition of it in Python, and how far it can be from the truth.

An int8 copy of float rows is *certified*: of every row it keeps how far any score can be off. Notation: a query q and a
row x, as they are searched, and their float score s, summed in any order; an orthogonal matrix R (the identity, or
`rotation_for`), p = R q and y = R x, their int8 copies p~ = query_scale * p8 and y~ = scale * y8. In real numbers

    q.x = p.y = p~.y~ + p.(y - y~) + (p - p~).y~ ,     hence by Cauchy-Schwarz
    |q.x - p~.y~| <= |q| |y - y~| + |p - p~| |y~|

and s is off from q.x by at most g |q| |x|, g = (d + 16) 2^-22: d + d / 128 + 2 roundings of 2^-24 a term, or of 2^-23
where a machine truncates, and as much again for what else is rounded to float32: R q, and the coarse score itself
(int32 to float, and two products). With W = 1 / 150 and w = max(|x|, |y~|) a row needs one number, and a query one:

    error  = |y - y~| + W w                                        `certify`, of the row alone
    radius = max(|q|, (|p - p~| + g |q|) / W)                      `certify_queries`, of the query alone
    |s - query_scale * scale * p8.y8| <= radius * error

W is what |p - p~| / |q| is for Gaussian queries of 128 numbers; there radius is |q|. Sums of a bound and a score, and
their comparison, are rounded in float32, by a few times 2^-24 (1 + 1 / W) of radius * error, for which `SLACK` is put
on the radius. Underflow takes at most 2^-126 a step, and 2^-126 of a number where subnormals are flushed: norms below
`LEAST` count as that much, and the slack alone is then above 2^-60 |q|. Overflow is impossible below `MOST`.
Rows outside have numbers 0 and keep their norm as their error, or infinity; queries outside, whose radius is NaN, are
left to the exact scan.
"""

import math
from typing import NamedTuple

import torch

WEIGHT = 1 / 150
SLACK = 1 + 2.0**-13
LEAST, MOST = 2.0**-40, 2.0**60  # of a norm
_ROTATED_WIDTHS = range(8, 1025)  # the matrix grows with the square of the width
_ROTATION_GAIN = 0.75


class Coarse(NamedTuple):
    """The certified int8 copy of a table's rows."""

    rows: torch.Tensor  # (N, d) int8
    scale: torch.Tensor  # (N,) float32
    error: torch.Tensor  # (N,) float32
    rotation: torch.Tensor | None  # (d, d) float64, by which rows and queries are multiplied before; None: the identity


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


def certify(
    rows: torch.Tensor, rotation: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The int8 copy of some rows and its errors, row by row: a row's result depends on that row and the rotation alone.

    Args:
        rows: (n, d) in the precision that they are searched in.
        rotation: (d, d) float64, of `rotation_for`.

    Returns:
        numbers (n, d) int8, scale (n,) float32, error (n,) float32, rounded up; infinity for a row with an infinity or
        NaN, or with a norm above `MOST`.
    """
    x = rows.double()
    norm = x.norm(dim=1)
    y = x if rotation is None else x @ rotation.T
    searched = (norm >= LEAST) & (norm <= MOST)
    numbers, scale = quantise(y.float().where(searched[:, None], 0.0))
    copy = numbers * scale.double()[:, None]
    off = torch.where(searched, (y - copy).norm(dim=1), norm)
    error = (off + WEIGHT * torch.maximum(norm, copy.norm(dim=1)).clamp(min=LEAST)) * (1 + 2.0**-20)
    error = error.float().where(norm <= MOST, torch.inf)  # 2^-20 is more than this rounding and those before
    return numbers, scale, error


def certify_queries(
    queries: torch.Tensor, rotation: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The int8 copies of some queries and their radii.

    Args:
        queries: (B, d) float32, float16 or bfloat16.
        rotation: (d, d) float64, the table's.

    Returns:
        numbers (B, d) int8, scale (B,) float32, radius (B,) float32; NaN for a query to which the bound does not apply:
        one of zeros, with an infinity or NaN, or with a norm outside [`LEAST`, `MOST`].
    """
    q = queries.double()
    norm = q.norm(dim=1)
    p = rotate(queries, rotation).double()
    numbers, scale = quantise(p.float())
    off = (p - numbers * scale.double()[:, None]).norm(dim=1)
    rounding = (q.shape[1] + 16) * 2.0**-22
    radius = torch.maximum(norm, (off + rounding * norm) / WEIGHT) * SLACK
    return numbers, scale, radius.float().where((norm >= LEAST) & (norm <= MOST), torch.nan)


def rotate(queries: torch.Tensor, rotation: torch.Tensor | None) -> torch.Tensor:
    """Queries (B, d) as the int8 copy meets them, float32."""
    return queries.float() if rotation is None else (queries.double() @ rotation.T).float()


def rotation_for(rows: torch.Tensor) -> torch.Tensor | None:
    """A random orthogonal matrix where it makes the errors of these rows smaller by a quarter, else None.

    It spreads a few heavy columns, which set the scale of a row and leave the others few bits, over all columns.

    Args:
        rows: (N, d); a sample of them is looked at.

    Returns:
        (d, d) float64, always the same for a width, or None.
    """
    d = rows.shape[1]
    sample = rows[:: max(1, math.ceil(len(rows) / 4096))]
    plain = certify(sample)[2]
    if d not in _ROTATED_WIDTHS or not bool(plain.isfinite().any()):
        return None
    normal = torch.randn(d, d, dtype=torch.float64, generator=torch.Generator().manual_seed(d))
    rotation = torch.linalg.qr(normal).Q.to(rows.device)
    rotated = certify(sample, rotation)[2]
    counts = plain.isfinite()
    better = rotated[counts].double().sum() < _ROTATION_GAIN * plain[counts].double().sum()
    return rotation if bool(better) else None
