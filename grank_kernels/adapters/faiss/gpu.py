"""FAISS's names for indexes on a GPU: the table is moved there."""

import copy
from typing import Any

import torch

from grank_kernels.adapters.faiss.errors import FaissError
from grank_kernels.adapters.faiss.flat import IndexFlatIP, IndexFlatL2
from grank_kernels.adapters.faiss.id_map import IndexIDMap
from grank_kernels.adapters.faiss.index import Index


class StandardGpuResources:
    """`faiss.StandardGpuResources()`: torch's allocator has the memory, so there is nothing to set."""


class GpuIndexFlatConfig:
    """`faiss.GpuIndexFlatConfig()`: the GPU of a `GpuIndexFlatIP` or `GpuIndexFlatL2`.

    Attributes:
        device: number of the GPU.
        useFloat16: whether rows are float16; inner product only.
    """

    def __init__(self) -> None:
        self.device = 0
        self.useFloat16 = False  # FAISS's name


def get_num_gpus() -> int:
    """Number of GPUs."""
    return torch.cuda.device_count()


def _gpu(device: int) -> torch.device:
    count = get_num_gpus()
    if not 0 <= device < count:
        fix = ": search on the CPU, or install a torch with CUDA on a machine with a GPU" if not count else ""
        raise FaissError(f"device must be one of {count} GPUs that torch sees, got {device}{fix}")
    return torch.device("cuda", device)


class GpuIndexFlatIP(IndexFlatIP):
    """`faiss.GpuIndexFlatIP(resources, d)`."""

    def __init__(self, provider: StandardGpuResources, d: int, config: GpuIndexFlatConfig | None = None) -> None:
        """An empty index on a GPU; FaissError without one."""
        config = config or GpuIndexFlatConfig()
        device = _gpu(config.device)
        super().__init__(d, dtype=torch.float16 if config.useFloat16 else torch.float32)
        _move(self, device)


class GpuIndexFlatL2(IndexFlatL2):
    """`faiss.GpuIndexFlatL2(resources, d)`."""

    def __init__(self, provider: StandardGpuResources, d: int, config: GpuIndexFlatConfig | None = None) -> None:
        """An empty index on a GPU; FaissError without one, and for float16."""
        config = config or GpuIndexFlatConfig()
        device = _gpu(config.device)
        if config.useFloat16:
            raise FaissError("useFloat16 must be False for L2, got True: GpuIndexFlatIP takes it")
        super().__init__(d)
        _move(self, device)


def index_cpu_to_gpu(provider: StandardGpuResources, device: int, index: Index, options: Any = None) -> Index:
    """A copy of an index on a GPU, of the same class.

    Raises:
        FaissError: torch does not see the GPU, or options are not None.
    """
    if options is not None:
        raise FaissError(f"options must be None, got {type(options).__name__}: rows keep the precision of the index")
    moved = copy.copy(index)
    where = _gpu(device)
    return _copy_on(moved, where)


def index_cpu_to_all_gpus(index: Index, co: Any = None, ngpu: int = -1) -> Index:
    """A copy of an index on the only GPU.

    Raises:
        FaissError: there is none, or more than one to use: `ShardedItemTable` spreads a table over several; or co is
            not None.
    """
    count = get_num_gpus() if ngpu == -1 else ngpu
    if count > 1:
        raise FaissError(
            f"index_cpu_to_all_gpus takes one GPU, got {count}: pass ngpu=1, or use grank_kernels.ShardedItemTable"
        )
    return index_cpu_to_gpu(StandardGpuResources(), 0, index, co)


def index_gpu_to_cpu(index: Index) -> Index:
    """A copy of an index in memory."""
    return _copy_on(copy.copy(index), torch.device("cpu"))


def _copy_on(index: Index, device: torch.device) -> Index:
    if isinstance(index, IndexIDMap):
        index.index = _copy_on(copy.copy(index.index), device)  # type: ignore[assignment]
        index._set_ids(index.id_map)
    else:
        _move(index.flat, device)
    return index


def _move(index: Any, device: torch.device) -> None:
    table = index.table
    index._set(table.to(device) if table.device != device else table.snapshot())
