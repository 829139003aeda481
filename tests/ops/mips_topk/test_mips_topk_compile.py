"""mips_topk under torch.library.opcheck, torch.compile and torch.export."""

import io
from typing import Any

import pytest
import torch
from oracle import (
    assert_same,
)

import grank_kernels as gk


def op_arguments() -> dict[str, tuple[Any, ...]]:
    queries, rows = torch.randn(3, 10), torch.randn(50, 10)
    learnt, learnt_rows = queries.clone().requires_grad_(), rows.clone().requires_grad_()
    filters = torch.tensor([0, 2, 2, 5]), torch.tensor([1, 4, 9, -1, 49])
    table = gk.ItemTable.from_rows(rows, dtype=torch.int8, ids=torch.randperm(50) + 3).operands()[:3]
    allow = torch.rand(3, 50) < 0.5
    return {
        "plain": (queries, rows, None, None, 5, None, None, None),
        "gradients": (learnt, learnt_rows, None, None, 5, None, None, None),
        "filters": (learnt, rows, None, None, 60, *filters, allow),
        "half": (queries.half(), rows.bfloat16().requires_grad_(), None, None, 5, None, None, allow[0]),
        "table": (learnt, *table, 5, *filters, None),
        "strided": (queries.T.contiguous().T, rows[::2], None, None, 5, None, None, None),
        "empty": (queries[:0], rows[:0], None, None, 5, None, None, None),
    }


@pytest.mark.parametrize("which", ["plain", "gradients", "filters", "half", "table", "strided", "empty"])
def test_opcheck(which: str, backend: str) -> None:
    torch.library.opcheck(torch.ops.grank.mips_topk.default, (*op_arguments()[which], backend))


def test_compile_fake_shapes(backend: str) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        got = gk.mips_topk(torch.empty(6, 10, dtype=torch.float16), torch.empty(50, 10), 70, backend=backend)
        assert (got.values.shape, got.values.dtype) == ((6, 70), torch.float32)
        assert (got.indices.shape, got.indices.dtype) == ((6, 70), torch.int64)


def compiled_agrees(compiler: str, backend: str) -> None:
    def loss(queries: torch.Tensor, rows: torch.Tensor, exclude: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        top = gk.mips_topk(queries * 2, rows, 4, exclude=exclude, backend=backend)
        return top.values.tanh().sum(), top.indices

    compiled = torch.compile(loss, fullgraph=True, backend=compiler)
    for B, N in ((3, 40), (5, 60), (6, 70)):  # dynamic shapes from the second call on
        inputs = torch.randn(B, 8, requires_grad=True), torch.randn(N, 8, requires_grad=True)
        exclude = torch.randint(-1, N, (B, 3))
        (want, want_ids), (got, got_ids) = loss(*inputs, exclude), compiled(*inputs, exclude)
        assert torch.equal(got_ids, want_ids)
        torch.testing.assert_close(got, want)
        for mine, theirs in zip(torch.autograd.grad(got, inputs), torch.autograd.grad(want, inputs), strict=True):
            torch.testing.assert_close(mine, theirs)


def test_compile(backend: str) -> None:
    torch.compiler.reset()
    compiled_agrees("aot_eager", backend)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # raised by inductor
def test_compile_inductor(backend: str) -> None:
    torch.compiler.reset()
    compiled_agrees("inductor", backend)


def test_compile_of_a_table(kind: str, backend: str) -> None:
    torch.compiler.reset()
    table = gk.ItemTable.from_rows(torch.randn(60, 8), dtype=getattr(torch, kind), ids=torch.randperm(60) + 9)
    queries, allow = torch.randn(3, 8), torch.rand(60) < 0.5

    def top(queries: torch.Tensor, allow: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        values, indices = gk.mips_topk(queries, table, 7, allow=allow, backend=backend)
        return values, indices

    got = torch.compile(top, fullgraph=True, backend="aot_eager")(queries, allow)
    assert_same(gk.TopK(*got), gk.TopK(*top(queries, allow)))


def test_compile_for_export(backend: str) -> None:
    class Retriever(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.items = torch.nn.Parameter(torch.randn(60, 8))

        def forward(self, queries: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            values, indices = gk.mips_topk(queries, self.items, 7, backend=backend)
            return values, indices

    module = Retriever()
    program = torch.export.export(module, (torch.randn(3, 8),), dynamic_shapes=({0: torch.export.Dim("B", min=2)},))
    queries = torch.randn(5, 8)
    assert_same(gk.TopK(*program.module()(queries)), gk.TopK(*module(queries)))


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("options", [{}, {"ids": torch.arange(60) * 3}, {"coarse": torch.int8}], ids=str)
def test_an_exported_search_of_a_table_is_saved_and_loaded(options: dict[str, Any], strict: bool) -> None:
    class Retriever(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.items = gk.ItemTable.from_rows(torch.randn(60, 8), **options)
            self.user = torch.nn.Linear(5, 8)

        def forward(self, features: torch.Tensor) -> gk.TopK:
            return gk.mips_topk(self.user(features), self.items, 7)

    module, file, features = Retriever(), io.BytesIO(), torch.randn(4, 5)
    shapes = ({0: torch.export.Dim("B", min=2)},)
    torch.export.save(torch.export.export(module, (features[:3],), dynamic_shapes=shapes, strict=strict), file)
    file.seek(0)
    got = torch.export.load(file).module()(features)
    assert isinstance(got, gk.TopK)
    assert_same(got, module(features))
