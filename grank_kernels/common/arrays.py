"""Arrays of other libraries as tensors without a copy, and the kinds of tensors that an op can read."""

from typing import Any, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch._subclasses import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.nn.parameter import UninitializedTensorMixin  # type: ignore[attr-defined]


class SupportsDLPack(Protocol):
    """An array of any library that exports its memory by DLPack: JAX, CuPy, ..."""

    def __dlpack__(self, *, stream: Any = None) -> Any:
        """A DLPack capsule of the memory."""

    def __dlpack_device__(self) -> tuple[Any, int]:
        """DLPack device type and device index."""


Array: TypeAlias = torch.Tensor | npt.NDArray[Any] | SupportsDLPack
"""A tensor, or an array that shares its memory with one."""

_PLAIN = (torch.Tensor, torch.nn.Parameter)
_TRACED = (FakeTensor, FunctionalTensor)  # tensors of torch.compile and torch.export: the op's fake kernel takes them
_no_dispatch = torch._C._disabled_torch_dispatch_impl
_functorch_level = torch._C._functorch.maybe_current_level


class _Writable:
    """A read-only NumPy array declared writable: torch warns of read-only ones, and nothing here writes to them."""

    def __init__(self, x: npt.NDArray[Any]):
        self._kept = x
        interface = x.__array_interface__
        self.__array_interface__ = {**interface, "data": (interface["data"][0], False)}


def as_tensor(name: str, x: Any) -> Any:
    """A tensor over the memory of an array or tensor; anything else is returned as it is.

    Raises:
        TypeError: a masked array, a NumPy dtype that torch lacks, or a tensor whose elements are not in strided memory
            of its own: sparse, nested, a subclass with its own operations (DTensor, ...). The message names the
            argument.
        ValueError: an array with negative strides or foreign byte order, or a tensor whose storage was freed.
    """
    if isinstance(x, torch.Tensor):
        return x if torch.compiler.is_compiling() else readable(name, x)
    try:
        if isinstance(x, np.ndarray):
            if isinstance(x, np.ma.MaskedArray):
                raise TypeError("a masked array would lose its mask: call .filled() or .compressed()")
            return torch.from_numpy(x if x.flags.writeable else np.asarray(_Writable(x)))
        return torch.utils.dlpack.from_dlpack(x) if hasattr(x, "__dlpack__") else x
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    except (TypeError, RuntimeError, BufferError) as error:  # RuntimeError, BufferError: of DLPack
        raise TypeError(f"{name}: {error}") from None


def readable(name: str, x: torch.Tensor) -> torch.Tensor:
    """The tensor, if its elements are in strided memory of its own; without its negative bit, as a plain tensor.

    Tensors of a trace, of `torch.func` and on the meta device have no memory, and are returned as they are.
    """
    if type(x) not in _PLAIN:
        if isinstance(x, _TRACED):
            return x
        x = _without_subclass(name, x)
    if x.is_nested:
        raise TypeError(f"{name} must be a strided tensor, got a nested one: to_padded_tensor() converts")
    if x.layout != torch.strided:
        raise TypeError(f"{name} must be a strided tensor, got layout {x.layout}: to_dense() converts")
    if (x.is_cpu or x.is_cuda) and _functorch_level() is None:
        size, needed = x.untyped_storage().nbytes(), x.nbytes if x.is_contiguous() else _extent(x)
        if size < needed + x.storage_offset() * x.itemsize and needed:
            raise ValueError(f"{name} must have {needed} bytes of storage, got {size}: it was freed or shrunk")
        if x.is_neg():
            return x.resolve_neg()
    return x


def _extent(x: torch.Tensor) -> int:
    """Bytes from the first element to the end of the last one."""
    last = sum((n - 1) * stride for n, stride in zip(x.shape, x.stride(), strict=True))
    return (last + 1) * x.itemsize if x.numel() else 0


def _without_subclass(name: str, x: torch.Tensor) -> torch.Tensor:
    """A subclass that only adds attributes or functions as the plain tensor that it is."""
    kind = type(x)
    if isinstance(x, UninitializedTensorMixin):
        raise ValueError(f"{name} must be a tensor, got {kind.__name__}: run its module once to initialise it")
    if kind.__torch_dispatch__ is not _no_dispatch:  # its memory, if it has any, is not its value
        fix = ": full_tensor() converts" if hasattr(x, "full_tensor") else ""
        raise TypeError(f"{name} must be a plain tensor, got {kind.__name__}, a subclass with its own operations{fix}")
    with torch._C.DisableTorchFunctionSubclass():
        return x.as_subclass(torch.Tensor)
