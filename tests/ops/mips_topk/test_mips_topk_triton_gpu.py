"""The triton backend on a GPU, compared with the reference."""

from typing import Any

import pytest
import torch
from hard_tables import table
from oracle import assert_same, integers

import grank_kernels as gk
from grank_kernels.backends import triton as backend

pytest.importorskip("triton")
if backend.unavailable() is not None or backend.INTERPRETED:
    pytest.skip("there is no GPU, or TRITON_INTERPRET is set", allow_module_level=True)


@pytest.fixture
def gpu() -> torch.device:
    return torch.device("cuda")


def integer_problem(kind: str, B: int, N: int, d: int, device: torch.device) -> tuple[torch.Tensor, Any]:
    most = 127 if kind == "int8" else 4
    table = gk.ItemTable.from_rows(integers(N, d, most=most), dtype=getattr(torch, kind), ids=torch.randperm(N) + 2**40)
    return integers(B, d, most=most).to(device), table.to(device)


@pytest.mark.gpu
@pytest.mark.parametrize("k", [10, 300, 3000])
@pytest.mark.parametrize("B", [1, 17, 300])
@pytest.mark.parametrize("d", [20, 128, 300])
def test_gpu_exact_numbers(B: int, d: int, k: int, kind: str, gpu: torch.device) -> None:
    """Many ties and every filter, repeated 20 times, because the order of programs varies."""
    N = 200_000
    queries, items = integer_problem(kind, B, N, d, gpu)
    exclude = gk.mips_topk(queries, items, 40, backend="reference").indices[:, ::2]
    allow = torch.rand(N, device=gpu) < 0.7
    want = gk.mips_topk(queries, items, k, exclude=exclude, allow=allow, backend="reference")
    for _ in range(20):
        assert_same(gk.mips_topk(queries, items, k, exclude=exclude, allow=allow, backend="triton"), want)


@pytest.mark.gpu
@pytest.mark.parametrize("d", [64, 768])
def test_gpu_batch_and_kernel_do_not_matter(d: int, kind: str, gpu: torch.device) -> None:
    dtype = None if kind == "int8" else getattr(torch, kind)
    queries, items = torch.randn(300, d), gk.ItemTable.from_rows(torch.randn(100_000, d), dtype=getattr(torch, kind))
    queries, items = queries.to(gpu, dtype or torch.float32), items.to(gpu)
    whole = gk.mips_topk(queries, items, 100, backend="triton")
    for n in (1, 16, 40, 100):
        for k in (10, 100):
            part = gk.mips_topk(queries[:n], items, k, backend="triton")
            assert_same(part, gk.TopK(whole.values[:n, :k], whole.indices[:n, :k]), f"{n} queries, k = {k}")


@pytest.mark.gpu
@pytest.mark.parametrize("which", ["constant", "two values", "ascending", "descending", "nan", "-inf", "best last"])
@pytest.mark.parametrize("k", [10, 500])
def test_gpu_hard_tables(which: str, k: int, gpu: torch.device) -> None:
    N = 300_000
    queries, rows = 2.0 ** torch.randint(-3, 4, (5, 2), device=gpu), table(which, N).to(gpu)  # exact products
    for ids in (None, torch.randperm(N)):
        items = rows if ids is None else gk.ItemTable.from_rows(rows, ids=ids.to(gpu))
        got = gk.mips_topk(queries, items, k, backend="triton")
        assert_same(got, gk.mips_topk(queries, items, k, backend="reference"), which)


@pytest.mark.gpu
@pytest.mark.parametrize("k", [10, 500])
def test_gpu_graph(k: int, kind: str, gpu: torch.device) -> None:
    """Captured once and replayed on other data, some with failed thresholds."""
    queries, items = integer_problem(kind, 9, 100_000, 64, gpu)
    rows = items.operands()[0]
    gk.mips_topk(queries, items, k, backend="triton")  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = gk.mips_topk(queries, items, k, backend="triton")
    for change in (None, 0, 1):
        if change is not None:
            rows.copy_(torch.full_like(rows, change))
        queries.copy_(integers(9, 64).to(gpu))
        graph.replay()
        assert_same(got, gk.mips_topk(queries, items, k, backend="reference"))


@pytest.mark.gpu
def test_gpu_compile(gpu: torch.device) -> None:
    torch.compiler.reset()
    compiled = torch.compile(lambda q, x: gk.mips_topk(q * 2, x, 40).values.tanh(), fullgraph=True)
    queries, rows = torch.randn(30, 64, device=gpu), torch.randn(9000, 64, device=gpu)
    torch.testing.assert_close(compiled(queries, rows), gk.mips_topk(queries * 2, rows, 40).values.tanh())


@pytest.mark.gpu
@pytest.mark.parametrize("k", [10, 500])
def test_gpu_rows_in_host_memory(k: int, kind: str, gpu: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    from grank_kernels.backends.triton import streaming

    monkeypatch.setattr(streaming, "CHUNK_BYTES", 1 << 20)
    queries, items = integer_problem(kind, 20, 100_000, 64, gpu)
    want = gk.mips_topk(queries, items, k, backend="triton")
    assert_same(gk.mips_topk(queries, items.to("cpu").pin_memory(), k), want)
