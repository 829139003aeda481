"""FAISS's names for exact searches: `import grank_kernels.adapters.faiss as faiss`."""

from typing import Any

from grank_kernels.adapters.faiss.errors import FaissError
from grank_kernels.adapters.faiss.factory import (
    clone_index,
    downcast_index,
    index_factory,
    knn,
    normalize_L2,
    omp_get_max_threads,
    omp_set_num_threads,
    swig_ptr,
    vector_to_array,
)
from grank_kernels.adapters.faiss.files import IO_FLAG_MMAP, deserialize_index, read_index, serialize_index, write_index
from grank_kernels.adapters.faiss.flat import IndexFlat, IndexFlatIP, IndexFlatL2, IndexScalarQuantizer, ScalarQuantizer
from grank_kernels.adapters.faiss.gpu import (
    GpuIndexFlatConfig,
    GpuIndexFlatIP,
    GpuIndexFlatL2,
    StandardGpuResources,
    get_num_gpus,
    index_cpu_to_all_gpus,
    index_cpu_to_gpu,
    index_gpu_to_cpu,
)
from grank_kernels.adapters.faiss.id_map import IndexIDMap, IndexIDMap2
from grank_kernels.adapters.faiss.index import METRIC_INNER_PRODUCT, METRIC_L2, Index
from grank_kernels.adapters.faiss.selectors import (
    IDSelector,
    IDSelectorAll,
    IDSelectorAnd,
    IDSelectorArray,
    IDSelectorBatch,
    IDSelectorBitmap,
    IDSelectorNot,
    IDSelectorOr,
    IDSelectorRange,
    IDSelectorXOr,
    SearchParameters,
)

# the metrics that no index here has: programs may name them, and an index refuses them
METRIC_L1, METRIC_Linf, METRIC_Lp, METRIC_Canberra, METRIC_BrayCurtis = 2, 3, 4, 20, 21
METRIC_JensenShannon, METRIC_Jaccard, METRIC_NaNEuclidean, METRIC_GOWER = 22, 23, 24, 25

__all__ = [
    "IO_FLAG_MMAP",
    "METRIC_GOWER",
    "METRIC_INNER_PRODUCT",
    "METRIC_L1",
    "METRIC_L2",
    "FaissError",
    "GpuIndexFlatConfig",
    "GpuIndexFlatIP",
    "GpuIndexFlatL2",
    "IDSelector",
    "IDSelectorAll",
    "IDSelectorAnd",
    "IDSelectorArray",
    "IDSelectorBatch",
    "IDSelectorBitmap",
    "IDSelectorNot",
    "IDSelectorOr",
    "IDSelectorRange",
    "IDSelectorXOr",
    "Index",
    "IndexFlat",
    "IndexFlatIP",
    "IndexFlatL2",
    "IndexIDMap",
    "IndexIDMap2",
    "IndexScalarQuantizer",
    "METRIC_BrayCurtis",
    "METRIC_Canberra",
    "METRIC_Jaccard",
    "METRIC_JensenShannon",
    "METRIC_Linf",
    "METRIC_Lp",
    "METRIC_NaNEuclidean",
    "ScalarQuantizer",
    "SearchParameters",
    "StandardGpuResources",
    "clone_index",
    "deserialize_index",
    "downcast_index",
    "get_num_gpus",
    "index_cpu_to_all_gpus",
    "index_cpu_to_gpu",
    "index_factory",
    "index_gpu_to_cpu",
    "knn",
    "normalize_L2",
    "omp_get_max_threads",
    "omp_set_num_threads",
    "read_index",
    "serialize_index",
    "swig_ptr",
    "vector_to_array",
    "write_index",
]


def __getattr__(name: str) -> Any:
    raise AttributeError(
        f"grank_kernels.adapters.faiss has no {name}: it has FAISS's names for exact search by inner product and L2; "
        "IndexFlatIP and IndexFlatL2 need no approximate index"
    )
