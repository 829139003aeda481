"""Symmetric int8 quantisation by row, the one definition of it in Python."""

import torch


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
