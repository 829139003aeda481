"""`RowMask`: the rows that a search may return, by id."""

import weakref
from typing import Any

import torch

from grank_kernels.table.versions import Version


class RowMask:
    """A set of ids for `allow` of `mips_topk`, made by `ItemTable.mask`.

    It names items, not positions, so it stays right when updates move, replace or add rows. Ids that the searched table
    does not hold are ignored. The positions are looked up once a version of the table.
    """

    def __init__(self, ids: torch.Tensor):
        """Takes the ids, int64 (n,), without a copy."""
        self.ids = ids
        self._latest: tuple[weakref.ref[Version], torch.Tensor] | None = None

    def __len__(self) -> int:
        return len(self.ids)

    def __repr__(self) -> str:
        return f"RowMask({len(self):_} ids)"

    def __reduce__(self) -> tuple[Any, ...]:
        return RowMask, (self.ids,)

    def positions(self, version: Version) -> torch.Tensor:
        """Bool (size,), one entry a position of a version: whether its row has one of the ids."""
        latest = self._latest
        if latest is not None and latest[0]() is version:
            return latest[1]
        rows = version.columns.rows
        marked = torch.zeros(version.size + 1, dtype=torch.bool, device=rows.device)
        marked[version.find(self.ids.to(rows.device))] = True  # the last place is for ids that are not there
        self._latest = weakref.ref(version), marked[:-1]
        return marked[:-1]
