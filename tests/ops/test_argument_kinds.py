"""Every tensor argument of every public function with every kind of tensor: correct, or an error naming it.

A new public function is one line in `CALLS`.
"""

import re
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch.testing._internal.two_tensor import TwoTensor

import grank_kernels as gk

B, N, D, E, L, H = 3, 40, 8, 4, 5, 6
Tensors = dict[str, torch.Tensor]


def table(**options: Any) -> gk.ItemTable:
    return gk.ItemTable.from_rows(torch.arange(N * D).reshape(N, D).remainder(7).float(), **options)


def written(out_values: torch.Tensor, out_indices: torch.Tensor) -> list[torch.Tensor]:
    gk.mips_topk(torch.ones(B, D), table().rows(torch.arange(N)), 4, out=(out_values, out_indices))
    return [out_values, out_indices]


def upserted(ids: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    items = table(ids=torch.arange(N) * 2)
    items.upsert(ids, rows)
    return items.rows(torch.arange(N) * 2)


def left(ids: torch.Tensor) -> torch.Tensor:
    items = table()
    items.remove(ids)
    return items.ids


def calls() -> dict[str, tuple[Callable[..., Any], Tensors]]:
    """(function, valid arguments) pairs; new tensors each time, since kinds modify them."""
    rows, queries = table().rows(torch.arange(N)), torch.randn(B, D)
    exclude, some = torch.randint(-1, N, (B, E)), torch.arange(0, 2 * B, 2)
    return {
        "mips_topk": (
            lambda **x: gk.mips_topk(x["queries"], x["items"], 4, exclude=x["exclude"], allow=x["allow"]),
            {"queries": queries, "items": rows, "exclude": exclude, "allow": torch.rand(N) < 0.7},
        ),
        "mips_topk, exclude as a pair": (
            lambda **x: gk.mips_topk(queries, rows, 4, exclude=(x["exclude's offsets"], x["exclude's ids"])),
            {"exclude's offsets": torch.arange(B + 1) * E, "exclude's ids": exclude.flatten()},
        ),
        "mips_topk, exclude as a list": (
            lambda **x: gk.mips_topk(queries, rows, 4, exclude=[[1, 2], x["exclude[1]"], []]),
            {"exclude[1]": torch.tensor([3, 4])},
        ),
        "mips_topk, out": (
            lambda **x: written(x["out's values"], x["out's indices"]),
            {"out's values": torch.zeros(B, 4), "out's indices": torch.zeros(B, 4, dtype=torch.int64)},
        ),
        "mips_topk of a certified table": (
            lambda **x: gk.mips_topk(x["queries"], table(coarse=torch.int8), 4, allow=x["allow"]),
            {"queries": queries, "allow": torch.rand(B, N) < 0.7},
        ),
        "count_rescored": (
            lambda **x: gk.count_rescored(x["queries"], table(coarse=torch.int8), 1),
            {"queries": queries},
        ),
        "candidate_cross_attention, ragged": (
            gk.candidate_cross_attention,
            {
                "q": torch.randn(7, 2, D), "k": torch.randn(9, 2, D), "v": torch.randn(9, 2, D),
                "cu_seqlens_q": torch.tensor([0, 3, 7]), "cu_seqlens_k": torch.tensor([0, 4, 9]),
                "bias_k": torch.randn(9, 2),
            },
        ),
        "candidate_cross_attention, padded": (
            gk.candidate_cross_attention,
            {
                "q": torch.randn(B, 4, 2, D), "k": torch.randn(B, L, 2, D), "v": torch.randn(B, L, 2, D),
                "seqused_k": torch.tensor([0, 3, L]),
            },
        ),
        "score_candidates": (
            gk.score_candidates,
            {
                "candidate_ids": torch.randint(-1, N, (2, 7)), "items": rows, "keys": torch.randn(9, D),
                "values": torch.randn(9, H), "cu_seqlens": torch.tensor([0, 4, 9]), "user_hidden": torch.randn(2, H),
                "item_weight": torch.randn(D, H), "out_weight": torch.randn(H),
            },
        ),
        "ItemTable.from_rows": (
            lambda **x: gk.ItemTable.from_rows(**x).rows(torch.arange(N) * 2),
            {"rows": rows, "ids": torch.arange(N) * 2},
        ),
        "ItemTable.upsert": (upserted, {"ids": some, "rows": rows[:B]}),
        "ItemTable.remove": (left, {"ids": some}),
        "ItemTable.rows": (lambda ids: table().rows(ids), {"ids": some}),
    }  # fmt: skip


class Plain(torch.Tensor):
    """A tensor subclass that overrides nothing."""


def freed(x: torch.Tensor) -> torch.Tensor:
    x = x.clone()
    x.untyped_storage().resize_(0)
    return x


def shrunk(x: torch.Tensor) -> torch.Tensor:
    x = x.clone()
    x.untyped_storage().resize_(x.nbytes - 1)
    return x


def nested(x: torch.Tensor) -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch: nested tensors are a prototype
        return torch.nested.nested_tensor(list(x))


def every_other(x: torch.Tensor) -> torch.Tensor:
    wide = torch.zeros(*x.shape[:-1], 2 * x.shape[-1], dtype=x.dtype)
    wide[..., ::2] = x
    return wide[..., ::2]


def in_inference(x: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return x.clone()


def uninitialised(x: torch.Tensor) -> torch.Tensor:
    return torch.nn.parameter.UninitializedParameter()


HONOURED: dict[str, Callable[[torch.Tensor], Any]] = {
    "a subclass without operations": lambda x: x.as_subclass(Plain),  # type: ignore[no-untyped-call]
    "a buffer": lambda x: torch.nn.Buffer(x),
    "every other element": every_other,
    "of inference mode": in_inference,
}
HONOURED_FLOATS: dict[str, Callable[[torch.Tensor], Any]] = {
    "negative view": lambda x: torch._neg_view(-x),
    "imaginary part of a conjugate": lambda x: torch.complex(x, -x).conj().imag,
}
REFUSED: dict[str, Callable[[torch.Tensor], Any]] = {
    "a subclass with operations": lambda x: TwoTensor(x, x),
    "freed storage": freed,
    "shrunk storage": shrunk,
    "sparse": lambda x: x.to_sparse(),
    "on the meta device": lambda x: x.to("meta"),
    "complex": lambda x: x.to(torch.complex64),
    "0-d": lambda x: x.flatten()[0],
    "one dimension more": lambda x: x[None],
    "a list": lambda x: x.tolist(),
    "a string": lambda x: "tensor",
    "of NumPy strings": lambda x: np.full(tuple(x.shape), "a"),
    "an uninitialised parameter": uninitialised,
}
REFUSED_FLOATS: dict[str, Callable[[torch.Tensor], Any]] = {
    "float64": lambda x: x.double(),
    "float64 of NumPy": lambda x: x.double().numpy(),
    "mkldnn": lambda x: x.to_mkldnn(),
}


def kinds(x: torch.Tensor, of_all: dict[str, Any], of_floats: dict[str, Any]) -> dict[str, Any]:
    return of_all | (of_floats if x.is_floating_point() else {})


VALID = {  # (argument, kind) pairs that are documented forms
    ("ItemTable.rows", "ids", "0-d"), ("ItemTable.rows", "ids", "one dimension more"),
    ("mips_topk", "exclude", "a list"), ("mips_topk, exclude as a list", "exclude[1]", "a list"),
}  # fmt: skip
ARGUMENTS = [(call, name, x) for call, (_, given) in calls().items() for name, x in given.items()]
HONOURED_CASES = [
    pytest.param(call, name, make, id=f"{call}-{name}-{kind}")
    for call, name, x in ARGUMENTS
    for kind, make in kinds(x, HONOURED, HONOURED_FLOATS).items()
    if not name.startswith("out's")
]
REFUSED_CASES = [
    pytest.param(call, name, make, id=f"{call}-{name}-{kind}")
    for call, name, x in ARGUMENTS
    for kind, make in {**kinds(x, REFUSED, REFUSED_FLOATS), **({"nested": nested} if x.dim() > 1 else {})}.items()
    if (call, name, kind) not in VALID
]


def named(argument: str) -> str:
    """Pattern of messages that name an argument; `out` is named as a whole if it is not a pair of tensors."""
    names = {argument, argument.replace("out's values", "out").replace("out's indices", "out")}
    return rf"(?<!\w)({'|'.join(map(re.escape, names))})(?!\w)"


def parts_of(result: Any) -> list[torch.Tensor]:
    return [result] if isinstance(result, torch.Tensor) else list(result)


@pytest.mark.parametrize(("call", "name", "make"), HONOURED_CASES)
def test_honoured(call: str, name: str, make: Callable[[torch.Tensor], Any]) -> None:
    run, given = calls()[call]
    want = parts_of(run(**given))
    got = parts_of(run(**{**given, name: make(given[name])}))
    for x, y in zip(got, want, strict=True):
        assert type(x) is torch.Tensor
        torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("call", "name", "make"), REFUSED_CASES)
def test_refused_by_name(call: str, name: str, make: Callable[[torch.Tensor], Any]) -> None:
    run, given = calls()[call]
    with pytest.raises((TypeError, ValueError), match=named(name)):
        run(**{**given, name: make(given[name])})


@pytest.mark.parametrize(("call", "name"), [(call, name) for call, name, x in ARGUMENTS if x.is_floating_point()])
def test_gradients_flow_or_are_refused(call: str, name: str) -> None:
    """Except for `ItemTable`, which copies its rows, as documented, and `count_rescored`, which returns counts."""
    run, given = calls()[call]
    leaf = given[name].clone().requires_grad_()
    if call == "score_candidates" or name.startswith("out's"):
        with pytest.raises(ValueError, match=named(name)):
            run(**{**given, name: leaf})
    elif not call.startswith("ItemTable.") and call != "count_rescored":
        assert parts_of(run(**{**given, name: leaf}))[0].requires_grad


def test_a_result_of_fsdp_or_tensor_parallelism_says_how_to_convert() -> None:
    class Distributed(TwoTensor):
        def full_tensor(self) -> torch.Tensor:
            return self.a

    queries = torch.randn(B, D)
    with pytest.raises(TypeError, match=r"queries must be a plain tensor, got Distributed.*full_tensor\(\) converts"):
        gk.mips_topk(Distributed(queries, queries), queries, 1)
