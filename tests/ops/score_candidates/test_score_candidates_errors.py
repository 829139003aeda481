"""Errors of score_candidates."""

from typing import Any

import pytest
import torch
from ranker_checks import equal_bits
from ranker_oracle import backends_of, scoring

import grank_kernels as gk
from grank_kernels.backends import BACKENDS as BY_NAME

BACKENDS = backends_of("score_candidates")


pytestmark = pytest.mark.usefixtures("one_thread")


GOOD: dict[str, Any] = {
    "candidate_ids": torch.tensor([[1, 2, -1]]),
    "items": torch.ones(20, 8),
    "keys": torch.ones(4, 8),
    "values": torch.ones(4, 6),
    "cu_seqlens": torch.tensor([0, 4]),
    "user_hidden": torch.ones(1, 6),
    "item_weight": torch.ones(8, 6),
    "out_weight": torch.ones(6),
}
TABLE = gk.ItemTable.from_rows(torch.ones(20, 8), ids=torch.arange(20) * 2)
ERRORS: list[tuple[str, type[Exception], str, dict[str, Any]]] = [
    ("ids list", TypeError, "candidate_ids must be a torch.Tensor or an array, got list", {"candidate_ids": [[1]]}),
    ("ids float", ValueError, "candidate_ids must be torch.int64 or torch.int32, got torch.float32",
     {"candidate_ids": torch.ones(1, 3)}),
    ("ids 1-d", ValueError, r"candidate_ids must have 2 dimensions, got \(3,\)",
     {"candidate_ids": torch.arange(3)}),
    ("id too large", ValueError, "candidate_ids must be below 20, negative for none, got 20",
     {"candidate_ids": torch.tensor([[1, 20]])}),
    ("id not in the table", ValueError, "candidate_ids must be in the table, got 7",
     {"candidate_ids": torch.tensor([[2, 7]]), "items": TABLE}),
    ("items list", TypeError, "items must be a torch.Tensor, an array or an ItemTable, got list",
     {"items": torch.ones(20, 8).tolist()}),
    ("items int8", ValueError, "items must be .*, got torch.int8", {"items": torch.ones(20, 8, dtype=torch.int8)}),
    ("items 1-d", ValueError, r"items must have 2 dimensions, got \(8,\)", {"items": torch.ones(8)}),
    ("items on another device", ValueError, "candidate_ids must be on meta, the device of items, got cpu",
     {"items": torch.ones(20, 8, device="meta")}),
    ("keys width", ValueError, r"keys must be \(T, d\) = \(4, 8\), got \(4, 9\)", {"keys": torch.ones(4, 9)}),
    ("keys rows", ValueError, r"keys must be \(T, d\) = \(4, 8\), got \(5, 8\)", {"keys": torch.ones(5, 8)}),
    ("keys dtype", ValueError, "keys must be torch.float32, got torch.float16", {"keys": torch.ones(4, 8).half()}),
    ("keys on another device", ValueError, "keys must be on cpu, the device of items, got meta",
     {"keys": torch.ones(4, 8, device="meta")}),
    ("values None", TypeError, "values must be a torch.Tensor or an array, got NoneType", {"values": None}),
    ("values int64", ValueError, "values must be torch.float32, torch.float16 or torch.bfloat16, got torch.int64",
     {"values": torch.ones(4, 6).long()}),
    ("values 3-d", ValueError, r"values must have 2 dimensions, got \(1, 4, 6\)",
     {"values": torch.ones(1, 4, 6)}),
    ("offsets length", ValueError, r"cu_seqlens must be \(B \+ 1,\) = \(2,\), got \(3,\)",
     {"cu_seqlens": torch.tensor([0, 2, 4])}),
    ("offsets float", ValueError, r"cu_seqlens must be .*, got torch.float32",
     {"cu_seqlens": torch.tensor([0.0, 4.0])}),
    ("offsets fall", ValueError, "cu_seqlens must not decrease", {"cu_seqlens": torch.tensor([4, 0])}),
    ("offsets past the end", ValueError, r"cu_seqlens must lie in \[0, 4\], got 0 to 5",
     {"cu_seqlens": torch.tensor([0, 5])}),
    ("offsets negative", ValueError, r"cu_seqlens must lie in .*, got -1 to 4", {"cu_seqlens": torch.tensor([-1, 4])}),
    ("user_hidden", ValueError, r"user_hidden must be \(B, h\) = \(1, 6\), got \(2, 6\)",
     {"user_hidden": torch.ones(2, 6)}),
    ("item_weight transposed", ValueError, r"item_weight must be \(d, h\) = \(8, 6\), got \(6, 8\)",
     {"item_weight": torch.ones(6, 8)}),
    ("item_weight dtype", ValueError, "item_weight must be torch.float32, got torch.bfloat16",
     {"item_weight": torch.ones(8, 6).bfloat16()}),
    ("out_weight", ValueError, r"out_weight must be \(h,\) = \(6,\), got \(5,\)", {"out_weight": torch.ones(5)}),
    ("out_bias", TypeError, "out_bias must be a float, got Tensor", {"out_bias": torch.ones(1)}),
    ("scale", TypeError, "softmax_scale must be a float, got str", {"softmax_scale": "1"}),
    ("activation", ValueError, "activation must be 'relu', 'silu' or 'gelu', got 'swish2'",
     {"activation": "swish2"}),
    ("backend", ValueError, "backend must be None, 'cpu', ", {"backend": "nope"}),
    ("gradient", ValueError, "keys must not require a gradient.*no_grad",
     {"keys": torch.ones(4, 8, requires_grad=True)}),
]  # fmt: skip


@pytest.mark.parametrize(("error", "message", "changes"), [e[1:] for e in ERRORS], ids=[e[0] for e in ERRORS])
def test_errors(error: type[Exception], message: str, changes: dict[str, Any]) -> None:
    gk.score_candidates(**GOOD)
    with pytest.raises(error, match=message):
        gk.score_candidates(**{**GOOD, **changes})


def test_a_backend_without_the_op() -> None:
    for name, module in BY_NAME.items():
        if not hasattr(module, "score_candidates"):
            with pytest.raises(ValueError, match=f"backend '{name}' cannot run: it has no score_candidates"):
                gk.score_candidates(**GOOD, backend=name)


def test_inputs_with_a_gradient_are_allowed_under_no_grad(backend: str) -> None:
    problem = scoring([30, 5])
    want = problem.scores(backend)
    problem.item_weight.requires_grad_()
    with torch.no_grad():
        equal_bits(problem.scores(backend), want)
