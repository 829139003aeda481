"""Files in memory, and reading ahead in them."""

import math
import mmap
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import BinaryIO, TypeVar

import numpy as np
import torch

Part = TypeVar("Part")
_AHEAD = 8  # parts of 16 MB: disks answer faster when they are asked for much at once


class Mapping:
    """A file in memory, read-only: the pages are the system's, which takes them back when it needs the room."""

    def __init__(self, file: BinaryIO):
        self._memory = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ, flags=mmap.MAP_SHARED)
        self._address = np.frombuffer(self._memory, np.uint8).ctypes.data

    def tensor(self, dtype: torch.dtype, shape: tuple[int, ...], offset: int) -> torch.Tensor:
        """A tensor that stands in the file at an offset. It must not be written to: the process would be killed."""
        count = math.prod(shape)
        if count == 0:
            return torch.empty(shape, dtype=dtype, device="cpu")
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The given buffer is not writable", UserWarning)
            return torch.frombuffer(self._memory, dtype=dtype, count=count, offset=offset).view(shape)

    def read_ahead(self, x: torch.Tensor) -> None:
        """Asks the system for the pages of a tensor of this file, and does not wait for them."""
        begin = x.data_ptr() - self._address
        page = begin - begin % mmap.PAGESIZE
        if x.nbytes > 0:
            self._memory.madvise(mmap.MADV_WILLNEED, page, begin + x.nbytes - page)


def streamed(parts: Iterable[Part], read_ahead: Callable[[Part], None]) -> Iterator[Part]:
    """Parts in their order, of which the next `_AHEAD` have been asked for, by a thread of its own: to ask takes the
    system as long as to hand over pages that it has.
    """
    waiting: deque[tuple[Part, Future[None]]] = deque()
    with ThreadPoolExecutor(1) as reader:
        for part in parts:
            waiting.append((part, reader.submit(read_ahead, part)))
            if len(waiting) > _AHEAD:
                yield _asked(*waiting.popleft())
        while waiting:
            yield _asked(*waiting.popleft())


def _asked(part: Part, asking: "Future[None]") -> Part:
    asking.result()
    return part
