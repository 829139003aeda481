"""Cases shared by the tests of mips_topk: hypothesis problems, kinds of tables, reserved memory."""

import math
import mmap
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st
from oracle import KINDS, assert_same

import grank_kernels as gk

HOSTILE = [
    0.0, -0.0, 1.0, -1.0, math.inf, -math.inf, math.nan, 1e-45, -1e-45, 1.1754944e-38, 1.1754942e-38, 3.4028235e38,
    -3.4028235e38, 1.8446744e19, 1e-23, 65504.0, 65520.0, 6e-8, 5.9e-8, 1 / 3, 127.0, 0.5, 1.5, 16777216.0, 16777217.0,
]  # fmt: skip
numbers = st.one_of(st.sampled_from(HOSTILE), st.floats(width=32), st.floats(-4, 4, width=32))


@dataclass
class Problem:
    queries: torch.Tensor
    rows: torch.Tensor
    k: int
    kind: str
    filters: dict[str, Any]


def fill(draw: st.DrawFn, shape: tuple[int, int], finite: bool = False) -> torch.Tensor:
    """Random numbers from a small pool: mostly extreme values, or a few of them among ordinary ones."""
    pool = np.array(draw(st.lists(numbers, min_size=1, max_size=8)), np.float32)
    if finite:
        pool = np.nan_to_num(pool, nan=1.0)  # infinities become the largest finite numbers
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    chosen = pool[random.integers(0, len(pool), shape)]
    ordinary = random.standard_normal(shape).astype(np.float32)
    share = draw(st.sampled_from([0.0, 0.01, 0.3, 1.0]))
    return torch.from_numpy(np.where(random.random(shape) < share, chosen, ordinary))


@st.composite
def problems(draw: st.DrawFn, kinds: tuple[str, ...] = KINDS) -> Problem:
    kind = draw(st.sampled_from(kinds))
    B, d = draw(st.integers(0, 9)), draw(st.one_of(st.integers(0, 20), st.sampled_from([127, 128, 129, 140])))
    N = draw(st.one_of(st.integers(0, 140), st.sampled_from([2047, 2049])))
    k = draw(st.one_of(st.integers(1, 20), st.integers(1, N + 3)))
    queries = fill(draw, (B, d))
    if draw(st.booleans()):
        queries = queries.to(draw(st.sampled_from([torch.float16, torch.bfloat16])))
    rows = fill(draw, (N, d), finite=kind == "int8")
    if draw(st.booleans()) and N > 0:  # equal rows
        rows = rows[torch.randint(0, min(N, 5), (N,), generator=torch.Generator().manual_seed(B))]
    filters: dict[str, Any] = {}
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    ids = np.arange(N)
    if draw(st.booleans()):
        ids = random.permutation(3 * N + 1)[:N] + draw(st.sampled_from([0, 2**33, 2**62]))
        filters["ids"] = torch.from_numpy(ids)
    if draw(st.booleans()):
        shape = draw(st.sampled_from([(N,), (B, N)]))
        filters["allow"] = torch.from_numpy(random.random(shape) < draw(st.sampled_from([0.0, 0.05, 0.5, 1.0])))
    if draw(st.booleans()):
        count = draw(st.integers(0, 12))
        excluded = ids[random.integers(0, N, B * count)] if N > 0 else np.full(B * count, -1)
        excluded = torch.from_numpy(np.where(random.random(B * count) < 0.1, -1, excluded).astype(np.int64))
        padded = excluded.reshape(B, count)
        filters["exclude"] = padded if draw(st.booleans()) else (torch.arange(B + 1) * count, excluded)
    return Problem(queries, rows, k, kind, filters)


def reserved(count: int, dtype: torch.dtype) -> torch.Tensor:
    """Zeros in untouched pages, which take no memory."""
    size = count * dtype.itemsize
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0)
    return torch.frombuffer(mmap.mmap(-1, size, flags=flags), dtype=dtype)


# ---- certified tables ----


def rows_like(shape: str, n: int, d: int) -> torch.Tensor:
    x = torch.randn(n, d)
    match shape:
        case "heavy rows":
            x *= torch.exp(torch.randn(n, 1) * 1.5)
        case "heavy columns":
            x *= torch.exp(torch.linspace(-4, 4, d))
        case "spiky":
            x *= torch.rand(n, d) < 0.03
        case "clusters":
            x = x[torch.randint(0, 50, (n,))] + 0.01 * torch.randn(n, d)
        case "duplicates":
            x = x[torch.randint(0, n // 20 + 1, (n,))]
        case "unit":
            x /= x.norm(dim=1, keepdim=True)
        case "decades":
            x *= 10.0 ** torch.empty(n, 1).uniform_(-6, 4)
        case "low rank":
            x = torch.randn(n, 3) @ torch.randn(3, d) + 1e-3 * x
        case "equal":
            x = x[:1].repeat(n, 1)
        case "sorted":
            x = x[(x @ torch.ones(d)).argsort()]
    return x.clamp(-6e4, 6e4)


def tables(rows: torch.Tensor, kind: str, ids: torch.Tensor | None = None) -> tuple[gk.ItemTable, gk.ItemTable]:
    """A table of the rows, and one with an int8 copy beside them."""
    dtype = getattr(torch, kind)
    return (
        gk.ItemTable.from_rows(rows, ids=ids, dtype=dtype),
        gk.ItemTable.from_rows(rows, ids=ids, dtype=dtype, coarse=torch.int8),
    )


def both(queries: torch.Tensor, rows: torch.Tensor, k: int, kind: str, backend: str, **more: Any) -> gk.ItemTable:
    """Asserts that searches with and without the int8 copy agree; returns the table with it."""
    exact, certified = tables(rows, kind, more.pop("ids", None))
    want = gk.mips_topk(queries, exact, k, backend=backend, **more)
    assert_same(gk.mips_topk(queries, certified, k, backend=backend, **more), want)
    return certified


def operands(backend: str) -> tuple[Any, ...]:
    rows = rows_like("low rank", 300, 8)
    table = gk.ItemTable.from_rows(rows, coarse=torch.int8)
    assert table.current.coarse is not None
    assert table.current.coarse.basis is not None
    queries = torch.randn(3, 8, requires_grad=True)
    return queries, rows, *table.current.coarse, None, 5, None, None, torch.rand(300) < 0.5, backend
