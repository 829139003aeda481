"""`ItemTable`: the rows a search goes over, in the precision they are searched in."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

from grank_kernels.quantise import Coarse, certify, quantise, rotation_for

_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.int8)


class ItemTable:
    """Item rows in one precision, with external ids if wanted, on one device. There is no index to build.

    Made by `ItemTable.from_rows`. `mips_topk(queries, table, k)` searches it.
    """

    def __init__(
        self,
        rows: torch.Tensor,
        row_scale: torch.Tensor | None,
        ids: torch.Tensor | None,
        coarse: Coarse | None = None,
    ):
        """Takes what `from_rows` has checked and converted."""
        self._rows = rows  # (N, d), contiguous
        self._row_scale = row_scale  # (N,) float32, int8 rows only
        self._ids = ids  # (N,) int64, unique, or None: the positions are the ids
        self.coarse = coarse  # row by row what quantise.certify says of self._rows; None: searches read those alone
        self._by_id: tuple[torch.Tensor, torch.Tensor] | None = None

    @classmethod
    def from_rows(
        cls,
        rows: torch.Tensor,
        *,
        ids: torch.Tensor | None = None,
        dtype: torch.dtype | None = None,
        coarse: torch.dtype | None = None,
    ) -> "ItemTable":
        """Copies rows into a table.

        Args:
            rows: (N, d) float32, float16 or bfloat16.
            ids: (N,) int64, unique, not negative: what searches return instead of positions.
            dtype: float32, float16, bfloat16 or int8; None keeps that of `rows`. int8 is symmetric by row:
                `scale = max|row| / 127`, numbers rounded half to even.
            coarse: torch.int8 keeps an int8 copy beside float rows, with a bound of its error for every row. Searches
                scan the copy and read only those rows that the bound cannot rule out: the same result, bit for bit, as
                without it, in the time of an int8 search. Rows may hold infinities and NaN, which are always read.

        Raises:
            TypeError: an argument is no tensor.
            ValueError: a dtype or shape that does not fit, ids that repeat or are negative, rows that int8 or the
                narrower dtype cannot hold (NaN and infinities for int8).
        """
        if not isinstance(rows, torch.Tensor):
            raise TypeError(f"rows must be a torch.Tensor, got {type(rows).__name__}")
        if rows.dim() != 2 or rows.dtype not in _DTYPES[:3]:
            raise ValueError(
                f"rows are {rows.dtype} of shape {tuple(rows.shape)}; they take (N, d) float32, float16 or bfloat16"
            )
        dtype = rows.dtype if dtype is None else dtype
        if dtype not in _DTYPES:
            raise ValueError(f"dtype is {dtype}; it takes one of {', '.join(map(str, _DTYPES))}")
        if coarse not in (None, torch.int8) or (coarse is not None and dtype == torch.int8):
            raise ValueError(f"coarse is {coarse} beside {dtype} rows; it takes None, or torch.int8 beside float rows")
        if ids is not None:
            _check_ids(ids, rows)
            ids = ids.clone(memory_format=torch.contiguous_format)
        rows = rows.detach()
        if dtype != torch.int8:
            rows = _empty(rows.shape, dtype, rows.device).copy_(rows)
            return cls(rows, None, ids, None if coarse is None else _coarse_copy(rows))
        numbers = _empty(rows.shape, torch.int8, rows.device)
        scale = torch.empty(len(rows), dtype=torch.float32, device=rows.device)
        for part in _parts(rows):
            numbers[part], scale[part] = quantise(rows[part].float())
        if not bool(scale.isfinite().all()):
            row = int((~scale.isfinite()).nonzero()[0])
            raise ValueError(f"rows hold NaN or infinity, first in row {row}; int8 takes finite numbers")
        return cls(numbers, scale, ids)

    def operands(self) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """What a search reads: rows (N, d), the scales of int8 rows (N,) float32, external ids (N,) int64."""
        return self._rows, self._row_scale, self._ids

    def __len__(self) -> int:
        return self._rows.shape[0]

    @property
    def dim(self) -> int:
        """Width of a row."""
        return self._rows.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        """Precision the rows are kept and searched in."""
        return self._rows.dtype

    @property
    def device(self) -> torch.device:
        """Where the rows are."""
        return self._rows.device

    @property
    def nbytes(self) -> int:
        """Bytes of rows, scales, ids and the int8 copy."""
        return sum(x.nbytes for x in (*self.operands(), *(self.coarse or ())) if x is not None)

    def to(self, device: torch.device | str) -> "ItemTable":
        """The table on another device; itself if it is there already."""
        device = torch.device(device)
        if device == self.device:
            return self
        return self._moved(lambda x: x.to(device))

    def pin_memory(self) -> "ItemTable":
        """The table in page-locked host memory, from where queries on a GPU search it chunk by chunk; needs a GPU."""
        return self._moved(torch.Tensor.pin_memory)

    def _moved(self, move: Callable[[torch.Tensor], torch.Tensor]) -> "ItemTable":
        rows, row_scale, ids = (None if x is None else move(x) for x in self.operands())
        coarse = self.coarse and Coarse(*(None if x is None else move(x) for x in self.coarse))  # type: ignore[arg-type]
        return ItemTable(rows, row_scale, ids, coarse)  # type: ignore[arg-type]

    def rows(self, ids: torch.Tensor) -> torch.Tensor:
        """The rows of some ids, as they are searched.

        Args:
            ids: int64 of any shape, on the table's device.

        Returns:
            (*ids.shape, d) float32; int8 rows times their scale.

        Raises:
            TypeError: ids is no tensor.
            ValueError: ids are not int64, or one is not in the table.
        """
        if not isinstance(ids, torch.Tensor):
            raise TypeError(f"ids must be a torch.Tensor, got {type(ids).__name__}")
        if ids.dtype != torch.int64:
            raise ValueError(f"ids are {ids.dtype}; they take torch.int64")
        positions = self._positions(ids)
        rows = self._rows[positions].float()
        return rows if self._row_scale is None else rows * self._row_scale[positions][..., None]

    def find(self, ids: torch.Tensor) -> torch.Tensor:
        """Positions of the rows of some ids (int64, any shape); `len(self)` for ids that the table does not hold."""
        if self._ids is None:
            return ids.where((ids >= 0) & (ids < len(self)), len(self))
        if len(self) == 0:
            return torch.zeros_like(ids)
        if self._by_id is None:
            self._by_id = self._ids.sort()
        by_id, order = self._by_id
        place = torch.searchsorted(by_id, ids.contiguous()).clamp(max=len(self) - 1)  # it warns otherwise
        return order[place].where(by_id[place] == ids, len(self))

    def _positions(self, ids: torch.Tensor) -> torch.Tensor:
        positions = self.find(ids)
        unknown = positions == len(self)
        if bool(unknown.any()):
            raise ValueError(f"ids: {int(ids[unknown][0])} is not in the table")
        return positions

    def __repr__(self) -> str:
        ids = ", ids" if self._ids is not None else ""
        name = str(self.dtype).removeprefix("torch.")
        return f"ItemTable({len(self):_} x {self.dim} {name}, {_megabytes(self.nbytes)}{ids}, {self.device})"


def _empty(shape: torch.Size, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Memory for rows. NumPy asks Linux for huge pages, which torch does not: a search spends less on translating
    addresses and is 1.1 (float16) to 1.4 times (float32) as fast for one query (measured: 1,000,000 x 64 in a virtual
    machine on a Xeon with AMX).
    """
    if device.type != "cpu":
        return torch.empty(shape, dtype=dtype, device=device)
    line = 64
    nbytes = math.prod(shape) * dtype.itemsize
    room = np.empty(nbytes + line, np.uint8)
    start = -room.ctypes.data % line
    return torch.from_numpy(room[start : start + nbytes]).view(dtype).view(shape)


def _parts(rows: torch.Tensor) -> Iterator[slice]:
    """So many rows at a time that copies in float32 take 16 MB."""
    step = max(1, (1 << 22) // max(1, rows.shape[1]))
    for start in range(0, len(rows), step):
        yield slice(start, start + step)


def _coarse_copy(rows: torch.Tensor) -> Coarse:
    rotation = rotation_for(rows)
    numbers = _empty(rows.shape, torch.int8, rows.device)
    scale, error = (torch.empty(len(rows), dtype=torch.float32, device=rows.device) for _ in range(2))
    for part in _parts(rows):
        numbers[part], scale[part], error[part] = certify(rows[part], rotation)
    return Coarse(numbers, scale, error, rotation)


def _megabytes(nbytes: int) -> str:
    return f"{nbytes / 1e6:.3g} MB" if nbytes < 1e9 else f"{nbytes / 1e9:.3g} GB"


def _check_ids(ids: Any, rows: torch.Tensor) -> None:
    if not isinstance(ids, torch.Tensor):
        raise TypeError(f"ids must be a torch.Tensor, got {type(ids).__name__}")
    if ids.dtype != torch.int64 or ids.shape != rows.shape[:1]:
        raise ValueError(f"ids are {ids.dtype} of shape {tuple(ids.shape)}; they take int64 ({len(rows)},), one a row")
    if ids.device != rows.device:
        raise ValueError(f"ids are on {ids.device} and rows on {rows.device}; both must be on one device")
    by_id = ids.sort().values
    repeated = by_id[1:][by_id[1:] == by_id[:-1]]
    if len(repeated):
        raise ValueError(f"ids must be unique; {int(repeated[0])} stands there more than once")
    if len(by_id) and int(by_id[0]) < 0:
        raise ValueError(f"ids must not be negative, got {int(by_id[0])}; -1 marks a place where nothing was found")
