"""Rows and ids as an `ItemTable` takes them: checks, and conversion to the table's dtype."""

import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch

from grank_kernels.common.arrays import Array
from grank_kernels.common.arrow import matrix_of
from grank_kernels.common.checks import FLOATS, check_choice, check_device, check_int, check_tensor, shape_of
from grank_kernels.table import file as table_file
from grank_kernels.table.quantise import certify, quantise
from grank_kernels.table.versions import Columns, empty

DTYPES = (*FLOATS, torch.int8)


def converted(
    rows: torch.Tensor, ids: torch.Tensor | None, dtype: torch.dtype, scales: torch.Tensor | None = None
) -> Columns:
    """Copies of checked rows, ids and scales, in the table's dtype."""
    rows = rows.detach()
    ids = None if ids is None else ids.clone(memory_format=torch.contiguous_format)
    if scales is not None:
        return Columns(empty(rows.shape, torch.int8, rows.device).copy_(rows), scales.clone().contiguous(), ids)
    if dtype != torch.int8:
        return Columns(empty(rows.shape, dtype, rows.device).copy_(rows), None, ids)
    numbers = empty(rows.shape, torch.int8, rows.device)
    scale = torch.empty(len(rows), dtype=torch.float32, device=rows.device)
    for part in _parts(rows):
        numbers[part], scale[part] = quantise(rows[part].float())
    if not bool(scale.isfinite().all()):
        row = int((~scale.isfinite()).nonzero()[0])
        raise ValueError(f"rows must be finite for int8, got NaN or infinity in row {row}")
    return Columns(numbers, scale, ids)


def with_coarse(columns: Columns, basis: torch.Tensor | None) -> Columns:
    """The columns with a certified int8 copy of the float rows."""
    rows = columns.rows
    numbers = empty(rows.shape, torch.int8, rows.device)
    scale, error = (torch.empty(len(rows), dtype=torch.float32, device=rows.device) for _ in range(2))
    for part in _parts(rows):
        numbers[part], scale[part], error[part] = certify(rows[part], basis)
    return columns._replace(coarse_rows=numbers, coarse_scale=scale, coarse_error=error)


def converted_parts(parts: Iterable[Array], dtype: torch.dtype | None) -> Iterator[Columns]:
    """Parts of the rows of a table, which must have one width, as columns."""
    width = None
    for part in parts:
        rows, dtype = checked_rows(part, dtype)
        width = rows.shape[1] if width is None else width
        if rows.shape[1] != width:
            raise ValueError(f"parts must have the width of the first one, {width}, got rows {tuple(rows.shape)}")
        yield converted(rows, None, dtype)


def reported(parts: Iterable[Columns], total: int, progress: Callable[[int, int], object]) -> Iterator[Columns]:
    """The parts; `progress` is called when the next part is requested."""
    done = 0
    for part in parts:
        yield part
        done += len(part.rows)
        progress(done, total)


def _parts(rows: torch.Tensor) -> Iterator[slice]:
    """Slices of rows of which float32 copies take 1 MB.

    Such copies stay in a cache: 0.4 of the processor time of copies of 16 MB (measured: int8 rows of 16, a Xeon with
    AMX).
    """
    step = max(1, (1 << 18) // max(1, rows.shape[1]))
    for start in range(0, len(rows), step):
        yield slice(start, start + step)


def checked_rows(rows: object, dtype: torch.dtype | None) -> tuple[torch.Tensor, torch.dtype]:
    """Rows, and the dtype to store them in."""
    rows = matrix_of("rows", rows)
    if str(getattr(rows, "dtype", "")).removeprefix("torch.") == "int8":
        raise ValueError("rows must be floats, or int8 with scales, got torch.int8: scales=torch.ones(N) if all are 1")
    rows = check_tensor("rows", rows, FLOATS, (2,))
    if rows.is_meta:
        raise ValueError("rows must have data, got a tensor on the meta device")
    if rows.requires_grad and torch.is_grad_enabled():
        warnings.warn(
            "rows require a gradient, and an ItemTable is a copy without one: for a gradient search the tensor itself, "
            "otherwise pass rows.detach()",
            UserWarning,
            stacklevel=3,
        )
    dtype = rows.dtype if dtype is None else dtype
    check_choice("dtype", dtype, DTYPES)
    return rows, dtype


def checked_int8(
    rows: object, scales: object, dtype: torch.dtype | None
) -> tuple[torch.Tensor, torch.Tensor, torch.dtype]:
    """Int8 rows (n, d), their scales (n,), and torch.int8."""
    rows = check_tensor("rows", matrix_of("rows", rows), (torch.int8,), (2,))
    scales = check_tensor("scales", scales, (torch.float32,), (1,))
    check_choice("dtype", dtype, (None, torch.int8))
    check_device("scales", scales, "rows", rows.device)
    if scales.shape != rows.shape[:1]:
        raise ValueError(f"scales must be ({len(rows)},), one a row, got {shape_of(scales)}")
    wrong = ~(scales.isfinite() & (scales >= 0))
    if bool(wrong.any()):
        raise ValueError(f"scales must be finite and 0 or more, got {float(scales[wrong][0])}")
    return rows, scales.detach(), torch.int8


def checked_any_ids(name: str, ids: object) -> torch.Tensor:
    """An int64 tensor of any shape."""
    return check_tensor(name, ids, (torch.int64,), tuple(range(getattr(ids, "ndim", 0) + 1)))


def checked_ids(ids: object, shape: tuple[int, ...] | None, device: torch.device) -> torch.Tensor:
    """Unique ids (n,), of the given shape if that is not None."""
    ids = check_tensor("ids", ids, (torch.int64,), (1,))
    if shape is not None and ids.shape != shape:
        raise ValueError(f"ids must be {tuple(shape)}, one a row, got {tuple(ids.shape)}")
    check_device("ids", ids, "rows", device)
    by_id = ids.sort().values
    repeated = by_id[1:][by_id[1:] == by_id[:-1]]
    if len(repeated):
        raise ValueError(f"ids must be unique, got {int(repeated[0])} more than once")
    if len(by_id) and int(by_id[0]) < 0:
        raise ValueError(f"ids must not be negative, got {int(by_id[0])}; -1 marks places without a result")
    return ids


def checked_num_rows(num_rows: Any) -> int:
    """A number of rows that a file can hold."""
    checked = int(check_int("num_rows", num_rows, 0))
    if checked >= table_file.MOST:
        raise ValueError(f"num_rows must be below 2^40, got {checked}")
    return checked
