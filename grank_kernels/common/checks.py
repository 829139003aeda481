"""What the ops check at their doors, in one voice: the argument, what it got, what it takes."""

from itertools import pairwise
from typing import Any

import numpy as np
import torch

from grank_kernels.common.arrays import as_tensor

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
INTEGERS = (torch.int64, torch.int32)


def shape_of(x: torch.Tensor) -> str:
    """For messages."""
    return str(tuple(x.shape))


def check_tensor(name: str, x: Any, dtypes: tuple[torch.dtype, ...], dims: tuple[int, ...]) -> None:
    """Type, dtype and number of dimensions of an argument."""
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
    if x.dtype not in dtypes:
        takes = f"{', '.join(map(str, dtypes))}: {name}.to({dtypes[0]}) converts"
        raise ValueError(_sentence(name, f"is {x.dtype}; it takes {takes}"))
    if x.dim() not in dims:
        takes = " or ".join(map(str, dims))
        raise ValueError(_sentence(name, f"has shape {shape_of(x)}; it takes {takes} dimensions"))


def check_operand(
    name: str, x: Any, dtypes: tuple[torch.dtype, ...], symbols: str, shape: tuple[int | torch.SymInt, ...]
) -> None:
    """A tensor whose shape follows from other arguments; `symbols` are the letters that it is documented with."""
    check_tensor(name, x, dtypes, (len(shape),))
    if x.shape != shape:
        raise ValueError(_sentence(name, f"has shape {shape_of(x)}; it takes {symbols} = {tuple(shape)}"))


def check_device(name: str, x: torch.Tensor | None, other: str, device: torch.device) -> None:
    """That an argument, if it is there, is where the `other` one is."""
    if x is not None and x.device != device:
        raise ValueError(_sentence(name, f"is on {x.device} and {other} on {device}; both must be on one device"))


def _sentence(name: str, text: str) -> str:
    """Of one thing or of several: "q is", "queries are"."""
    if name.endswith("s"):
        text = text.replace("is ", "are ", 1) if text.startswith("is ") else text.replace("has ", "have ", 1)
        text = text.replace("it takes", "they take")
    return f"{name} {text}"


def check_number(name: str, x: Any) -> None:
    """That an argument is a float, or an int that stands for one."""
    if not isinstance(x, (int, float, torch.SymFloat, torch.SymInt)) or isinstance(x, bool):
        raise TypeError(f"{name} must be a float, got {type(x).__name__}")


def check_choice(name: str, x: Any, choices: tuple[str, ...]) -> None:
    """That an argument is one of a few words."""
    if x not in choices:
        raise ValueError(f"{name} is {x!r}; it takes one of {', '.join(map(repr, choices))}")


def check_k(k: Any) -> Any:
    """That k is an int, 1 or more; one of NumPy becomes Python's."""
    if isinstance(k, np.integer):
        k = int(k)
    if not isinstance(k, (int, torch.SymInt)) or isinstance(k, bool):
        raise TypeError(f"k must be an int, got {type(k).__name__} {k!r}")
    if k < 1:
        raise ValueError(f"k must be 1 or more, got {k}")
    return k


def exclusions(exclude: Any, B: int, one: bool, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """What `exclude` holds for B queries: offsets (B + 1,) and ids, whichever way they came."""
    pair = isinstance(exclude, (tuple, list)) and len(exclude) == 2
    exclude = tuple(as_tensor("exclude", x) for x in exclude) if pair else as_tensor("exclude", exclude)
    for x in exclude if pair else (exclude,):
        if not isinstance(x, torch.Tensor):
            raise TypeError(
                f"exclude must be an int64 tensor (B, E) or a pair of int64 tensors (offsets, ids), "
                f"got {'a pair with ' if pair else ''}{type(x).__name__}"
            )
        if x.dtype != torch.int64:
            raise ValueError(f"exclude is {x.dtype}; it takes torch.int64: exclude.to(torch.int64) converts")
        check_device("exclude", x, "queries", device)
    if pair:
        offsets, ids = exclude
        if offsets.dim() != 1 or ids.dim() != 1 or offsets.shape[0] != B + 1:
            raise ValueError(
                f"exclude has offsets {shape_of(offsets)} and ids {shape_of(ids)}; for {B} queries it takes "
                f"offsets ({B + 1},) and ids of one dimension"
            )
        return offsets, ids
    if one and exclude.dim() == 1:
        exclude = exclude[None]
    if exclude.dim() != 2 or exclude.shape[0] != B:
        raise ValueError(f"exclude has shape {shape_of(exclude)}; for {B} queries it takes ({B}, E)")
    E = exclude.shape[1]
    return torch.arange(B + 1, device=device) * E, exclude.reshape(-1)


def check_offsets(name: str, offsets: torch.Tensor, end: int) -> None:
    """What only the data can tell of offsets into `end` rows. Not on a GPU, which one would have to wait for."""
    if not offsets.is_cpu:
        return
    bounds = offsets.tolist()
    if bounds[0] < 0 or bounds[-1] > end:
        raise ValueError(f"{name}: offsets run from {bounds[0]} to {bounds[-1]}; they take 0 to {end}")
    if any(start > stop for start, stop in pairwise(bounds)):
        raise ValueError(f"{name}: offsets must not decrease")


def check_exclude(offsets: torch.Tensor, excluded: torch.Tensor, limit: int | None) -> None:
    """What only the data can tell: offsets that lead outside the ids, and ids outside [-1, limit)."""
    check_offsets("exclude", offsets, len(excluded))
    used = excluded[int(offsets[0]) : int(offsets[-1])]
    wrong = used[(used < -1) | (used >= limit)] if limit is not None else used[used < -1]
    if len(wrong):
        top = "2^63" if limit is None else limit
        raise ValueError(f"exclude: id {int(wrong[0])} is out of range; it takes ids in [-1, {top}), -1 for none")
