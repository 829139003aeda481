"""`sample_negatives`: the public function. It validates its arguments and chooses the backend."""

import torch

from grank_kernels.backends.problems import SampleNegativesProblem
from grank_kernels.common.arrays import Array
from grank_kernels.common.checks import check_int, check_number
from grank_kernels.ops.dispatch import choose
from grank_kernels.ops.requests import ExcludeByWindow, corpus_operands
from grank_kernels.ops.sample_negatives import draw


def sample_negatives(
    users: Array,
    items: Array,
    m: int,
    *,
    exclude: ExcludeByWindow | None = None,
    scale: float = 1.0,
    seed: int,
    backend: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """M items a row, drawn without repetition from `softmax(scale * users @ items.T)`: no (R, N) matrix in memory.

    Gumbel top-k: the m largest of the logits plus noise that is a function of (seed, row, item) alone. So a draw does
    not depend on the backend, the number of threads or the other rows, up to ties within the rounding of logits.

    Every tensor may also be a NumPy array or an object with `__dlpack__`. The result has no gradient.

    Args:
        users: (R, d) float32, float16 or bfloat16.
        items: (N, d), users' dtype.
        m: 1 or more.
        exclude: ids not to draw, as in `corpus_cross_entropy`.
        scale: factor of the inner products.
        seed: in [0, 2^63). The same seed draws the same items: pass another one every step.
        backend: None for the first that can run, or a name in `show_config()`: a named backend runs or raises.

    Returns:
        `ids` (R, m) int64, in the order of the draw; -1 where fewer than m items are eligible. `log_q` (R, m) float32:
        the logarithm of each item's probability under the softmax over the eligible items; -inf for id -1.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: a wrong dtype, shape, device, id or backend. On a GPU excluded ids out of range are ignored.

    Source: Kool, van Hoof and Welling, "Stochastic beams and where to find them" (arXiv 1903.06059).
    """
    users, items, excluded = corpus_operands(users, items, exclude)
    m, seed = check_int("m", m, 1), check_int("seed", seed, 0)
    if seed >= 1 << 63:
        raise ValueError(f"seed must be below 2^63, got {seed}")
    check_number("scale", scale)
    chosen = choose("sample_negatives", backend, users, items)
    return draw(SampleNegativesProblem(users.detach(), items.detach(), m, *excluded, float(scale), seed), chosen)
