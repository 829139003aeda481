"""Validation of the arguments of a search and of the ops over the whole corpus, and of `items` for every op."""

import os
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from grank_kernels.common.arrays import Array
from grank_kernels.common.checks import (
    FLOATS,
    check_device,
    check_exclude,
    check_int,
    check_operand,
    check_tensor,
    exclusions,
    shape_of,
)
from grank_kernels.ops.dispatch import choose, is_plain
from grank_kernels.table.item_table import ItemTable
from grank_kernels.table.row_mask import RowMask
from grank_kernels.table.versions import Columns, Version

_MOST_K = (1 << 63) - 1
_PLACE_BYTES = 12  # a float32 score and an int64 id
_LARGE = 1 << 31  # bytes of a result up to which the size of the memory is not looked up
Exclude = Array | tuple[Array, Array] | list[Any]
ExcludeByWindow = Exclude | tuple[Array, Array, Array]
Progress = Callable[[int, int], object]


class SearchRequest(NamedTuple):
    """The validated arguments of `mips_topk`, as the search of a table and of a shard takes them.

    Attributes:
        queries: (B, d) float32, float16 or bfloat16.
        version: the snapshot of the table that is searched.
        k: 1 or more.
        exclude_offsets: (B + 1,) int64, or None: query b excludes `exclude_ids[exclude_offsets[b] :
            exclude_offsets[b + 1]]`.
        exclude_ids: (E,) int64, -1 for none; or None.
        allow: (size,) or (B, size) bool, the eligible positions of the snapshot; None: all are.
        backend: name of the chosen backend, a key of `BACKENDS`.
        progress: called with (rows done, rows in all) while a mapped table is streamed; or None.
        one: whether the caller passed one query (d,), so that the result has no batch dimension.
        has_allow: whether the caller passed `allow`.
    """

    queries: torch.Tensor
    version: Version
    k: int
    exclude_offsets: torch.Tensor | None
    exclude_ids: torch.Tensor | None
    allow: torch.Tensor | None
    backend: str
    progress: Progress | None = None
    one: bool = False
    has_allow: bool = False


def search_request(
    queries: Any,
    items: Any,
    k: Any,
    exclude: Any,
    allow: Any,
    backend: str | None,
    progress: Progress | None = None,
    num_ids: int | None = None,
) -> SearchRequest:
    """Validates the arguments of `mips_topk`; `num_ids` is the number of rows of all shards, if ids are counted there.

    Raises:
        TypeError, ValueError: as documented for `mips_topk`.
    """
    queries = check_tensor("queries", queries, FLOATS, (1, 2))
    one = queries.dim() == 1
    queries = queries[None] if one else queries
    version = version_of(items)
    rows, B = version.columns.rows, queries.shape[0]
    if queries.shape[1] != rows.shape[1]:
        raise ValueError(
            f"queries must have the items' width, {rows.shape[1]}, as last dimension, "
            f"got {shape_of(queries[0] if one else queries)}"
        )
    if rows.device != queries.device and not (queries.is_cuda and rows.is_cpu and rows.is_pinned()):
        raise ValueError(
            f"queries must be on {rows.device}, the device of items, got {queries.device}: "
            f"queries.to({str(rows.device)!r}) copies them (queries on a GPU also search items in pinned host memory)"
        )
    k = check_int("k", k, 1)
    _check_room(B, k, queries.device)
    offsets, excluded = None, None
    if exclude is not None:
        offsets, excluded = exclusions(exclude, B, one, queries.device)
        if is_plain(offsets, excluded):  # otherwise the op checks when it runs
            check_exclude(offsets, excluded, None if version.columns.ids is not None else num_ids or version.size)
    eligible = _eligible(allow, version, B, queries.device)
    name = choose("mips_topk", backend, queries, rows)
    return SearchRequest(queries, version, k, offsets, excluded, eligible, name, progress, one, allow is not None)


class CorpusOperands(NamedTuple):
    """What the two ops over the whole corpus have in common, validated.

    Attributes:
        users: (R, d) float32, float16 or bfloat16.
        items: (N, d), users' dtype and device.
        exclude: offsets (W + 1,), ids (E,) and the list of every row (R,) or None, int64; or three times None.
    """

    users: torch.Tensor
    items: torch.Tensor
    exclude: tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]


def corpus_operands(users: Any, items: Any, exclude: Any) -> CorpusOperands:
    """Validates users, items and `exclude`, which may name lists by window.

    Under autocast users and items are cast to its dtype, as for `users @ items.T`.
    """
    users, items = check_tensor("users", users, FLOATS, (2,)), check_tensor("items", items, FLOATS, (2,))
    kind = users.device.type
    if torch.is_autocast_enabled(kind):
        users, items = (x.to(torch.get_autocast_dtype(kind)) for x in (users, items))
    if items.dtype != users.dtype:
        raise ValueError(
            f"items must be {users.dtype}, the dtype of users, got {items.dtype}: items.to({users.dtype}) converts"
        )
    check_device("items", items, "users", users.device)
    if users.shape[1] != items.shape[1]:
        raise ValueError(f"users must be (R, {items.shape[1]}), the width of items, got {shape_of(users)}")
    R, device, windows = users.shape[0], users.device, None
    if exclude is None:
        return CorpusOperands(users, items, (None, None, None))
    if isinstance(exclude, tuple) and len(exclude) == 3:
        offsets, ids, windows = (
            check_tensor(f"exclude's {name}", x, (torch.int64,), (1,))
            for name, x in zip(("offsets", "ids", "windows"), exclude, strict=True)
        )
        for name, x in (("offsets", offsets), ("ids", ids), ("windows", windows)):
            check_device(f"exclude's {name}", x, "users", device)
        check_operand("exclude's windows", windows, (torch.int64,), "(R,)", (R,))
        if offsets.shape[0] < 1:
            raise ValueError("exclude's offsets must be (W + 1,) for W windows, got (0,)")
    else:
        offsets, ids = exclusions(exclude, R, False, device, "users")
    return CorpusOperands(users, items, (offsets, ids, windows))


def check_exclude_windows(
    offsets: torch.Tensor | None, ids: torch.Tensor | None, windows: torch.Tensor | None, N: int
) -> None:
    """That offsets, ids and windows lie in range. Not checked on a GPU, where reading them would synchronise."""
    if offsets is None or ids is None:
        return
    check_exclude(offsets, ids, N)
    if windows is not None and windows.is_cpu and len(windows):
        low, high = (int(x) for x in windows.aminmax())
        if low < 0 or high >= len(offsets) - 1:
            raise ValueError(f"exclude's windows must lie in [0, {len(offsets) - 1}), got {low if low < 0 else high}")


def version_of(items: Any) -> Version:
    """The current snapshot of an `ItemTable`, or a tensor as a table."""
    if isinstance(items, ItemTable):
        return items.current
    if str(getattr(items, "dtype", "")).removeprefix("torch.") == "int8":
        raise ValueError(
            "items must be torch.float32, torch.float16 or torch.bfloat16, got torch.int8: items.float() converts; "
            "ItemTable.from_rows(items.float(), dtype=torch.int8) searches in int8"
        )
    items = check_tensor("items", items, FLOATS, (2,), "a torch.Tensor, an array or an ItemTable")
    return Version(Columns(items), items.shape[0])


def _eligible(allow: Any, version: Version, B: int, device: torch.device) -> torch.Tensor | None:
    """The positions that hold a row and are allowed: bool (size,) or (B, size), or None for all."""
    if allow is None:
        return version.row_mask
    if isinstance(allow, RowMask):
        return allow.positions(version).to(device)
    if version.reordered:
        raise ValueError(
            "allow must be table.mask(ids), got a mask by row: updates have removed or replaced rows of the table, and "
            "the mask may have been made for their order before (a table.snapshot() takes masks by row)"
        )
    N = version.num_rows
    mask = check_tensor("allow", allow, (torch.bool,), (1, 2))
    if tuple(mask.shape) not in ((N,), (B, N)):
        raise ValueError(f"allow must be ({N},) or ({B}, {N}) for {B} queries and {N} items, got {shape_of(mask)}")
    check_device("allow", mask, "queries", device)
    if version.row_mask is None:
        return mask
    spread = mask.new_zeros((*mask.shape[:-1], version.size))
    spread[..., version.row_mask] = mask
    return spread


def _check_room(B: int, k: Any, device: torch.device) -> None:
    """That the result fits into memory: on a CPU torch's allocator would not name the argument."""
    if torch.compiler.is_compiling():
        return  # sizes may be symbolic
    if k > _MOST_K:
        raise ValueError(f"k must be below 2^63, got {k}")
    nbytes = B * k * _PLACE_BYTES
    if nbytes > _LARGE and device.type == "cpu":
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        if nbytes > memory:
            raise MemoryError(
                f"k must leave room for {B} results of k places, got {k}: they take {nbytes / 1e9:.3g} GB, "
                f"and this machine has {memory / 1e9:.3g} GB"
            )
