"""What mips_topk must return, bit for bit, in the plainest way: NumPy, one rounding at a time, one sort a query.

Nothing here calls the package, but for asking which instruction set is in use.
"""

import inspect
import os
import platform
import subprocess
import sys
from collections.abc import Collection
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

import grank_kernels as gk
from grank_kernels.backends import cpu

TESTS = Path(__file__).resolve().parent
SEGMENT = 128
KINDS = ("float32", "float16", "bfloat16", "int8")  # of tables
BACKENDS = ("cpu", "reference")


def fused(backend: str) -> bool:
    """Whether a backend rounds a multiplication and addition once."""
    return backend == "cpu" and (cpu.isa() != "baseline" or platform.machine() in ("arm64", "aarch64"))


def isas() -> list[str]:
    """The instruction sets that run here, weakest first."""
    return [] if cpu.unavailable() else [name for name, runs_here in cpu.isas().items() if runs_here]


def searching_isas() -> list[str]:
    """Those with search kernels of their own; avx512bf16 has kernels for the Ranker only."""
    return [isa for isa in isas() if isa != "avx512bf16"]


def inactive(names: list[str]) -> list[Any]:
    """The instruction sets other than the one in use, as parameters of slow tests."""
    return [pytest.param(name, marks=pytest.mark.slow) for name in names if name != cpu.isa()]


# ---- scores ----


def fma(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """a * b + c of float32, rounded once.

    float64 holds the product exactly. The sum is rounded to odd there (of its two neighbours the one with an odd last
    bit), which the second rounding, to float32, cannot turn into a wrong result.
    """
    product = a.astype(np.float64) * b
    total = product + c
    # Two roundings differ from one only beside the middle between two float32 (which lie closer to zero below 2^-126).
    doubtful = (total.view(np.int64) & 0x1FFFFFFF == 0x10000000) | (np.abs(total) < 2.0**-126)
    if doubtful.any():
        p, s, addend = product[doubtful], total[doubtful], np.broadcast_to(c, total.shape)[doubtful].astype(np.float64)
        from_addend = s - p
        error = (p - (s - from_addend)) + (addend - from_addend)  # Knuth: exactly what was rounded away
        move = (error != 0) & (s.view(np.int64) & 1 == 0)
        total[doubtful] = np.where(move, np.nextafter(s, np.copysign(np.inf, error)), s)
    return total.astype(np.float32)


def float_scores(queries: np.ndarray, rows: np.ndarray, once: bool) -> np.ndarray:
    """(B, N): products added over j ascending in segments of 128, rounded once a step or twice."""
    total = np.zeros((len(queries), len(rows)), np.float32)
    with np.errstate(all="ignore"):
        for begin in range(0, queries.shape[1], SEGMENT):
            partial = np.zeros_like(total)
            for j in range(begin, min(begin + SEGMENT, queries.shape[1])):
                q, x = queries[:, j, None], rows[None, :, j]
                partial = fma(q, x, partial) if once else partial + q * x
            total = total + partial
    return total


def quantise(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """int8 numbers (as int64) and the scale of every row: max|row| / 127, half to even."""
    with np.errstate(all="ignore"):
        scale = np.max(np.abs(x), axis=1, initial=0) / np.float32(127)
        numbers = np.clip(np.rint(x / scale[:, None]), -127, 127)
    return np.nan_to_num(numbers, nan=0).astype(np.int64), scale.astype(np.float32)


def int8_scores(queries: np.ndarray, rows: np.ndarray) -> np.ndarray:
    (q, q_scale), (x, x_scale) = quantise(queries), quantise(rows)
    with np.errstate(all="ignore"):
        return (q @ x.T).astype(np.float32) * (q_scale[:, None] * x_scale[None, :])


def scores(queries: torch.Tensor, rows: torch.Tensor, kind: str, backend: str) -> np.ndarray:
    """(B, N) float32 of a table of that kind made of `rows`."""
    q, x = queries.detach().float().numpy(), rows.detach()
    if kind == "int8":
        return int8_scores(q, x.float().numpy())
    return float_scores(q, x.to(getattr(torch, kind)).float().numpy(), fused(backend))


# ---- selection ----


def eligible(B: int, N: int, ids: np.ndarray, exclude: Any = None, allow: torch.Tensor | None = None) -> np.ndarray:
    """(B, N): what the filters leave."""
    left = np.ones((B, N), bool) if allow is None else np.broadcast_to(allow.numpy(), (B, N)).copy()
    for b in range(B):
        if isinstance(exclude, torch.Tensor):
            left[b] &= ~np.isin(ids, exclude.reshape(B, -1)[b].numpy())
        elif exclude is not None:
            offsets, excluded = exclude
            left[b] &= ~np.isin(ids, excluded[int(offsets[b]) : int(offsets[b + 1])].numpy())
    return left


def best(scores: np.ndarray, k: int, ids: np.ndarray, left: np.ndarray) -> gk.TopK:
    """By (score descending, id ascending), NaN left out, -inf and -1 where nothing is left."""
    values = np.full((len(scores), k), -np.inf, np.float32)
    found = np.full((len(scores), k), -1, np.int64)
    for b, row in enumerate(scores):
        place = np.flatnonzero(left[b] & ~np.isnan(row))
        place = place[np.lexsort((ids[place], -row[place]))][:k]
        values[b, : len(place)], found[b, : len(place)] = row[place] + np.float32(0), ids[place]
    return gk.TopK(torch.from_numpy(values), torch.from_numpy(found))


def expected(
    queries: torch.Tensor,
    rows: torch.Tensor,
    k: int,
    *,
    kind: str,
    backend: str,
    ids: torch.Tensor | None = None,
    exclude: Any = None,
    allow: torch.Tensor | None = None,
) -> gk.TopK:
    """What `search` of the same arguments must return."""
    B, N = len(queries), len(rows)
    numbers = np.arange(N) if ids is None else ids.numpy()
    return best(scores(queries, rows, kind, backend), k, numbers, eligible(B, N, numbers, exclude, allow))


# ---- searching and comparing ----


def items_of(rows: torch.Tensor, kind: str, ids: torch.Tensor | None = None) -> "torch.Tensor | gk.ItemTable":
    """A table of that kind; a plain tensor where that can hold it."""
    if kind != "int8" and ids is None:
        return rows.to(getattr(torch, kind))
    return gk.ItemTable.from_rows(rows, dtype=getattr(torch, kind), ids=ids)


def search(
    queries: torch.Tensor,
    rows: torch.Tensor,
    k: int,
    *,
    kind: str,
    backend: str,
    ids: torch.Tensor | None = None,
    **filters: Any,
) -> gk.TopK:
    return gk.mips_topk(queries, items_of(rows, kind, ids), k, backend=backend, **filters)


def assert_same(got: gk.TopK, want: gk.TopK, case: str = "") -> None:
    """Equal ids, and equal scores bit for bit (so 0.0 is not -0.0)."""
    assert got.values.dtype == torch.float32, case
    assert got.indices.dtype == torch.int64, case
    assert got.values.shape == want.values.shape == got.indices.shape == want.indices.shape, case
    wrong = (got.indices != want.indices) | (got.values.view(torch.int32) != want.values.view(torch.int32))
    if bool(wrong.any()):
        first = tuple(int(i) for i in wrong.nonzero()[0])
        raise AssertionError(
            f"{case}: {int(wrong.sum())} of {wrong.numel()} places differ, first {first}: "
            f"got {float(got.values[first])!r} of {int(got.indices[first])}, "
            f"want {float(want.values[first])!r} of {int(want.indices[first])}"
        )


def check(queries: torch.Tensor, rows: torch.Tensor, k: int, *, kind: str, backend: str, **more: Any) -> gk.TopK:
    """Searches and compares with what is expected; returns the result."""
    got = search(queries, rows, k, kind=kind, backend=backend, **more)
    assert_same(got, expected(queries, rows, k, kind=kind, backend=backend, **more))
    return got


def integers(*shape: int, most: int = 4) -> torch.Tensor:
    """Whole numbers so small that every way to add their products is exact, in every dtype.

    The first number of every row is `most`, and 127 / most divides what int8 makes of them: with most = 127 an int8
    table holds them as they are.
    """
    x = torch.randint(-most, most + 1, shape).float()
    x[..., :1] = most
    return x


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs code in a process of its own, with warnings as errors; the tests' folder and the package can be imported.

    Triton's interpreter, which conftest.py asks for, must be asked for again.
    """
    package = Path(gk.__file__).resolve().parent.parent
    inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env = {**inherited, **environment, "PYTHONPATH": os.pathsep.join([str(package), str(TESTS)])}
    return subprocess.run(  # the limit only ends a deadlock
        [sys.executable, "-W", "error", "-c", code], env=env, text=True, capture_output=True, timeout=900
    )


def contract_of(modules: Collection[ModuleType], left_out: Collection[str]) -> dict[str, Any]:
    """The tests of modules with the fixture `backend`: a module with another `backend` can run them again."""
    tests = {
        name: test
        for module in modules
        for name, test in vars(module).items()
        if inspect.isfunction(test) and name.startswith("test_")
    }
    assert set(left_out) <= set(tests)
    return {
        name: test
        for name, test in tests.items()
        if "backend" in inspect.signature(test).parameters and name not in left_out
    }
