"""Columns of Arrow as matrices, without Python objects."""

import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt


def matrix_of(name: str, x: Any) -> Any:
    """A `pyarrow` column of lists of one length as an array (n, d), a single chunk without a copy; else x itself.

    Args:
        name: the argument, for messages.
        x: an Array or ChunkedArray of fixed-size lists, of lists, or of fixed-shape tensors.

    Raises:
        TypeError: a column of another type.
        ValueError: a null, or lists of different lengths.
    """
    pa = sys.modules.get("pyarrow")  # who has a column has imported it
    if pa is None or not isinstance(x, (pa.Array, pa.ChunkedArray)):
        return x
    chunks = x.chunks if isinstance(x, pa.ChunkedArray) else [x]
    kind = x.type
    if isinstance(kind, pa.BaseExtensionType):
        chunks, kind = [chunk.storage for chunk in chunks], kind.storage_type
    fixed = pa.types.is_fixed_size_list(kind)
    if not (fixed or pa.types.is_list(kind) or pa.types.is_large_list(kind)) or not _is_number(pa, kind.value_type):
        raise TypeError(f"{name} must be a column of lists of numbers, got {x.type}")
    if x.null_count or any(chunk.flatten().null_count for chunk in chunks):
        raise ValueError(f"{name} must have no nulls, got a column with nulls")
    widths = {kind.list_size} if fixed else {int(w) for c in chunks for w in np.unique(np.diff(c.offsets.to_numpy()))}
    if len(widths) != 1:
        raise ValueError(f"{name} must be lists of one length, got lengths {sorted(widths)}")
    (width,) = widths
    parts = [chunk.flatten().to_numpy().reshape(len(chunk), width) for chunk in chunks]
    dtype = kind.value_type.to_pandas_dtype()
    return parts[0] if len(parts) == 1 else np.concatenate([np.empty((0, width), dtype), *parts])


def column_parts(parts: Any, column: str | None) -> tuple[Iterator[npt.NDArray[Any]], int] | None:
    """Parts and number of rows of a column of a `pyarrow` Table or Dataset; None for anything else.

    Args:
        parts: the table or dataset.
        column: the column's name; None: the only column of lists.

    Raises:
        ValueError: there is no such column, or more than one.
    """
    if not (hasattr(parts, "to_batches") and hasattr(parts, "schema")):
        return None
    pa = sys.modules["pyarrow"]
    schema = parts.schema
    lists = [
        field.name
        for field in schema
        if isinstance(field.type, pa.BaseExtensionType)
        or pa.types.is_fixed_size_list(field.type)
        or pa.types.is_list(field.type)
        or pa.types.is_large_list(field.type)
    ]
    if column is None:
        if len(lists) != 1:
            raise ValueError(f"column must name the column of rows, got None and the columns of lists {lists}")
        (column,) = lists
    elif column not in schema.names:
        raise ValueError(f"column must be one of {schema.names}, got {column!r}")
    count = parts.num_rows if isinstance(parts, pa.Table) else parts.count_rows()
    batches = parts.select([column]).to_batches() if isinstance(parts, pa.Table) else parts.to_batches(columns=[column])
    return (matrix_of(f"column {column!r}", batch.column(0)) for batch in batches), count


def _is_number(pa: Any, kind: Any) -> bool:
    return bool(pa.types.is_floating(kind) or pa.types.is_integer(kind))
