"""Representative calls of the CPU kernels, every op and dtype: small ones to count, large ones to time.

They use public names only, so the package of another commit can run them, and fixed numbers, so every run executes the
same instructions.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch

import grank_kernels as gk

Call = Callable[[], object]
MASK = (1 << 32) - 1


class Sizes(NamedTuple):
    """A table of N x d, B queries per call, k results; U users with C candidates and histories of length L."""

    N: int
    batches: tuple[int, ...]
    k: int
    U: int
    C: int
    L: int
    d: int = 64


TIMED = Sizes(N=200_000, batches=(1, 16, 256), k=100, U=4, C=500, L=300)
COUNTED = Sizes(N=64, batches=(1, 16), k=10, U=1, C=8, L=16)


def numbers(*shape: int, seed: int = 1) -> torch.Tensor:
    """float32 in [-1, 1): a hash of the position, independent of library generators."""
    count = torch.Size(shape).numel()
    x = torch.arange(seed * count, (seed + 1) * count) * 2654435761 & MASK
    x = (x ^ x >> 16) * 2246822519 & MASK
    x = (x ^ x >> 13) * 3266489917 & MASK
    return (x.double() / 2**31 - 1).float().reshape(shape)


def timed_cases() -> dict[str, Call]:
    return searches(TIMED) | rankings(TIMED) | attentions(TIMED)


def counted_cases() -> dict[str, Call]:
    """Small calls: products only (NaN scores are never selected), selection only (d = 1), and the Ranker's ops."""
    products = searches(COUNTED, scale=torch.nan)
    selection = search(numbers(1, 1, seed=2), numbers(4 * COUNTED.N, 1), COUNTED.k)
    narrow = COUNTED._replace(d=32)
    wanted = ("score_candidates float32", "score_candidates bfloat16")
    wanted += ("candidate_cross_attention bfloat16", "candidate_cross_attention float32 gradient")
    rest = rankings(narrow) | attentions(narrow)
    return products | {"mips_topk selection": selection} | {name: rest[name] for name in wanted}


def searches(sizes: Sizes, scale: float = 1.0) -> dict[str, Call]:
    """Searches of every dtype and batch size; queries are multiplied by `scale`."""
    rows = numbers(sizes.N, sizes.d)
    tables: dict[str, object] = {"float32": rows, "float16": rows.half(), "bfloat16": rows.bfloat16()}
    tables["int8"] = gk.ItemTable.from_rows(rows, dtype=torch.int8)
    return {
        f"mips_topk {name} B={B}": search(numbers(B, sizes.d, seed=2) * scale, table, sizes.k)
        for name, table in tables.items()
        for B in sizes.batches
    }


def search(queries: torch.Tensor, table: object, k: int) -> Call:
    return lambda: gk.mips_topk(queries, table, k, backend="cpu")


def rankings(sizes: Sizes) -> dict[str, Call]:
    U, C, L, d = sizes.U, sizes.C, sizes.L, sizes.d
    rows, ids = numbers(4 * C, d), torch.arange(U * C).reshape(U, C) * 7 % (4 * C)
    floats = {
        "keys": numbers(U * L, d, seed=3),
        "values": numbers(U * L, d, seed=4),
        "user_hidden": numbers(U, d, seed=5),
        "item_weight": numbers(d, d, seed=6),
        "out_weight": numbers(d, seed=7),
    }
    offsets = torch.arange(U + 1) * L
    found = {}
    for name, table, dtype in (
        ("float32", rows, torch.float32),
        ("bfloat16", rows.bfloat16(), torch.bfloat16),
        ("int8 table", gk.ItemTable.from_rows(rows, dtype=torch.int8), torch.bfloat16),
    ):
        operands = {key: value.to(dtype) for key, value in floats.items()}
        found[f"score_candidates {name}"] = ranking(ids, table, operands, offsets)
    return found


def ranking(ids: torch.Tensor, table: object, operands: dict[str, torch.Tensor], offsets: torch.Tensor) -> Call:
    return lambda: gk.score_candidates(ids, table, cu_seqlens=offsets, backend="cpu", **operands)


def attentions(sizes: Sizes) -> dict[str, Call]:
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        inputs = [numbers(sizes.U, n, 1, sizes.d, seed=n).to(dtype) for n in (sizes.C, sizes.L, sizes.L)]
        name = f"candidate_cross_attention {str(dtype).removeprefix('torch.')}"
        found[name] = attention(inputs)
        found[f"{name} gradient"] = gradient([x.clone().requires_grad_() for x in inputs])
    return found


def attention(inputs: list[torch.Tensor]) -> Call:
    return lambda: gk.candidate_cross_attention(*inputs, backend="cpu")


def gradient(inputs: list[torch.Tensor]) -> Call:
    def run() -> object:
        out = gk.candidate_cross_attention(*inputs, backend="cpu")
        assert isinstance(out, torch.Tensor)
        return torch.autograd.grad(out, inputs, out.detach())

    return run
