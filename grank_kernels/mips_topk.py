"""`mips_topk` and `count_rescored`: the public functions."""

from typing import Any, NamedTuple, overload

import numpy as np
import numpy.typing as npt
import torch
from torch.utils import _pytree

from grank_kernels.common.arrays import Array, SupportsDLPack, readable
from grank_kernels.common.checks import shape_of
from grank_kernels.distributed.ranks import attempt
from grank_kernels.distributed.sharded_table import ShardedItemTable
from grank_kernels.ops.mips_topk import search
from grank_kernels.ops.requests import Exclude, Progress, search_request
from grank_kernels.table.item_table import ItemTable
from grank_kernels.table.row_mask import RowMask


class TopK(NamedTuple):
    """The result of `mips_topk`, with the field names of `torch.topk`'s result.

    Attributes:
        values: (B, k) float32, descending.
        indices: (B, k) int64.
    """

    values: torch.Tensor
    indices: torch.Tensor


_pytree._register_namedtuple(TopK, serialized_type_name="grank_kernels.TopK")  # torch.export.save asks for it


class TopKArrays(NamedTuple):
    """The result of `mips_topk` for NumPy queries: a `TopK` as NumPy arrays."""

    values: npt.NDArray[np.float32]
    indices: npt.NDArray[np.int64]


@overload
def mips_topk(
    queries: npt.NDArray[Any],
    items: "Array | ItemTable | ShardedItemTable",
    k: int,
    *,
    exclude: Exclude | None = None,
    allow: Array | RowMask | None = None,
    out: tuple[torch.Tensor, torch.Tensor] | None = None,
    backend: str | None = None,
    progress: Progress | None = None,
) -> TopKArrays: ...


@overload
def mips_topk(
    queries: torch.Tensor | SupportsDLPack,
    items: "Array | ItemTable | ShardedItemTable",
    k: int,
    *,
    exclude: Exclude | None = None,
    allow: Array | RowMask | None = None,
    out: tuple[torch.Tensor, torch.Tensor] | None = None,
    backend: str | None = None,
    progress: Progress | None = None,
) -> TopK: ...


def mips_topk(
    queries: Array,
    items: "Array | ItemTable | ShardedItemTable",
    k: int,
    *,
    exclude: Exclude | None = None,
    allow: Array | RowMask | None = None,
    out: tuple[torch.Tensor, torch.Tensor] | None = None,
    backend: str | None = None,
    progress: Progress | None = None,
) -> TopK | TopKArrays:
    """The k items of largest inner product with each query, exactly: `torch.topk(queries @ items.T, k)`.

    No (B, N) matrix is made. Scores are accumulated in float32 (int32 for int8 tables) and depend on their query and
    their row alone, bit for bit. Equal scores: the smaller index first. A NaN score is never returned.
    `values` are differentiable in `queries` and in an `items` tensor, in reverse and forward mode, also under
    `torch.func` transforms and `vmap`. (An int8 table differentiates as if queries were not quantised; an `ItemTable`
    itself gets no gradient.)

    Every tensor may also be a NumPy array or an object with `__dlpack__` (JAX, CuPy, ...), without a copy.

    Args:
        queries: (B, d), or (d,) for one query; float32, float16 or bfloat16.
        items: one of
            (N, d) float32, float16 or bfloat16 with any row stride (a non-contiguous last dimension is copied);
            an `ItemTable`, whose ids are returned, order equal scores and are those of `exclude`;
            a `ShardedItemTable`, searched by all ranks together: each gets the result of all shards.
            With queries on a GPU the items may be in pinned host memory (`items.pin_memory()`): the copy of a chunk
            overlaps the search of the one before.
        k: 1 or more, without an upper limit; if fewer items are eligible, -inf and -1 fill the rest.
        exclude: ids never to return, by query; one of
            (B, E) int64, padded with -1; for one query also (E,);
            a tuple (offsets (B + 1,), ids), both int64: query b excludes `ids[offsets[b]:offsets[b + 1]]`;
            a list of B entries, each a list of ints, an int64 tensor or an int64 array.
            Ids that a table with ids of its own does not hold are ignored.
        allow: the eligible rows: bool (N,) or (B, N), or `table.mask(ids)`. Bool masks are in the order of `table.ids`,
            and refused once updates have removed or replaced rows, after which they may be of an older order;
            `table.mask` stays right.
        out: a pair (values (B, k) float32, indices (B, k) int64) to write the result to.
        backend: None for the first that can run, or "cpu", "triton" or "reference": a named backend runs or raises.
        progress: called with (rows done, rows in all) after every 16 MB of a table streamed from its file
            (`mmap=True` without an int8 copy). Other searches do not call it.

    Returns:
        `TopK(values, indices)`, each (B, k), or (k,) for one query; NumPy arrays for NumPy queries.

    Raises:
        TypeError: an argument of the wrong type, or a tensor that is sparse, nested or a subclass with its own
            operations (DTensor, ...).
        ValueError: a wrong dtype, shape, device, id or backend, or a tensor whose storage was freed. On a GPU excluded
            ids out of range are ignored instead, since reading them would synchronise.
        MemoryError: the result would not fit into the machine's memory.

    Source: GRank (arXiv 2510.15299), section on serving: brute-force MIPS over the item table.
    """
    if isinstance(items, ShardedItemTable):
        # an invalid argument is an error on all ranks, so the table receives the exception
        values, indices = items.search(
            attempt(search_request, queries, items.local, k, exclude, allow, backend, progress, items.num_ids)
        )
    else:
        values, indices, _ = search(search_request(queries, items, k, exclude, allow, backend, progress))
    top = TopK(values, indices) if out is None else _write(out, values, indices)
    return TopKArrays(top.values.numpy(force=True), top.indices.numpy()) if isinstance(queries, np.ndarray) else top


def count_rescored(
    queries: Array,
    items: ItemTable,
    k: int,
    *,
    exclude: Exclude | None = None,
    allow: Array | RowMask | None = None,
    backend: str | None = None,
) -> torch.Tensor:
    """The number of full-precision rows that the same search by `mips_topk` reads, per query of a certified table.

    These are the rows that the int8 copy cannot rule out: 2 to 3 k for most tables. It is N for a query without a
    bound (NaN, infinity), and for every query if k is above N / 32.

    Args:
        queries: as `mips_topk` takes them.
        items: a table with an int8 copy, made with `coarse=torch.int8`.
        k: as `mips_topk` takes it.
        exclude: as `mips_topk` takes it.
        allow: as `mips_topk` takes it.
        backend: as `mips_topk` takes it.

    Returns:
        (B,) int64, or a scalar for one query.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: as `mips_topk`, and for items without an int8 copy or a backend that does not use it.
    """
    *_, rescored = search(search_request(queries, items, k, exclude, allow, backend))
    if rescored is None:
        raise ValueError(
            "items have no int8 copy that this backend uses; it takes an ItemTable made with coarse=torch.int8"
        )
    return rescored


def _write(out: Any, values: torch.Tensor, indices: torch.Tensor) -> TopK:
    if not isinstance(out, (tuple, list)) or len(out) != 2 or not all(isinstance(x, torch.Tensor) for x in out):
        raise TypeError(f"out must be a pair of tensors (values, indices), got {_kinds(out)}")
    if values.requires_grad and torch.is_grad_enabled():
        raise ValueError("out must be None where a gradient is recorded: call under torch.no_grad(), or without out")
    for name, given, computed in zip(("values", "indices"), out, (values, indices), strict=True):
        readable(f"out's {name}", given)
        if given.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"out's {name} must not require a gradient, which it would not get")
        if given.dtype != computed.dtype or given.shape != computed.shape or given.device != computed.device:
            raise ValueError(
                f"out's {name} must be {computed.dtype} {shape_of(computed)} on {computed.device}, "
                f"got {given.dtype} {shape_of(given)} on {given.device}"
            )
        if not torch.compiler.is_compiling() and torch._debug_has_internal_overlap(given) == 1:
            raise ValueError(f"out's {name} must have memory for each element, got an expanded tensor")
        given.copy_(computed)
    return TopK(out[0], out[1])


def _kinds(x: Any) -> str:
    """The types in a tuple or list, or the type, for a message."""
    return f"({', '.join(type(each).__name__ for each in x)})" if isinstance(x, (tuple, list)) else type(x).__name__
