"""Backend selection, and a fast path that bypasses torch's dispatcher where no mode, transform or gradient needs it."""

import torch
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from grank_kernels.backends import BACKENDS
from grank_kernels.common.checks import one_of
from grank_kernels.ops.transforms import in_transform

_PLAIN = (torch.Tensor, torch.nn.Parameter)
_tracing_state = torch._C._get_tracing_state


def choose(op: str, backend: str | None, *tensors: torch.Tensor | None) -> str:
    """The first backend that can run `op` for these tensors, or the named one.

    Raises:
        ValueError: the named backend is unknown or cannot run; the message says why.
    """
    if backend is None:
        for name in BACKENDS:
            if supports(op, name, *tensors):
                return name
    if not isinstance(backend, str) or backend not in BACKENDS:
        raise ValueError(f"backend must be {one_of([None, *map(repr, BACKENDS)])}, got {backend!r}")
    reason = _unsupported(op, backend, tensors)
    if reason is not None:
        raise ValueError(f"backend {backend!r} cannot run: {reason}")
    return backend


def supports(op: str, backend: str, *tensors: torch.Tensor | None) -> bool:
    """Whether a backend can run `op` for these tensors."""
    return _unsupported(op, backend, tensors) is None


def _unsupported(op: str, backend: str, tensors: tuple[torch.Tensor | None, ...]) -> str | None:
    """Why a backend cannot run `op` for these tensors; not every backend has every op."""
    module = BACKENDS[backend]
    if not hasattr(module, op):
        return f"it has no {op}"
    reason: str | None = getattr(module, op + "_unsupported")(*tensors)
    return reason


def is_plain(*tensors: torch.Tensor) -> bool:
    """Whether torch's dispatcher would only call the backend: its overhead exceeds a search of a thousand items.

    True without compilation, tracing, dispatch mode, `torch.func` transform, forward-mode differentiation, tensor
    subclass, meta tensor, negative view (`is_neg`) and gradient to record.
    """
    if torch.compiler.is_compiling() or is_in_torch_dispatch_mode() or _tracing_state() is not None:
        return False
    if in_transform():
        return False
    grad = torch.is_grad_enabled()
    for x in tensors:  # noqa: SIM110  any() takes twice as long, in a call of 15 microseconds
        if type(x) not in _PLAIN or x.is_meta or x.is_neg() or (grad and x.requires_grad):
            return False
    return True
