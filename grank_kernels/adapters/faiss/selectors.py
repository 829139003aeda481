"""FAISS's selectors: the ids that a search may return, or that a removal removes."""

from typing import Any

import numpy as np
import numpy.typing as npt

Ids = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]


class IDSelector:
    """A set of ids."""

    def members(self, ids: Ids) -> Mask:
        """Which ids of an array are in the set, bool of the same shape."""
        raise NotImplementedError

    def is_member(self, id: int) -> bool:
        """Whether an id is in the set."""
        return bool(self.members(np.asarray([id], np.int64))[0])


class IDSelectorAll(IDSelector):
    """All ids."""

    def members(self, ids: Ids) -> Mask:
        """True for each id."""
        return np.ones(ids.shape, bool)


class IDSelectorRange(IDSelector):
    """The ids from `imin` up to, and without, `imax`."""

    def __init__(self, imin: int, imax: int, assume_sorted: bool = False) -> None:
        """Takes the bounds; `assume_sorted` chooses a search of FAISS with the same result, and changes nothing."""
        self.imin, self.imax, self.assume_sorted = imin, imax, assume_sorted

    def members(self, ids: Ids) -> Mask:
        """True from `imin` to `imax` - 1."""
        return (ids >= self.imin) & (ids < self.imax)


class IDSelectorArray(IDSelector):
    """The ids of an array, called with the array, or with its length and the array as in C++."""

    def __init__(self, *args: Any) -> None:
        self.ids = _array("ids", args, np.int64)

    def members(self, ids: Ids) -> Mask:
        """True for ids in the array."""
        return np.isin(ids, self.ids)


class IDSelectorBatch(IDSelectorArray):
    """The same as `IDSelectorArray`; in FAISS it is the faster one of the two for many ids."""


class IDSelectorBitmap(IDSelector):
    """The ids whose bit is set: id i is bit i % 8 of byte i // 8."""

    def __init__(self, *args: Any) -> None:
        """Takes the bytes, or their number and the bytes as in C++."""
        self.bitmap = _array("bitmap", args, np.uint8)

    def members(self, ids: Ids) -> Mask:
        """True for ids whose bit is set; False beyond the bitmap."""
        inside = (ids >= 0) & (ids < 8 * len(self.bitmap))
        known = np.where(inside, ids, 0)
        bytes_ = self.bitmap[known >> 3] if len(self.bitmap) else np.zeros_like(known, np.uint8)
        bit = np.right_shift(bytes_, (known & 7).astype(np.uint8)) & 1
        marked: Mask = inside & (bit == 1)
        return marked


class IDSelectorNot(IDSelector):
    """The ids that are not in a selector."""

    def __init__(self, sel: IDSelector) -> None:
        self.sel = sel

    def members(self, ids: Ids) -> Mask:
        """True for ids that the selector lacks."""
        return ~self.sel.members(ids)


class _OfTwo(IDSelector):
    def __init__(self, lhs: IDSelector, rhs: IDSelector) -> None:
        self.lhs, self.rhs = lhs, rhs


class IDSelectorAnd(_OfTwo):
    """The ids in both selectors."""

    def members(self, ids: Ids) -> Mask:
        """True for ids in both."""
        return self.lhs.members(ids) & self.rhs.members(ids)


class IDSelectorOr(_OfTwo):
    """The ids in at least one of two selectors."""

    def members(self, ids: Ids) -> Mask:
        """True for ids in either."""
        return self.lhs.members(ids) | self.rhs.members(ids)


class IDSelectorXOr(_OfTwo):
    """The ids in exactly one of two selectors."""

    def members(self, ids: Ids) -> Mask:
        """True for ids in one alone."""
        return self.lhs.members(ids) ^ self.rhs.members(ids)


class SearchParameters:
    """Parameters of one search: the ids that it may return."""

    def __init__(self, sel: IDSelector | None = None) -> None:
        """Takes a selector; None: all ids.

        Raises:
            TypeError: sel is not a selector of this module.
        """
        if sel is not None and not isinstance(sel, IDSelector):
            raise TypeError(f"sel must be an IDSelector of grank_kernels.adapters.faiss or None, got {_kind(sel)}")
        self.sel = sel


def selector_of(params: SearchParameters | None) -> IDSelector | None:
    """The selector of a search's parameters; None: all ids."""
    if params is None:
        return None
    if not isinstance(params, SearchParameters):
        raise TypeError(
            f"params must be SearchParameters of grank_kernels.adapters.faiss or None, got {_kind(params)}; "
            "an exact search has no others"
        )
    return params.sel


def _kind(x: object) -> str:
    return f"{type(x).__module__}.{type(x).__name__}"


def _array(name: str, args: tuple[Any, ...], dtype: type[Any]) -> npt.NDArray[Any]:
    """A copy of the array in (array,) or (length, array)."""
    if len(args) not in (1, 2):
        raise TypeError(f"{name} must be an array, or a length and an array, got {len(args)} arguments")
    array = np.array(args[-1], dtype).reshape(-1)
    if len(args) == 2:
        if not 0 <= args[0] <= len(array):
            raise ValueError(f"the length of {name} must be in [0, {len(array)}], got {args[0]}")
        array = array[: args[0]]
    return array
