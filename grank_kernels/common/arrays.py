"""What other libraries keep in memory, as tensors without a copy."""

from typing import Any, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt
import torch


class SupportsDLPack(Protocol):
    """An array of any library that hands out its memory: JAX, CuPy, ..."""

    def __dlpack__(self, *, stream: Any = None) -> Any:
        """A capsule of the memory."""

    def __dlpack_device__(self) -> tuple[Any, int]:
        """Type and number of the device."""


Array: TypeAlias = torch.Tensor | npt.NDArray[Any] | SupportsDLPack
"""A tensor, or what becomes one without a copy."""


class _Writable:
    """A NumPy array that says that it may be written to: torch warns of others, and nothing here writes to them."""

    def __init__(self, x: npt.NDArray[Any]):
        self._kept = x
        interface = x.__array_interface__
        self.__array_interface__ = {**interface, "data": (interface["data"][0], False)}


def as_tensor(name: str, x: Any) -> Any:
    """A tensor over the memory of an array; what is neither is left to the checks of tensors.

    Raises:
        TypeError: a NumPy array of a type that torch has not; the message names the argument.
        ValueError: a NumPy array that runs backwards, or of the other byte order.
    """
    if isinstance(x, torch.Tensor):
        return x
    if isinstance(x, np.ndarray):
        try:
            return torch.from_numpy(x if x.flags.writeable else np.asarray(_Writable(x)))
        except (TypeError, ValueError) as error:
            raise type(error)(f"{name}: {error}") from None
    return torch.utils.dlpack.from_dlpack(x) if hasattr(x, "__dlpack__") else x
