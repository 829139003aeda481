"""`corpus_cross_entropy`: the public function. It validates its arguments and chooses the backend."""

import torch

from grank_kernels.backends.problems import CorpusCrossEntropyProblem
from grank_kernels.common.arrays import Array
from grank_kernels.common.checks import FLOATS, check_device, check_number, check_operand
from grank_kernels.ops.corpus_cross_entropy import corpus_loss
from grank_kernels.ops.dispatch import choose
from grank_kernels.ops.requests import ExcludeByWindow, corpus_operands


def corpus_cross_entropy(
    users: Array,
    items: Array,
    targets: Array,
    *,
    exclude: ExcludeByWindow | None = None,
    bias: Array | None = None,
    scale: float = 1.0,
    backend: str | None = None,
) -> torch.Tensor:
    """Cross-entropy of each row's target under a softmax over all items: no (R, N) matrix in memory.

    `F.cross_entropy(scale * users @ items.T + bias, targets, reduction="none", ignore_index=-1)`, with excluded items
    left out of the softmax. The target is always eligible. Sums are float32.

    Differentiable once, in reverse mode, in users, items and bias, deterministically. It works under `torch.func.grad`,
    `vjp`, `jacrev` and `vmap`. Under autocast users and items are cast to its dtype, as for `users @ items.T`. NaN and
    infinity propagate as in torch.

    Every tensor may also be a NumPy array or an object with `__dlpack__`; the result is a tensor.

    Args:
        users: (R, d) float32, float16 or bfloat16.
        items: (N, d), users' dtype.
        targets: (R,) int64 in [-1, N); -1: loss 0 and no gradient.
        exclude: ids left out of the softmax: (R, E) int64 padded with -1; a pair (offsets (R + 1,), ids), row r's ids
            being `ids[offsets[r]:offsets[r + 1]]`; or, for lists that several rows share, (offsets (W + 1,), ids,
            windows (R,)), row r's list being number `windows[r]`. All int64.
        bias: (N,) float32, float16 or bfloat16, added to the logits of every row; or None.
        scale: factor of the inner products.
        backend: None for the first that can run, or a name in `show_config()`: a named backend runs or raises.

    Returns:
        (R,) float32.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: a wrong dtype, shape, device, target, id or backend. On a GPU targets and ids out of range are not
            noticed, since reading them would synchronise.
        NotImplementedError: forward-mode or second derivatives.

    Source: Cut Cross-Entropy (arXiv 2411.09009), for vocabularies of language models.
    """
    users, items, excluded = corpus_operands(users, items, exclude)
    (R, _), N = users.shape, items.shape[0]
    targets = check_operand("targets", targets, (torch.int64,), "(R,)", (R,))
    check_device("targets", targets, "users", users.device)
    if bias is not None:
        bias = check_operand("bias", bias, FLOATS, "(N,)", (N,)).float()
        check_device("bias", bias, "users", users.device)
    check_number("scale", scale)
    chosen = choose("corpus_cross_entropy", backend, users, items)
    return corpus_loss(CorpusCrossEntropyProblem(users, items, targets, *excluded, bias, float(scale)), chosen)
