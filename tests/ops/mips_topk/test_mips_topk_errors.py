"""Errors of mips_topk: each names the argument, what it takes and what it got."""

from typing import Any

import numpy as np
import pytest
import torch

import grank_kernels as gk

Q, X = torch.ones(2, 8), torch.ones(20, 8)
TABLE = gk.ItemTable.from_rows(X, ids=torch.arange(20) * 2)
ERRORS: list[tuple[str, type[Exception], str, tuple[Any, ...], dict[str, Any]]] = [
    ("width", ValueError, r"queries must have the items' width, 9, as last dimension, got \(2, 8\)",
     (Q, torch.ones(20, 9), 3), {}),
    ("k zero", ValueError, "k must be 1 or more, got 0", (Q, X, 0), {}),
    ("k negative", ValueError, "k must be 1 or more, got -1", (Q, X, -1), {}),
    ("k float", TypeError, "k must be an int, got float 2.5", (Q, X, 2.5), {}),
    ("k bool", TypeError, "k must be an int, got bool True", (Q, X, True), {}),
    ("k tensor", TypeError, "k must be an int, got Tensor", (Q, X, torch.tensor(3)), {}),
    ("k of 2^63", ValueError, r"k must be below 2\^63, got 9223372036854775808", (Q, X, 2**63), {}),
    ("k of NumPy's uint64", ValueError, r"k must be below 2\^63", (Q, X, np.uint64(2**63)), {}),
    ("k beyond the memory", MemoryError, r"k must leave room for 2 results of k places, got 1099511627776",
     (Q, X, 2**40), {}),
    ("queries list", TypeError, "queries must be a torch.Tensor or an array, got list", ([[1.0] * 8], X, 3), {}),
    ("queries int64", ValueError, "queries must be torch.float32, torch.float16 or torch.bfloat16, got torch.int64$",
     (Q.long(), X, 3), {}),
    ("queries float64", ValueError, r"queries must be .*, got torch.float64: queries.to\(torch.float32\) converts",
     (Q.double(), X, 3), {}),
    ("queries of NumPy's float64", ValueError, r'got torch.float64: queries.astype\("float32"\) converts',
     (Q.double().numpy(), X, 3), {}),
    ("queries of strings", TypeError, "queries: can't convert", (np.array([["a"]]), X, 3), {}),
    ("queries 3-d", ValueError, r"queries must have 1 or 2 dimensions, got \(1, 2, 8\)", (Q[None], X, 3), {}),
    ("queries 0-d", ValueError, r"queries must have 1 or 2 dimensions, got \(\)", (torch.tensor(1.0), X, 3), {}),
    ("items list", TypeError, "items must be a torch.Tensor, an array or an ItemTable, got list",
     (Q, X.tolist(), 3), {}),
    ("items 3-d", ValueError, r"items must have 2 dimensions, got \(1, 20, 8\)", (Q, X[None], 3), {}),
    ("items 1-d", ValueError, r"items must have 2 dimensions, got \(8,\)", (Q, X[0], 3), {}),
    ("items complex", ValueError, "items must be .*, got torch.complex64", (Q, X.to(torch.complex64), 3), {}),
    ("items float64", ValueError, "items must be .*, got torch.float64", (Q, X.double(), 3), {}),
    ("items int8", ValueError, r"items must be .*, got torch.int8: items.float\(\) converts", (Q, X.char(), 3), {}),
    ("items on another device", ValueError, r"queries must be on meta, .*queries.to\('meta'\)",
     (Q, X.to("meta"), 3), {}),
    ("exclude of another type", TypeError, "exclude must be a torch.Tensor or an array, got int",
     (Q, X, 3), {"exclude": 1}),
    ("exclude list", ValueError, "exclude must have 2 entries for 2 queries if it is a list, got 1",
     (Q, X, 3), {"exclude": [[1]]}),
    ("exclude list of ints", TypeError, r"exclude\[0\] must be a torch.Tensor or an array, got int",
     (Q, X, 3), {"exclude": [1, 2]}),
    ("exclude list of floats", TypeError, r"exclude\[1\] must hold ints, got \[2.0\]",
     (Q, X, 3), {"exclude": [[1], [2.0]]}),
    ("exclude list of an integer beyond int64", ValueError, r"exclude\[1\] must hold ids below 2\^63, got 92233720",
     (Q, X, 3), {"exclude": [[1], [2**63]]}),
    ("exclude list of NumPy's uint64", ValueError, r"exclude\[0\] must hold ids below 2\^63, got 92233720",
     (Q, X, 3), {"exclude": [[np.uint64(2**63)], [2]]}),
    ("items masked array", TypeError, r"items: a masked array would lose its mask: call .filled\(\)",
     (Q, np.ma.masked_array(X.numpy()), 3), {}),
    ("allow masked array", TypeError, "allow: a masked array would lose its mask",
     (Q, X, 3), {"allow": np.ma.masked_array(np.ones(20, bool), mask=np.arange(20) > 5)}),
    ("backend list", ValueError, r"backend must be None, .*, got \['cpu'\]", (Q, X, 3), {"backend": ["cpu"]}),
    ("out expanded", ValueError, "out's values must have memory for each element, got an expanded tensor",
     (Q, X, 3), {"out": (torch.empty(1, 3).expand(2, 3), torch.empty(2, 3, dtype=torch.int64))}),
    ("exclude pair of lists", TypeError, "exclude's offsets must be a torch.Tensor or an array, got list",
     (Q, X, 3), {"exclude": ([0, 1], [2])}),
    ("exclude triple", ValueError, r"exclude must be a pair \(offsets, ids\) if it is a tuple, got 3 entries",
     (Q, X, 3), {"exclude": (torch.arange(3),) * 3}),
    ("exclude int32", ValueError, r"exclude must be torch.int64, got torch.int32: exclude.to\(torch.int64\) converts",
     (Q, X, 3), {"exclude": torch.zeros(2, 1, dtype=torch.int32)}),
    ("exclude batch", ValueError, r"exclude must be \(2, E\) for 2 queries, got \(3, 1\)",
     (Q, X, 3), {"exclude": torch.zeros(3, 1, dtype=torch.int64)}),
    ("exclude rank", ValueError, r"exclude must have 2 dimensions, got \(4,\)",
     (Q, X, 3), {"exclude": torch.arange(4)}),
    ("exclude too large", ValueError, r"exclude must hold ids in \[-1, 20\), -1 for none, got 20",
     (Q, X, 3), {"exclude": torch.tensor([[1], [20]])}),
    ("exclude too small", ValueError, r"exclude must hold ids in \[-1, 20\), -1 for none, got -2",
     (Q, X, 3), {"exclude": torch.tensor([[1], [-2]])}),
    ("exclude too small for a table", ValueError, r"exclude must hold ids in \[-1, 2\^63\), -1 for none, got -2",
     (Q, TABLE, 3), {"exclude": torch.tensor([[1], [-2]])}),
    ("offsets length", ValueError, r"exclude's offsets must be \(3,\) for 2 queries, got \(2,\)",
     (Q, X, 3), {"exclude": (torch.tensor([0, 1]), torch.tensor([1]))}),
    ("offsets beyond the ids", ValueError, r"exclude's offsets must lie in \[0, 3\], got 0 to 5",
     (Q, X, 3), {"exclude": (torch.tensor([0, 1, 5]), torch.tensor([1, 2, 3]))}),
    ("offsets negative", ValueError, r"exclude's offsets must lie in \[0, 3\], got -1 to 3",
     (Q, X, 3), {"exclude": (torch.tensor([-1, 1, 3]), torch.tensor([1, 2, 3]))}),
    ("offsets fall", ValueError, r"exclude's offsets must not decrease, got \(4, 3\)",
     (Q, X, 3), {"exclude": (torch.tensor([0, 4, 3]), torch.tensor([1, 2, 3]))}),
    ("allow list", TypeError, "allow must be a torch.Tensor or an array, got list", (Q, X, 3), {"allow": [True] * 20}),
    ("allow float", ValueError, "allow must be torch.bool, got torch.float32", (Q, X, 3), {"allow": torch.ones(20)}),
    ("allow length", ValueError, r"allow must be \(20,\) or \(2, 20\) for 2 queries and 20 items, got \(19,\)",
     (Q, X, 3), {"allow": torch.ones(19, dtype=torch.bool)}),
    ("allow transposed", ValueError, r"allow must be .*, got \(20, 2\)",
     (Q, X, 3), {"allow": torch.ones(20, 2, dtype=torch.bool)}),
    ("backend", ValueError, "backend must be None, 'cpu', 'cuda', .*or 'reference', got 'nope'",
     (Q, X, 3), {"backend": "nope"}),
    ("out single", TypeError, r"out must be a pair of tensors \(values, indices\), got Tensor",
     (Q, X, 3), {"out": torch.ones(2, 3)}),
    ("out shape", ValueError, r"out's values must be torch.float32 \(2, 3\) on cpu, got torch.float32 \(2, 4\) on cpu",
     (Q, X, 3), {"out": (torch.ones(2, 4), torch.ones(2, 3, dtype=torch.int64))}),
    ("out dtype", ValueError, r"out's indices must be torch.int64 \(2, 3\) on cpu, got torch.int32",
     (Q, X, 3), {"out": (torch.ones(2, 3), torch.ones(2, 3, dtype=torch.int32))}),
    ("out with gradients", ValueError, "out must be None where a gradient is recorded",
     (Q.clone().requires_grad_(), X, 3), {"out": (torch.ones(2, 3), torch.ones(2, 3, dtype=torch.int64))}),
    ("out that requires a gradient", ValueError, "out's values must not require a gradient",
     (Q, X, 3), {"out": (torch.ones(2, 3, requires_grad=True), torch.ones(2, 3, dtype=torch.int64))}),
]  # fmt: skip


@pytest.mark.parametrize(("error", "message", "args", "more"), [e[1:] for e in ERRORS], ids=[e[0] for e in ERRORS])
def test_errors(
    error: type[Exception], message: str, args: tuple[Any, ...], more: dict[str, Any], backend: str
) -> None:
    with pytest.raises(error, match=message):
        gk.mips_topk(*args, **{"backend": backend, **more})


def test_a_refused_call_leaves_out_alone(backend: str) -> None:
    values, indices = torch.full((2, 3), 7.0), torch.full((2, 3), 7)
    with pytest.raises(ValueError, match=r"exclude must hold ids in .*, got 99"):
        gk.mips_topk(Q, X, 3, backend=backend, exclude=torch.tensor([[1], [99]]), out=(values, indices))
    assert torch.all(values == 7)
    assert torch.all(indices == 7)
