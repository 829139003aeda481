"""What an op reads of its `items`."""

from typing import Any

import torch

from grank_kernels.common.arrays import as_tensor
from grank_kernels.common.checks import FLOATS, check_tensor
from grank_kernels.table.item_table import ItemTable
from grank_kernels.table.versions import Columns, Version


def version_of(items: Any) -> Version:
    """Of items, a tensor or a table: the rows as they are now, whatever updates come while they are searched."""
    if isinstance(items, ItemTable):
        return items.current
    items = as_tensor("items", items)
    if not isinstance(items, torch.Tensor):
        raise TypeError(f"items must be a torch.Tensor or an ItemTable, got {type(items).__name__}")
    if items.dtype == torch.int8:
        raise ValueError("items are torch.int8 without scales; use ItemTable.from_rows(rows, dtype=torch.int8)")
    check_tensor("items", items, FLOATS, (2,))
    return Version(Columns(items), items.shape[0])
