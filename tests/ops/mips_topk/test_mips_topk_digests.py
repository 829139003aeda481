"""Recorded digests of searches: whatever becomes faster, no bit of a score and no id changes."""

import hashlib
from collections.abc import Callable

import pytest
import torch
from oracle import searching_isas

import grank_kernels as gk
from grank_kernels.backends import cpu

B, N, D, K = 23, 30_000, 150, 70  # more than one block of queries and one segment of dimensions, a sampled threshold
# Of scores with fused multiply-adds, in every register width; the baseline rounds products and has other float scores.
DIGESTS = {
    "float32": "e9b59003ee6f764b",
    "float32, one query": "f0d8d7d1dccf0bfd",
    "float32, ties by id": "0c94931c23a1f527",
    "float32, mask": "dcd942afd5376788",
    "float32, mask by query": "c236232bf809ec17",
    "float32, exclude": "a25da7d3728d198d",
    "float16": "0804005e2030e9ef",
    "float16, one query": "6ecb3c5593980672",
    "float16, ties by id": "802ad9a4814e326d",
    "float16, mask": "b4a5db341cbb53c9",
    "float16, mask by query": "8f73e4ea7bab14da",
    "float16, exclude": "c56a3507fb53ba8d",
    "bfloat16": "ddb59bc7e2a6d949",
    "bfloat16, one query": "1c65d507cb1ffc62",
    "bfloat16, ties by id": "ebba4eb96881180b",
    "bfloat16, mask": "063622730eaf38ac",
    "bfloat16, mask by query": "68e200ce9fbae37f",
    "bfloat16, exclude": "c8d07c2cd7dca074",
    "int8": "2cdbba93e1748742",
    "int8, one query": "1616c60de2b9bbfb",
    "int8, ties by id": "08aa10055bd52045",
    "int8, mask": "88b1c87741c12ac1",
    "int8, mask by query": "f79bd09058cfd0ad",
    "int8, exclude": "65767ec9e3d1a9a2",
}
BASELINE = DIGESTS | {
    "float32": "a882a04ca10e9cac",
    "float32, one query": "f003534b909d765b",
    "float32, ties by id": "595f26e115c62205",
    "float32, mask": "32a835136075e769",
    "float32, mask by query": "31cafb742eebbacf",
    "float32, exclude": "3f8a3146265b3a6f",
    "float16": "6fbfceca16368f89",
    "float16, one query": "f9e50b255e0724e6",
    "float16, ties by id": "61468cc0a9b3da74",
    "float16, mask": "9a52e26865855e59",
    "float16, mask by query": "6f65236a3f8218c3",
    "float16, exclude": "a6c802d744f73b4a",
    "bfloat16": "59f011c04788a5a0",
    "bfloat16, one query": "e25f5581ca5dd9ea",
    "bfloat16, ties by id": "72382f9924bb2e57",
    "bfloat16, mask": "c44e340d0190b508",
    "bfloat16, mask by query": "efd353477884ffab",
    "bfloat16, exclude": "938b8d3c32e973a0",
}

Case = Callable[[torch.Tensor, torch.Tensor, str], gk.TopK]


def digest(top: gk.TopK) -> str:
    data = top.values.numpy().tobytes() + top.indices.numpy().tobytes()
    return hashlib.blake2b(data, digest_size=8).hexdigest()


def numbers(generator: torch.Generator, *shape: int) -> torch.Tensor:
    """Fractions, in the order in which torch draws integers: the same under every version."""
    return torch.randint(-1000, 1001, shape, generator=generator) / 337


def digests() -> dict[str, str]:
    g = torch.Generator().manual_seed(21)
    rows, queries = numbers(g, N, D), numbers(g, B, D)
    ids = torch.randint(10**9, (N,), generator=g).argsort() * 3 + 1
    few = rows.clone()
    few[torch.randint(N, (N - 40,), generator=g)] = 0.0
    zeros = queries.clone()
    zeros[::2] = 0
    allow, by_query = torch.randint(2, (N,), generator=g) > 0, torch.randint(3, (B, N), generator=g) == 0
    exclude = torch.randint(N, (B, 2000), generator=g)
    found = {}
    for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.int8):
        kind = str(dtype).removeprefix("torch.")
        table, tied = gk.ItemTable.from_rows(rows, dtype=dtype), gk.ItemTable.from_rows(few, ids=ids, dtype=dtype)
        found |= {
            f"{kind}": digest(gk.mips_topk(queries, table, K)),
            f"{kind}, one query": digest(gk.mips_topk(queries[:1], table, K)),
            f"{kind}, ties by id": digest(gk.mips_topk(zeros, tied, K)),
            f"{kind}, mask": digest(gk.mips_topk(queries, table, K, allow=allow)),
            f"{kind}, mask by query": digest(gk.mips_topk(queries, table, K, allow=by_query)),
            f"{kind}, exclude": digest(gk.mips_topk(queries, table, K, exclude=exclude)),
        }
    return found


@pytest.mark.skipif(cpu.unavailable() is not None, reason=str(cpu.unavailable()))
@pytest.mark.parametrize("isa", searching_isas())
def test_scores_and_order_are_those_recorded(isa: str) -> None:
    with cpu.using_isa(isa):
        assert digests() == (BASELINE if isa == "baseline" else DIGESTS)
