"""Errors of candidate_cross_attention."""

from typing import Any

import pytest
import torch
from ranker_oracle import (
    backends_of,
)

import grank_kernels as gk
from grank_kernels.backends import BACKENDS as BY_NAME

BACKENDS = backends_of("candidate_cross_attention")

pytestmark = pytest.mark.usefixtures("one_thread")


GOOD: dict[str, Any] = {"q": torch.ones(2, 5, 3, 8), "k": torch.ones(2, 7, 3, 8), "v": torch.ones(2, 7, 3, 8)}
RAGGED: dict[str, Any] = {
    "q": torch.ones(10, 3, 8), "k": torch.ones(14, 3, 8), "v": torch.ones(14, 3, 8),
    "cu_seqlens_q": torch.tensor([0, 4, 10]), "cu_seqlens_k": torch.tensor([0, 0, 14]),
}  # fmt: skip
ERRORS: list[tuple[str, type[Exception], str, dict[str, Any], dict[str, Any]]] = [
    ("q list", TypeError, "q must be a torch.Tensor or an array, got list", GOOD, {"q": [1.0]}),
    ("q float64", ValueError, "q must be torch.float32, got torch.float64", GOOD, {"q": GOOD["q"].double()}),
    ("all float64", ValueError, "k must be torch.float32, torch.float16 or torch.bfloat16, got torch.float64", GOOD,
     {name: x.double() for name, x in GOOD.items()}),
    ("q 2-d", ValueError, r"q must have 3 or 4 dimensions, got \(5, 8\)", GOOD, {"q": torch.ones(5, 8)}),
    ("q batch", ValueError, r"q must be \(B, C, H, D\) = \(2, 5, 3, 8\), got \(3, 5, 3, 8\)", GOOD,
     {"q": torch.ones(3, 5, 3, 8)}),
    ("q heads", ValueError, r"q must be \(B, C, H, D\) = \(2, 5, 3, 8\), got \(2, 5, 1, 8\)", GOOD,
     {"q": torch.ones(2, 5, 1, 8)}),
    ("shared q width", ValueError, r"q must .*, got \(2, 5, 3, 9\)", GOOD, {"q": torch.ones(5, 3, 9)}),
    ("q dense with offsets", ValueError, r"q must have 3 dimensions, got \(2, 5, 3, 8\)", RAGGED,
     {"q": torch.ones(2, 5, 3, 8)}),
    ("ragged q width", ValueError, r"q must be \(total_q, H, D\) = \(10, 3, 8\), got \(10, 3, 9\)", RAGGED,
     {"q": torch.ones(10, 3, 9)}),
    ("k ragged without offsets", ValueError, r"k must have 4 dimensions, got \(7, 3, 8\)", GOOD,
     {"k": torch.ones(7, 3, 8)}),
    ("k dense with offsets", ValueError, r"k must have 3 dimensions, got \(2, 7, 3, 8\)", RAGGED,
     {"k": torch.ones(2, 7, 3, 8)}),
    ("v shape", ValueError, r"v must be k's shape = \(2, 7, 3, 8\), got \(2, 6, 3, 8\)", GOOD,
     {"v": torch.ones(2, 6, 3, 8)}),
    ("v dtype", ValueError, "v must be torch.float32, got torch.float16", GOOD, {"v": GOOD["v"].half()}),
    ("v on another device", ValueError, "v must be on cpu, the device of q, got meta", GOOD,
     {"v": GOOD["v"].to("meta")}),
    ("offsets of q", ValueError, r"cu_seqlens_q must be \(B \+ 1,\) = \(3,\), got \(2,\)", RAGGED,
     {"cu_seqlens_q": torch.tensor([0, 10])}),
    ("no offsets", ValueError, r"cu_seqlens_k must be \(B \+ 1,\) = .*, got \(0,\)", RAGGED,
     {"cu_seqlens_k": torch.empty(0, dtype=torch.int64)}),
    ("offsets float", ValueError, "cu_seqlens_k must be torch.int64 or torch.int32, got torch.float32", RAGGED,
     {"cu_seqlens_k": torch.tensor([0.0, 0.0, 14.0])}),
    ("offsets fall", ValueError, "cu_seqlens_k must not decrease", RAGGED,
     {"cu_seqlens_k": torch.tensor([0, 9, 3])}),
    ("offsets past the end", ValueError, r"cu_seqlens_q must lie in \[0, 10\], got 0 to 11", RAGGED,
     {"cu_seqlens_q": torch.tensor([0, 9, 11])}),
    ("offsets negative", ValueError, r"cu_seqlens_k must lie in .*, got -1 to 14", RAGGED,
     {"cu_seqlens_k": torch.tensor([-1, 9, 14])}),
    ("lengths too large", ValueError, r"seqused_k must lie in \[0, L\] = \[0, 7\], got 8", GOOD,
     {"seqused_k": torch.tensor([3, 8])}),
    ("lengths negative", ValueError, r"seqused_k must lie in .*, got -1", GOOD, {"seqused_k": torch.tensor([-1, 2])}),
    ("lengths shape", ValueError, r"seqused_k must be \(B,\) = \(2,\), got \(3,\)", GOOD,
     {"seqused_k": torch.tensor([1, 2, 3])}),
    ("lengths of ragged keys", ValueError, "seqused_k must be None with cu_seqlens_k",
     RAGGED, {"seqused_k": torch.tensor([0, 9])}),
    ("bias shape", ValueError, r"bias_k must have 3 dimensions, got \(2, 7\)", GOOD, {"bias_k": torch.ones(2, 7)}),
    ("bias heads", ValueError, r"bias_k must be k's shape without D = \(2, 7, 3\), got \(2, 7, 1\)", GOOD,
     {"bias_k": torch.ones(2, 7, 1)}),
    ("bias dtype", ValueError, r"bias_k must be .*, got torch.int64", GOOD, {"bias_k": torch.ones(2, 7, 3).long()}),
    ("scale", TypeError, "softmax_scale must be a float, got Tensor", GOOD, {"softmax_scale": torch.ones(1)}),
    ("activation", ValueError, "activation must be 'softmax' or 'silu', got 'relu'", GOOD, {"activation": "relu"}),
    ("lse of silu", ValueError, "return_lse must be False for activation 'silu'", GOOD,
     {"activation": "silu", "return_lse": True}),
    ("v without lse", ValueError, r"v must be a tensor unless only lse is wanted \(return_lse=True\), got None", GOOD,
     {"v": None}),
    ("backend", ValueError, "backend must be None, 'cpu', ", GOOD, {"backend": "nope"}),
]  # fmt: skip


@pytest.mark.parametrize(("error", "message", "base", "changes"), [e[1:] for e in ERRORS], ids=[e[0] for e in ERRORS])
def test_errors(error: type[Exception], message: str, base: dict[str, Any], changes: dict[str, Any]) -> None:
    gk.candidate_cross_attention(**base)
    with pytest.raises(error, match=message):
        gk.candidate_cross_attention(**{**base, **changes})


def test_a_backend_without_the_op() -> None:
    for name, module in BY_NAME.items():
        if not hasattr(module, "candidate_cross_attention"):
            with pytest.raises(ValueError, match=f"backend '{name}' cannot run: it has no candidate_cross_attention"):
                gk.candidate_cross_attention(**GOOD, backend=name)
