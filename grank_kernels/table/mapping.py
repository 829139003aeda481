"""Memory-mapped files, and a prefetcher that reads ahead in them."""

import errno
import itertools
import math
import mmap
import os
import threading
import warnings
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from queue import SimpleQueue
from typing import Any, BinaryIO, TypeVar

import numpy as np
import torch

Part = TypeVar("Part")
_AHEAD = 2  # parts of 64 MB in flight: disks are faster with a deep queue


class Mapping:
    """A read-only mapping of a file: the system holds its pages, and drops them when memory is short."""

    def __init__(self, file: BinaryIO, path: str):
        """Maps an open file; `path` is for messages.

        Raises:
            OSError: the file system cannot map files, or there is no address space.
        """
        try:
            self._memory = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ, flags=mmap.MAP_SHARED)
        except OSError as error:
            fix = ": load it with mmap=False and without part" if error.errno == errno.ENODEV else ""
            raise OSError(error.errno, f"cannot map the file into memory ({error.strerror}){fix}", path) from None
        self._address = np.frombuffer(self._memory, np.uint8).ctypes.data
        self._path, self._file = path, os.dup(file.fileno())
        weakref.finalize(self, os.close, self._file)
        self._stamp = self._size_and_time()

    def check_unchanged(self) -> None:
        """That the file still has the size and modification time of when it was mapped.

        Raises:
            ValueError: it was written to or truncated in place, so that its checksums are those of other data.
        """
        if self._size_and_time() != self._stamp:
            raise ValueError(
                f"{self._path} was changed in place while it was mapped: load it again; `save` replaces files safely"
            )

    def _size_and_time(self) -> tuple[int, int]:
        status = os.fstat(self._file)
        return status.st_size, status.st_mtime_ns

    def tensor(self, dtype: torch.dtype, shape: tuple[int, ...], offset: int) -> torch.Tensor:
        """A tensor over the bytes at an offset; writing to it would end the process with SIGSEGV."""
        count = math.prod(shape)
        if count == 0:
            return torch.empty(shape, dtype=dtype, device="cpu")
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The given buffer is not writable", UserWarning)
            return torch.frombuffer(self._memory, dtype=dtype, count=count, offset=offset).view(shape)

    def read_ahead(self, x: torch.Tensor) -> None:
        """Starts reading the pages of a tensor of this file, without waiting for them."""
        begin = x.data_ptr() - self._address
        page = begin - begin % mmap.PAGESIZE
        if x.nbytes > 0:
            self._memory.madvise(mmap.MADV_WILLNEED, page, begin + x.nbytes - page)


def streamed(parts: Iterable[Part], read_ahead: Callable[[Part], None]) -> Iterator[Part]:
    """The parts in order, with `read_ahead` called for up to `_AHEAD` parts before they are needed.

    The calls are made by the prefetcher: for pages in memory a call takes as long as reading them. For a single part
    there is nothing to overlap, and the call is made here.
    """
    parts = iter(parts)
    first = list(itertools.islice(parts, 2))
    if len(first) == 1:
        read_ahead(first[0])
        yield first[0]
        return
    waiting: deque[tuple[Part, Future[None]]] = deque()
    for part in itertools.chain(first, parts):
        waiting.append((part, _prefetcher.submit(read_ahead, part)))
        if len(waiting) > _AHEAD:
            yield _requested(*waiting.popleft())
    while waiting:
        yield _requested(*waiting.popleft())


def _requested(part: Part, request: "Future[None]") -> Part:
    request.result()
    return part


class _Prefetcher:
    """One daemon thread of a process, started by the first request, which makes calls in order.

    An executor of concurrent.futures takes no more work once the main thread has ended, while other threads may go on.
    """

    def __init__(self) -> None:
        self._requests: SimpleQueue[tuple[Future[None], Callable[[Any], None], Any]] = SimpleQueue()
        self._starting = threading.Lock()
        self._thread: threading.Thread | None = None

    def submit(self, call: Callable[[Any], None], argument: Any) -> "Future[None]":
        request: Future[None] = Future()
        if self._started():
            self._requests.put((request, call, argument))
        else:
            _answer(request, call, argument)
        return request

    def _started(self) -> bool:
        """False where threads cannot be started: the interpreter is ending, or a limit is reached."""
        with self._starting:
            if self._thread is None:
                thread = threading.Thread(target=self._run, name="grank_kernels prefetcher", daemon=True)
                try:
                    thread.start()
                except RuntimeError:
                    return False
                self._thread = thread
        return True

    def _run(self) -> None:
        while True:
            _answer(*self._requests.get())


def _answer(request: "Future[None]", call: Callable[[Any], None], argument: Any) -> None:
    try:
        call(argument)
    except BaseException as error:  # for the thread that waits
        request.set_exception(error)
    else:
        request.set_result(None)


_prefetcher = _Prefetcher()


def _after_fork() -> None:
    global _prefetcher
    _prefetcher = _Prefetcher()  # a child has no threads but the one that forked


os.register_at_fork(after_in_child=_after_fork)
