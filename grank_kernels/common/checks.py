"""Argument validation shared by the public functions: `<argument> must be <what it takes>, got <what it got>`."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from grank_kernels.common.arrays import as_tensor

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
INTEGERS = (torch.int64, torch.int32)


def shape_of(x: torch.Tensor) -> str:
    """The shape as a message shows it."""
    return str(tuple(x.shape))


def one_of(words: Sequence[object]) -> str:
    """A list for a message: "a, b or c"."""
    *first, last = map(str, words)
    return f"{', '.join(first)} or {last}" if first else last


def round_up(x: int, multiple: int) -> int:
    """The smallest multiple of `multiple` that is x or more."""
    return -(-x // multiple) * multiple


# ---- tensors ----


def check_tensor(
    name: str, x: Any, dtypes: tuple[torch.dtype, ...], dims: tuple[int, ...], kinds: str = "a torch.Tensor or an array"
) -> torch.Tensor:
    """A tensor or an array as a tensor, of one of these dtypes and numbers of dimensions; messages name `kinds`."""
    tensor = as_tensor(name, x)
    if not isinstance(tensor, torch.Tensor):
        fix = f": {name}.to_numpy() converts" if hasattr(x, "to_numpy") else ""
        raise TypeError(f"{name} must be {kinds}, got {type(x).__name__}{fix}")
    if tensor.dtype not in dtypes:
        fix = _conversion(name, x, tensor.dtype, dtypes[0])
        raise ValueError(f"{name} must be {one_of(dtypes)}, got {tensor.dtype}{fix}")
    if tensor.dim() not in dims:
        raise ValueError(f"{name} must have {one_of(dims)} dimension{'s' * (dims != (1,))}, got {shape_of(tensor)}")
    return tensor


def check_operand(
    name: str, x: Any, dtypes: tuple[torch.dtype, ...], symbols: str, shape: tuple[int | torch.SymInt, ...]
) -> torch.Tensor:
    """A tensor whose shape follows from other arguments; `symbols` are the letters it is documented with."""
    tensor = check_tensor(name, x, dtypes, (len(shape),))
    if tensor.shape != shape:
        raise ValueError(f"{name} must be {symbols} = {tuple(shape)}, got {shape_of(tensor)}")
    return tensor


def check_device(name: str, x: torch.Tensor | None, other: str, device: torch.device) -> None:
    """That an argument, if given, is on the device of the `other` one."""
    if x is not None and x.device != device:
        raise ValueError(f"{name} must be on {device}, the device of {other}, got {x.device}")


def _conversion(name: str, x: Any, given: torch.dtype, wanted: torch.dtype) -> str:
    """The call that converts a dtype; nothing where that would change what the numbers mean."""
    if given.is_complex or given == torch.bool or wanted == torch.bool:
        return ""
    if given.is_floating_point != wanted.is_floating_point:
        return ""
    if isinstance(x, np.ndarray):
        return f': {name}.astype("{str(wanted).removeprefix("torch.")}") converts'
    return f": {name}.to({wanted}) converts"


# ---- numbers and words ----


def check_int(name: str, x: Any, least: int) -> Any:
    """An int of at least `least`, NumPy's as Python's."""
    if isinstance(x, np.integer):
        x = int(x)
    if not isinstance(x, (int, torch.SymInt)) or isinstance(x, bool):
        raise TypeError(f"{name} must be an int, got {type(x).__name__} {x!r}")
    if x < least:
        raise ValueError(f"{name} must be {least} or more, got {x}")
    return x


def check_number(name: str, x: Any) -> None:
    """That an argument is a float, or an int in its place."""
    if not isinstance(x, (int, float, torch.SymFloat, torch.SymInt)) or isinstance(x, bool):
        raise TypeError(f"{name} must be a float, got {type(x).__name__}")


def check_choice(name: str, x: Any, choices: Sequence[object]) -> None:
    """That an argument is one of a few values."""
    if x not in choices:
        raise ValueError(f"{name} must be {one_of(list(map(repr, choices)))}, got {x!r}")


# ---- ragged lists: offsets and excluded ids ----

Exclusions = tuple[torch.Tensor, torch.Tensor]


def exclusions(exclude: Any, B: int, one: bool, device: torch.device, rows: str = "queries") -> Exclusions:
    """Offsets (B + 1,) and ids of any form of `exclude`; `one`: the caller passed one query (d,).

    `rows` is the argument's name in messages.

    Forms: a tuple (offsets, ids); a list of one entry a query; a tensor (B, E), or (E,) for one query.
    """
    if isinstance(exclude, tuple):
        return _exclusions_of_pair(exclude, B, device, rows)
    if isinstance(exclude, list):
        return _exclusions_of_list(exclude, B, device, rows)
    ids = check_tensor("exclude", exclude, (torch.int64,), (1, 2) if one else (2,))
    check_device("exclude", ids, rows, device)
    if ids.dim() == 1:
        ids = ids[None]
    if ids.shape[0] != B:
        raise ValueError(f"exclude must be ({B}, E) for {B} {rows}, got {shape_of(ids)}")
    return torch.arange(B + 1, device=device) * ids.shape[1], ids.reshape(-1)


def _exclusions_of_pair(pair: tuple[Any, ...], B: int, device: torch.device, rows: str) -> Exclusions:
    if len(pair) != 2:
        raise ValueError(f"exclude must be a pair (offsets, ids) if it is a tuple, got {len(pair)} entries")
    offsets = check_tensor("exclude's offsets", pair[0], (torch.int64,), (1,))
    ids = check_tensor("exclude's ids", pair[1], (torch.int64,), (1,))
    check_device("exclude's offsets", offsets, rows, device)
    check_device("exclude's ids", ids, rows, device)
    if offsets.shape[0] != B + 1:
        raise ValueError(f"exclude's offsets must be ({B + 1},) for {B} {rows}, got {shape_of(offsets)}")
    return offsets, ids


def _exclusions_of_list(entries: list[Any], B: int, device: torch.device, rows: str) -> Exclusions:
    if len(entries) != B:
        raise ValueError(f"exclude must have {B} entries for {B} {rows} if it is a list, got {len(entries)}")
    ids = []
    for b, entry in enumerate(entries):
        if isinstance(entry, (list, tuple)):
            if not all(isinstance(x, (int, np.integer)) and not isinstance(x, bool) for x in entry):
                raise TypeError(f"exclude[{b}] must hold ints, got {list(entry)}")
            beyond = next((x for x in map(int, entry) if not -(1 << 63) <= x < 1 << 63), None)
            if beyond is not None:
                raise ValueError(f"exclude[{b}] must hold ids below 2^63, got {beyond}")
            ids.append(torch.tensor(entry, dtype=torch.int64, device=device))
        else:
            ids.append(check_tensor(f"exclude[{b}]", entry, (torch.int64,), (1,)))
            check_device(f"exclude[{b}]", ids[-1], rows, device)
    ends = torch.tensor([0, *(len(x) for x in ids)], device=device).cumsum(0)
    return ends, torch.cat([torch.empty(0, dtype=torch.int64, device=device), *ids])


def check_offsets(name: str, offsets: torch.Tensor, end: int) -> None:
    """That offsets do not decrease and lie in [0, end]. Not checked on a GPU, where reading them would synchronise."""
    if not offsets.is_cpu:
        return
    bounds = offsets.tolist()
    if bounds[0] < 0 or bounds[-1] > end:
        raise ValueError(f"{name} must lie in [0, {end}], got {bounds[0]} to {bounds[-1]}")
    if any(start > stop for start, stop in pairwise(bounds)):
        raise ValueError(f"{name} must not decrease, got {next(p for p in pairwise(bounds) if p[0] > p[1])}")


def check_exclude(offsets: torch.Tensor, excluded: torch.Tensor, limit: int | None) -> None:
    """That offsets stay within the ids, and ids within [-1, limit). Not checked on a GPU."""
    if not offsets.is_cpu:
        return
    check_offsets("exclude's offsets", offsets, len(excluded))
    used = excluded[int(offsets[0]) : int(offsets[-1])]
    if not len(used):
        return
    low, high = (int(x) for x in used.aminmax())
    if low < -1 or (limit is not None and high >= limit):
        top = "2^63" if limit is None else limit
        raise ValueError(f"exclude must hold ids in [-1, {top}), -1 for none, got {low if low < -1 else high}")
