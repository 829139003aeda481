"""Oracle of mips_topk, bit for bit: NumPy, one rounding at a time, one sort per query.

Independent of the package, except for the name of the active instruction set.
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
KINDS = ("float32", "float16", "bfloat16", "int8")  # dtypes of tables
BACKENDS = ("cpu", "reference")


def fused(backend: str) -> bool:
    """Whether a backend uses fused multiply-add."""
    return backend == "cpu" and (cpu.isa() != "baseline" or platform.machine() in ("arm64", "aarch64"))


def isas() -> list[str]:
    """Instruction sets that this machine can run, weakest first."""
    return [] if cpu.unavailable() else [name for name, runs_here in cpu.isas().items() if runs_here]


def searching_isas() -> list[str]:
    """Instruction sets with search kernels; avx512bf16 has kernels for the Ranker only."""
    return [isa for isa in isas() if isa != "avx512bf16"]


def inactive(names: list[str]) -> list[Any]:
    """Every instruction set but the active one, as parameters of slow tests."""
    return [pytest.param(name, marks=pytest.mark.slow) for name in names if name != cpu.isa()]


# ---- scores ----


def fma(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """a * b + c of float32, rounded once.

    The product is exact in float64. The sum is rounded to odd in float64 (to the neighbour with an odd last bit), so
    the second rounding, to float32, is correct.
    """
    product = a.astype(np.float64) * b
    total = product + c
    # Two roundings differ from one only near the midpoint of two float32 numbers (spaced evenly below 2^-126).
    doubtful = (total.view(np.int64) & 0x1FFFFFFF == 0x10000000) | (np.abs(total) < 2.0**-126)
    if doubtful.any():
        p, s, addend = product[doubtful], total[doubtful], np.broadcast_to(c, total.shape)[doubtful].astype(np.float64)
        from_addend = s - p
        error = (p - (s - from_addend)) + (addend - from_addend)  # the rounding error, exactly (Knuth's TwoSum)
        move = (error != 0) & (s.view(np.int64) & 1 == 0)
        total[doubtful] = np.where(move, np.nextafter(s, np.copysign(np.inf, error)), s)
    return total.astype(np.float32)


def float_scores(queries: np.ndarray, rows: np.ndarray, once: bool) -> np.ndarray:
    """(B, N): products added over j ascending in segments of 128, rounded once per step (fused) or twice."""
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
    """int8 numbers (as int64) and scale max|row| / 127 of every row, rounded half to even."""
    with np.errstate(all="ignore"):
        scale = np.max(np.abs(x), axis=1, initial=0) / np.float32(127)
        numbers = np.clip(np.rint(x / scale[:, None]), -127, 127)
    return np.nan_to_num(numbers, nan=0).astype(np.int64), scale.astype(np.float32)


def int8_scores(queries: np.ndarray, rows: np.ndarray) -> np.ndarray:
    (q, q_scale), (x, x_scale) = quantise(queries), quantise(rows)
    with np.errstate(all="ignore"):
        return (q @ x.T).astype(np.float32) * (q_scale[:, None] * x_scale[None, :])


def scores(queries: torch.Tensor, rows: torch.Tensor, kind: str, backend: str) -> np.ndarray:
    """Scores (B, N), float32, of a table with dtype `kind` made of `rows`."""
    q, x = queries.detach().float().numpy(), rows.detach()
    if kind == "int8":
        return int8_scores(q, x.float().numpy())
    return float_scores(q, x.to(getattr(torch, kind)).float().numpy(), fused(backend))


# ---- selection ----


def eligible(B: int, N: int, ids: np.ndarray, exclude: Any = None, allow: torch.Tensor | None = None) -> np.ndarray:
    """Eligible rows as a bool mask (B, N)."""
    left = np.ones((B, N), bool) if allow is None else np.broadcast_to(allow.numpy(), (B, N)).copy()
    for b in range(B):
        if isinstance(exclude, torch.Tensor):
            left[b] &= ~np.isin(ids, exclude.reshape(B, -1)[b].numpy())
        elif exclude is not None:
            offsets, excluded = exclude
            left[b] &= ~np.isin(ids, excluded[int(offsets[b]) : int(offsets[b + 1])].numpy())
    return left


def best(scores: np.ndarray, k: int, ids: np.ndarray, left: np.ndarray) -> gk.TopK:
    """The k best by (score descending, id ascending) without NaN, filled with (-inf, -1)."""
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
    """The result that `search` must return for the same arguments."""
    B, N = len(queries), len(rows)
    numbers = np.arange(N) if ids is None else ids.numpy()
    return best(scores(queries, rows, kind, backend), k, numbers, eligible(B, N, numbers, exclude, allow))


# ---- searching and comparing ----


def items_of(rows: torch.Tensor, kind: str, ids: torch.Tensor | None = None) -> "torch.Tensor | gk.ItemTable":
    """The rows as a tensor if `kind` is a float dtype and there are no ids, otherwise as a table."""
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
    """Asserts equal ids and equal bits of scores (0.0 differs from -0.0)."""
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
    """Searches, compares with the oracle, and returns the result."""
    got = search(queries, rows, k, kind=kind, backend=backend, **more)
    assert_same(got, expected(queries, rows, k, kind=kind, backend=backend, **more))
    return got


def integers(*shape: int, most: int = 4) -> torch.Tensor:
    """Whole numbers small enough for exact sums of products in every dtype and order.

    The first number of every row is `most`, so int8 multiplies the row by 127 / most; with most = 127 an int8 table
    stores the numbers unchanged.
    """
    x = torch.randint(-most, most + 1, shape).float()
    x[..., :1] = most
    return x


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs code in a child process, with warnings as errors and the tests' folder on the path.

    TRITON_INTERPRET, which conftest.py sets, is not inherited: pass it if the code needs it.
    """
    package = Path(gk.__file__).resolve().parent.parent
    inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env = {**inherited, **environment, "PYTHONPATH": os.pathsep.join([str(package), str(TESTS)])}
    return subprocess.run(  # the timeout ends deadlocks
        [sys.executable, "-W", "error", "-c", code], env=env, text=True, capture_output=True, timeout=900
    )


def contract_of(modules: Collection[ModuleType], left_out: Collection[str]) -> dict[str, Any]:
    """The tests of modules with the fixture `backend`, for a module that redefines `backend`."""
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
