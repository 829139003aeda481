"""`mips_topk`: the public function, its checks, the choice of a backend, and the torch op `grank::mips_topk`."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, overload

import numpy as np
import numpy.typing as npt
import torch
from torch.utils import _pytree

from grank_kernels.ops import mapped_search
from grank_kernels.common.arrays import Array, SupportsDLPack, as_tensor
from grank_kernels.backends import BACKENDS
from grank_kernels.backends.problems import MipsTopkProblem
from grank_kernels.common.checks import FLOATS, check_device, check_k, check_tensor, exclusions, shape_of, version_of
from grank_kernels.ops.dispatch import choose, is_plain, supports
from grank_kernels.distributed.sharded_table import ShardedItemTable
from grank_kernels.table.quantise import Coarse
from grank_kernels.table.item_table import ItemTable

Exclude = Array | tuple[Array, Array]
Progress = Callable[[int, int], object]


class TopK(NamedTuple):
    """What `mips_topk` returns: the fields of `torch.topk`'s result.

    Attributes:
        values: (B, k) float32, descending.
        indices: (B, k) int64.
    """

    values: torch.Tensor
    indices: torch.Tensor


_pytree._register_namedtuple(TopK, serialized_type_name="grank_kernels.TopK")  # torch.export.save asks for it


class TopKArrays(NamedTuple):
    """What `mips_topk` returns for queries of NumPy: the memory of `TopK` as NumPy arrays."""

    values: npt.NDArray[np.float32]
    indices: npt.NDArray[np.int64]


@overload
def mips_topk(
    queries: npt.NDArray[Any],
    items: "Array | ItemTable | ShardedItemTable",
    k: int,
    *,
    exclude: Exclude | None = None,
    allow: Array | None = None,
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
    allow: Array | None = None,
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
    allow: Array | None = None,
    out: tuple[torch.Tensor, torch.Tensor] | None = None,
    backend: str | None = None,
    progress: Progress | None = None,
) -> TopK | TopKArrays:
    """The k items of largest inner product with each query, exactly: `torch.topk(queries @ items.T, k)`.

    No (B, N) matrix is made. Scores are accumulated in float32 (int32 for int8 tables) and depend on their query and
    their row alone, bit for bit. Equal scores: the smaller index first. A NaN score is never returned.
    Differentiable in `values` with respect to `queries` and to an `items` tensor (for an int8 table with respect to the
    queries as if they had not been quantised).

    Every tensor may also be a NumPy array or an object with `__dlpack__` (JAX, CuPy, ...), which is not copied.

    Args:
        queries: (B, d), or (d,) for one query; float32, float16 or bfloat16.
        items: (N, d) float32, float16 or bfloat16, rows at any stride (a last dimension that is not contiguous is
            copied), or an `ItemTable`, whose ids are then returned, take part in ties and are taken by `exclude`. With
            queries on a GPU the items may also be in pinned host memory (`items.pin_memory()`): they are then copied
            chunk by chunk, while the chunk before is searched. Or a `ShardedItemTable`: every rank then calls, and has
            the result of all shards.
        k: 1 or more, no upper limit; where fewer items are eligible the rest is -inf and -1.
        exclude: ids never to return, by query: (B, E) int64 padded with -1, or a pair (offsets (B + 1,) int64, ids
            int64), query b's ids being `ids[offsets[b]:offsets[b + 1]]`. With one query also (E,). Ids that a table
            with ids of its own does not hold are ignored.
        allow: bool (N,), or (B, N): only these rows are eligible. The order of a table's rows is that of `table.ids`;
            where updates may come in between, take ids and search from one `table.snapshot()`.
        out: a pair (values (B, k) float32, indices (B, k) int64) to write the result to.
        backend: None for the first that can run, or "cpu", "triton" or "reference": a named backend runs or raises.
        progress: called with the rows that are done and all there are, after every 16 MB of a table that is streamed
            from its file (`mmap=True`, without an int8 copy). Other searches do not call it.

    Returns:
        `TopK(values, indices)`, each (B, k), or (k,) for one query. For queries of NumPy they are NumPy arrays.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: a dtype, shape, device, id or backend that does not fit; the message names the argument. On a GPU
            excluded ids out of range are ignored, since looking would cost a synchronisation.

    Source: GRank (arXiv 2510.15299), section on serving: brute-force MIPS over the item table.
    """
    asked, allowed = as_tensor("queries", queries), as_tensor("allow", allow)
    search = _search if progress is None else partial(_search, progress=progress)
    if isinstance(items, ShardedItemTable):
        values, indices = items.search(search, asked, k, exclude, allowed, backend)
    else:
        values, indices, _ = search(asked, items, k, exclude, allowed, backend)
    top = TopK(values, indices) if out is None else _write(out, values, indices)
    return TopKArrays(top.values.numpy(force=True), top.indices.numpy()) if isinstance(queries, np.ndarray) else top


def count_rescored(
    queries: Array,
    items: ItemTable,
    k: int,
    *,
    exclude: Exclude | None = None,
    allow: Array | None = None,
    backend: str | None = None,
) -> torch.Tensor:
    """How many rows in full precision the same search by `mips_topk` reads for every query of a certified table.

    These are the rows that the int8 copy cannot rule out: 2 to 3 k for most tables. All N of them are read for a query
    that the bound says nothing of, and for all queries where k is above N / 32.

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
    asked, allowed = as_tensor("queries", queries), as_tensor("allow", allow)
    *_, rescored = _search(asked, items, k, exclude, allowed, backend)
    if rescored is None:
        raise ValueError(
            "items have no int8 copy that this backend uses; it takes an ItemTable made with coarse=torch.int8"
        )
    return rescored


def _search(
    queries: torch.Tensor,
    items: "Array | ItemTable",
    k: int,
    exclude: Exclude | None,
    allow: torch.Tensor | None,
    backend: str | None,
    progress: Progress | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Checks the arguments and searches: values, indices and, of a certified search, the rows it rescored."""
    check_tensor("queries", queries, FLOATS, (1, 2))
    one = queries.dim() == 1
    queries_2d = queries[None] if one else queries
    version = version_of(items)
    rows, row_scale, ids, coarse = version.operands()
    (B, d), width = queries_2d.shape, rows.shape[1]
    if d != width:
        raise ValueError(
            f"queries and items differ in width: queries are {shape_of(queries)}, items {shape_of(rows)}; "
            f"both take d = {width} as the last dimension"
        )
    if rows.device != queries.device and not _streams(queries, rows):
        raise ValueError(
            f"queries are on {queries.device} and items on {rows.device}; both must be on one device, as after "
            f"queries.to({str(rows.device)!r}), or the queries on a GPU and the items in pinned host memory"
        )
    k = check_k(k)
    offsets, excluded = None, None
    if exclude is not None:
        offsets, excluded = exclusions(exclude, B, one, queries.device)
    if allow is not None:
        _check_allow(allow, B, version.live, queries.device)
    if version.alive is not None:
        allow = version.alive if allow is None else _by_position(allow, version.alive)
    if ids is not None and ids.device != queries.device:
        ids = ids.to(queries.device, non_blocking=True)
    name = choose("mips_topk", backend, queries_2d, rows)
    problem = MipsTopkProblem(queries_2d, rows, row_scale, ids, k, offsets, excluded, allow)
    plain = is_plain(queries_2d, rows)
    results: tuple[torch.Tensor, ...]
    if coarse is not None and supports("mips_topk_certified", name, queries_2d, rows):
        if plain:
            results = BACKENDS[name].mips_topk_certified(problem, coarse)
        else:
            results = torch.ops.grank.mips_topk_certified.default(queries_2d, rows, *coarse, *problem[3:], name)
    else:
        op = BACKENDS[name].mips_topk if plain else lambda p: torch.ops.grank.mips_topk.default(*p, name)
        if version.mapping is None:
            results = op(problem)
        else:
            results = mapped_search.search(op, version.mapping, problem, progress)
            ids = None  # the result holds them
    values, positions, *more = results
    indices = positions if ids is None else _external(positions, ids)
    rescored = more[0] if more else None
    if one:
        return values[0], indices[0], None if rescored is None else rescored[0]
    return values, indices, rescored


def _streams(queries: torch.Tensor, rows: torch.Tensor) -> bool:
    """Whether rows in host memory can be copied to the queries' GPU as they are searched."""
    return queries.is_cuda and rows.is_cpu and rows.is_pinned()


def _check_allow(allow: Any, B: int, N: int, device: torch.device) -> None:
    check_tensor("allow", allow, (torch.bool,), (1, 2))
    if tuple(allow.shape) not in ((N,), (B, N)):
        takes = f"for {B} queries and {N} items it takes ({N},) or ({B}, {N})"
        raise ValueError(f"allow has shape {shape_of(allow)}; {takes}")
    check_device("allow", allow, "queries", device)


def _by_position(allow: torch.Tensor, alive: torch.Tensor) -> torch.Tensor:
    """`allow`, which has an entry a row, with an entry a position."""
    spread = allow.new_zeros((*allow.shape[:-1], len(alive)))
    spread[..., alive] = allow
    return spread


def _external(positions: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """The ids of the rows at `positions`, -1 where there is none."""
    if ids.shape[0] == 0:
        return positions
    return torch.where(positions >= 0, ids[positions.clamp(min=0)], -1)


def _write(out: Any, values: torch.Tensor, indices: torch.Tensor) -> TopK:
    if not isinstance(out, (tuple, list)) or len(out) != 2 or not all(isinstance(x, torch.Tensor) for x in out):
        raise TypeError("out must be a pair of tensors (values, indices)")
    if values.requires_grad and torch.is_grad_enabled():
        raise ValueError("out does not take part in gradients: call under torch.no_grad(), or without out")
    for name, given, computed in zip(("values", "indices"), out, (values, indices), strict=True):
        if given.dtype != computed.dtype or given.shape != computed.shape or given.device != computed.device:
            raise ValueError(
                f"out's {name} are {given.dtype} {shape_of(given)} on {given.device}; "
                f"they take {computed.dtype} {shape_of(computed)} on {computed.device}"
            )
        given.copy_(computed)
    return TopK(out[0], out[1])


# ---- the torch op ----

torch.library.define(
    "grank::mips_topk",
    "(Tensor queries, Tensor items, Tensor? row_scale, Tensor? ids, SymInt k, Tensor? exclude_offsets, "
    "Tensor? exclude_ids, Tensor? allow, str backend) -> (Tensor values, Tensor positions)",
    tags=torch.Tag.pt2_compliant_tag,
)


@torch.library.impl("grank::mips_topk", "default")
def _run(*operands: Any) -> tuple[torch.Tensor, torch.Tensor]:
    *fields, backend = operands
    values, positions = BACKENDS[backend].mips_topk(MipsTopkProblem(*fields))
    return values, positions


torch.library.define(
    "grank::mips_topk_certified",
    "(Tensor queries, Tensor items, Tensor coarse_rows, Tensor coarse_scale, Tensor coarse_error, Tensor? basis, "
    "Tensor? ids, SymInt k, Tensor? exclude_offsets, Tensor? exclude_ids, Tensor? allow, str backend) -> "
    "(Tensor values, Tensor positions, Tensor rescored)",
    tags=torch.Tag.pt2_compliant_tag,
)


@torch.library.impl("grank::mips_topk_certified", "default")
def _run_certified(
    queries: torch.Tensor, items: torch.Tensor, *operands: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    rows, scale, error, basis, *fields, backend = operands
    values, positions, rescored = BACKENDS[backend].mips_topk_certified(
        MipsTopkProblem(queries, items, None, *fields), Coarse(rows, scale, error, basis)
    )
    return values, positions, rescored


def _fake(queries: torch.Tensor, items: torch.Tensor, row_scale: Any, ids: Any, k: int, *_: Any) -> Any:
    shape = (queries.shape[0], k)
    return queries.new_empty(shape, dtype=torch.float32), queries.new_empty(shape, dtype=torch.int64)


def _fake_certified(queries: torch.Tensor, *operands: Any) -> Any:
    values, positions = _fake(queries, *operands[:2], None, operands[6])
    return values, positions, queries.new_empty(queries.shape[:1], dtype=torch.int64)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    queries, items, row_scale = inputs[:3]
    _, positions = output
    ctx.mark_non_differentiable(positions)
    ctx.save_for_backward(queries, items, row_scale, positions)


def _setup_context_certified(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    _, positions, rescored = output
    ctx.mark_non_differentiable(positions, rescored)
    ctx.save_for_backward(*inputs[:2], None, positions)


def _backward(ctx: Any, grad_values: torch.Tensor, *_: Any) -> tuple[torch.Tensor | None, ...]:
    """The gradient of values[b, j] = <queries[b], items[positions[b, j]]>; deterministic, no (B, N) matrix."""
    queries, items, row_scale, positions = ctx.saved_tensors
    (B, k), (N, d) = positions.shape, items.shape
    found = (positions >= 0)[..., None]
    rows = positions.clamp(min=0)
    weights = grad_values[..., None]
    grad_queries = grad_items = None
    if ctx.needs_input_grad[0]:
        if N == 0:
            grad_queries = torch.zeros_like(queries)
        else:
            there = rows.to(items.device)  # which may be the host
            picked = items[there].float() if row_scale is None else items[there] * row_scale[there][..., None]
            picked = picked.to(queries.device)
            grad_queries = (weights * picked).masked_fill(~found, 0).sum(1).to(queries.dtype)
    if ctx.needs_input_grad[1]:
        by_place = (weights * queries.float()[:, None]).masked_fill(~found, 0).reshape(B * k, d)
        grad_items = torch.ops.aten.embedding_dense_backward(by_place, rows.reshape(-1), N, -1, False)
        grad_items = grad_items.to(items.device, items.dtype)
    return grad_queries, grad_items, *[None] * (len(ctx.needs_input_grad) - 2)


torch.library.register_fake("grank::mips_topk", _fake)
torch.library.register_autograd("grank::mips_topk", _backward, setup_context=_setup_context)
torch.library.register_fake("grank::mips_topk_certified", _fake_certified)
torch.library.register_autograd("grank::mips_topk_certified", _backward, setup_context=_setup_context_certified)
