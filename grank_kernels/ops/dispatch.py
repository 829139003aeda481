"""What every op does alike: choose a backend, and skip torch's dispatcher where nobody could tell."""

import torch
from torch.autograd import forward_ad
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from grank_kernels.backends import BACKENDS

_PLAIN = (torch.Tensor, torch.nn.Parameter)
_tracing_state = torch._C._get_tracing_state
_functorch_level = torch._C._functorch.maybe_current_level


def choose(op: str, backend: str | None, *tensors: torch.Tensor) -> str:
    """The first backend that can run `op` for these tensors, or the named one.

    Raises:
        ValueError: the named backend is unknown or cannot run; the message says why.
    """
    if backend is None:
        for name in BACKENDS:
            if supports(op, name, *tensors):
                return name
    if backend not in BACKENDS:
        raise ValueError(f"backend is {backend!r}; it takes None or one of {', '.join(map(repr, BACKENDS))}")
    reason = _unsupported(op, backend, tensors)
    if reason is not None:
        raise ValueError(f"backend {backend!r} cannot run: {reason}")
    return backend


def supports(op: str, backend: str, *tensors: torch.Tensor) -> bool:
    """Whether a backend can run `op` for these tensors."""
    return _unsupported(op, backend, tensors) is None


def _unsupported(op: str, backend: str, tensors: tuple[torch.Tensor, ...]) -> str | None:
    """Why a backend cannot run `op` for these tensors; not every backend has every op."""
    module = BACKENDS[backend]
    if not hasattr(module, op):
        return f"it has no {op}"
    reason: str | None = getattr(module, op + "_unsupported")(*tensors)
    return reason


def is_plain(*tensors: torch.Tensor) -> bool:
    """True where a call through torch's dispatcher would do nothing but call the backend.

    That is: no compiling or tracing, no dispatch mode, no functional transform, no tensor subclass, no tensor without
    data or with a sign yet to be applied (`is_neg`), no gradient to be recorded. The dispatcher costs more than a
    search of a thousand items.
    """
    if torch.compiler.is_compiling() or is_in_torch_dispatch_mode() or _tracing_state() is not None:
        return False
    if forward_ad._current_level >= 0 or _functorch_level() is not None:
        return False
    grad = torch.is_grad_enabled()
    for x in tensors:  # noqa: SIM110  any() takes twice as long, of a call that takes 15 microseconds
        if type(x) not in _PLAIN or x.is_meta or x.is_neg() or (grad and x.requires_grad):
            return False
    return True
