"""Every tensor argument of a table with every unusual kind of tensor: correct, or an error naming it."""

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch.testing._internal.two_tensor import TwoTensor

import grank_kernels as gk

pytestmark = pytest.mark.usefixtures("one_thread")
REFUSED = (ValueError, TypeError)


def freed(x: torch.Tensor) -> torch.Tensor:
    x = x.clone()
    x.untyped_storage().resize_(0)
    return x


def jagged(x: torch.Tensor) -> torch.Tensor:
    return torch.nested.nested_tensor(list(x.reshape(2, -1, *x.shape[1:]).unbind()), layout=torch.jagged)


KINDS_REFUSED: dict[str, Callable[[torch.Tensor], Any]] = {
    "subclass": lambda x: TwoTensor(x, x),
    "freed": freed,
    "sparse": torch.Tensor.to_sparse,
    "nested": jagged,
    "meta": lambda x: x.to("meta"),
    "0-d": lambda x: x.reshape(-1)[0],
    "complex": lambda x: x.to(torch.complex64),
    "list": torch.Tensor.tolist,
    "strings": lambda x: x.numpy().astype(str),
    "masked array": lambda x: x.numpy().astype(object),
    "none": lambda x: None,
}
KINDS_RIGHT: dict[str, Callable[[torch.Tensor], Any]] = {
    "array": torch.Tensor.numpy,
    "read-only array": lambda x: np.frombuffer(x.numpy().tobytes(), x.numpy().dtype).reshape(x.shape),
    "strided": lambda x: x.repeat_interleave(2, 0)[::2],
    "negative view": lambda x: torch._neg_view(-x),
    "parameter without gradient": lambda x: torch.nn.Parameter(x, requires_grad=False),
    "inference": lambda x: inference(x),
}


def inference(x: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return x.clone()


IDS, ROWS = torch.tensor([3, 1, 4, 9]), torch.arange(12.0).reshape(4, 3) - 5
ARGUMENTS: dict[str, tuple[str, Callable[[gk.ItemTable, Any], Any], torch.Tensor]] = {
    "from_rows: rows": ("rows", lambda _, x: gk.ItemTable.from_rows(x).rows(torch.arange(4)), ROWS),
    "from_rows: int8": ("rows", lambda _, x: gk.ItemTable.from_rows(x, dtype=torch.int8).rows(torch.arange(4)), ROWS),
    "from_rows: ids": ("ids", lambda _, x: gk.ItemTable.from_rows(ROWS, ids=x).rows(IDS), IDS),
    "upsert: ids": ("ids", lambda table, x: (table.upsert(x, ROWS), table.rows(IDS))[1], IDS),
    "upsert: rows": ("rows", lambda table, x: (table.upsert(IDS, x), table.rows(IDS))[1], ROWS),
    "remove: ids": ("ids", lambda table, x: (table.remove(x), table.ids)[1], IDS),
    "rows: ids": ("ids", lambda table, x: table.rows(x), IDS),
    "mask: ids": ("rows", lambda table, x: gk.mips_topk(ROWS[3], table, 4, allow=table.mask(x)).indices, IDS),
}


def table() -> gk.ItemTable:
    return gk.ItemTable.from_rows(torch.arange(30.0).reshape(10, 3))


@pytest.mark.parametrize(
    ("kind", "argument"),
    sorted({*itertools.product(KINDS_REFUSED, ARGUMENTS)} - {("0-d", "rows: ids"), ("none", "from_rows: ids")}),
)
def test_refused_by_name(kind: str, argument: str) -> None:
    name, call, good = ARGUMENTS[argument]
    used = table()
    with pytest.raises(REFUSED, match=rf"^{name}\b"):
        call(used, KINDS_REFUSED[kind](good))
    assert (used.version, len(used)) == (0, 10)


@pytest.mark.parametrize("argument", ARGUMENTS)
@pytest.mark.parametrize("kind", KINDS_RIGHT)
def test_correct(kind: str, argument: str) -> None:
    _, call, good = ARGUMENTS[argument]
    assert torch.equal(call(table(), KINDS_RIGHT[kind](good.clone())), call(table(), good))
