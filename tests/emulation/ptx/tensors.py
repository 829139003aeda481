"""Simulated device memory that mirrors torch tensors."""

from types import ModuleType
from typing import Any

import numpy as np
import torch

from .memory import GLOBAL_BASE, POISON, Buffer, GlobalMemory


class TensorMemory(GlobalMemory):
    """Copies the storages of a launch's tensors to the device before it, and back after it.

    Host code may use the tensors between launches. `self.torch` replaces `torch` in a launcher: what it allocates is
    uninitialised device memory, and a kernel that reads it before a write is reported.
    """

    def __init__(self) -> None:
        super().__init__()
        self.storages: dict[int, Buffer] = {}  # by address of the storage
        self.alive: list[torch.Tensor] = []  # keeps addresses unique
        self.fresh: set[int] = set()
        self.torch = AllocatingTorch(self)

    def allocate(self, tensor: torch.Tensor) -> torch.Tensor:
        """Registers an uninitialised tensor as device memory."""
        storage_of(tensor)[:] = POISON
        self.fresh.add(tensor.untyped_storage().data_ptr())
        self.alive.append(tensor)
        return tensor

    def upload(self, name: str, tensor: torch.Tensor | None) -> int:
        """The tensor's address on the device; 0 for None and for empty tensors."""
        if tensor is None or tensor.numel() == 0:
            return 0
        host, at = storage_of(tensor), tensor.untyped_storage().data_ptr()
        if at not in self.storages:
            self.alive.append(tensor)
            self.empty(f"{name}@{at:x}", host.shape, np.uint8)
            buffer = self.storages[at] = self.buffers[-1]
            self.written[buffer.offset : buffer.end] = at not in self.fresh
        part = slice(self.storages[at].offset, self.storages[at].end)
        self.written[part] |= self.data[part] != host
        self.data[part] = host
        return GLOBAL_BASE + part.start + tensor.storage_offset() * tensor.element_size()

    def download(self, tensors: list[torch.Tensor]) -> None:
        for tensor in tensors:
            if tensor.numel():
                storage_of(tensor)[:] = self._held(tensor)

    def content(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor's values on the device."""
        held = torch.from_numpy(self._held(tensor).copy()).view(tensor.dtype)
        return held.as_strided(tensor.size(), tensor.stride(), tensor.storage_offset())

    def _held(self, tensor: torch.Tensor) -> np.ndarray:
        buffer = self.storages[tensor.untyped_storage().data_ptr()]
        return self.data[buffer.offset : buffer.end]


class AllocatingTorch(ModuleType):
    """torch with `empty` and `empty_like` that allocate on the simulated device."""

    def __init__(self, memory: TensorMemory) -> None:
        super().__init__("torch")
        self.empty = lambda *shape, **options: memory.allocate(torch.empty(*shape, **options))
        self.empty_like = lambda tensor: memory.allocate(torch.empty_like(tensor))

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


def storage_of(tensor: torch.Tensor) -> np.ndarray:
    """The whole storage as a uint8 view."""
    return torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage()).numpy()
