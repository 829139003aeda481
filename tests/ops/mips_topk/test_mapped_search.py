"""Tables searched on disk, part by part: equal bits to a search in memory."""

import queue
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from oracle import BACKENDS, KINDS, assert_same

import grank_kernels as gk
from grank_kernels.ops import mapped_search
from grank_kernels.table import mapping
from grank_kernels.table.mapping import Mapping, streamed

pytestmark = pytest.mark.usefixtures("one_thread")


def on_disk(table: gk.ItemTable, folder: Path) -> gk.ItemTable:
    table.save(folder / "table")
    return gk.ItemTable.load(folder / "table", mmap=True)


@pytest.fixture
def short_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mapped_search, "PART_BYTES", 2000)  # so that the tables below have many parts


@pytest.mark.usefixtures("short_parts")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("with_ids", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_same_as_in_memory(kind: str, with_ids: bool, backend: str, tmp_path: Path) -> None:
    N = 701
    rows = torch.randint(-2, 3, (N, 6)).float()  # many ties
    ids = torch.randperm(5 * N)[:N] if with_ids else None
    table = gk.ItemTable.from_rows(rows, ids=ids, dtype=getattr(torch, kind))
    mapped = on_disk(table, tmp_path)
    queries = torch.randint(-2, 3, (4, 6)).float()
    exclude = table.ids[torch.randint(0, N, (4, 90))]
    exclude[:, ::3] = -1
    filters: list[dict[str, Any]] = [
        {}, {"exclude": exclude}, {"allow": torch.rand(N) < 0.3}, {"allow": torch.rand(4, N) < 0.3, "exclude": exclude},
        {"allow": torch.arange(N) < 20},
    ]  # fmt: skip
    for given_filters in filters:
        for k in (1, 60, N + 5):
            got = gk.mips_topk(queries, mapped, k, backend=backend, **given_filters)
            assert_same(got, gk.mips_topk(queries, table, k, backend=backend, **given_filters))
    assert_same(gk.mips_topk(queries[0], mapped, 9), gk.mips_topk(queries[0], table, 9))
    assert gk.mips_topk(queries[:0], mapped, 9).values.shape == (0, 9)


@pytest.mark.usefixtures("short_parts")
def test_progress(tmp_path: Path) -> None:
    table, seen = gk.ItemTable.from_rows(torch.randn(701, 6)), []
    queries = torch.randn(2, 6)
    step = 2000 // (4 * 6)
    top = gk.mips_topk(queries, on_disk(table, tmp_path), 9, progress=lambda *counts: seen.append(counts))
    assert seen == [(min(701, done), 701) for done in range(step, 701 + step, step)]
    assert_same(top, gk.mips_topk(queries, table, 9, progress=lambda *counts: pytest.fail("it is in memory")))


@settings(max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    n=st.integers(0, 60), d=st.integers(0, 9), k=st.integers(1, 70), part=st.integers(1, 400),
    special=st.lists(st.sampled_from([torch.inf, -torch.inf, torch.nan, 0.0, -0.0, 1e-45]), max_size=12),
)  # fmt: skip
def test_any_table(n: int, d: int, k: int, part: int, special: list[float], tmp_path: Path) -> None:
    rows = torch.randn(n, d)
    for value in special if n * d else []:
        rows.view(-1)[torch.randint(0, n * d, (1,))] = value
    table = gk.ItemTable.from_rows(rows)
    queries = torch.randn(3, d)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mapped_search, "PART_BYTES", part)
        assert_same(gk.mips_topk(queries, on_disk(table, tmp_path), k), gk.mips_topk(queries, table, k))


@pytest.mark.usefixtures("short_parts")
def test_a_certified_table_reads_few_rows_of_the_file(tmp_path: Path) -> None:
    table = gk.ItemTable.from_rows(torch.randn(5000, 16), dtype=torch.float32, coarse=torch.int8)
    mapped, queries = on_disk(table, tmp_path), torch.randn(3, 16)
    assert_same(gk.mips_topk(queries, mapped, 10), gk.mips_topk(queries, table, 10))
    assert int(gk.count_rescored(queries, mapped, 10).max()) < 500


@pytest.mark.usefixtures("short_parts")
def test_the_gradient_of_the_queries(tmp_path: Path) -> None:
    table = gk.ItemTable.from_rows(torch.randn(300, 5), ids=torch.randperm(300) + 7)
    queries = torch.randn(2, 5, requires_grad=True)
    top = gk.mips_topk(queries, on_disk(table, tmp_path), 6)
    top.values.sum().backward()
    torch.testing.assert_close(queries.grad, table.rows(top.indices).sum(1))


@pytest.mark.usefixtures("short_parts")
def test_errors_are_those_of_tables_in_memory(tmp_path: Path) -> None:
    mapped = on_disk(gk.ItemTable.from_rows(torch.ones(300, 5)), tmp_path)
    with pytest.raises(ValueError, match=r"exclude must hold ids in \[-1, 300\), -1 for none, got 300"):
        gk.mips_topk(torch.ones(1, 5), mapped, 3, exclude=torch.tensor([[300]]))
    with pytest.raises(ValueError, match=r"allow must be \(300,\)"):
        gk.mips_topk(torch.ones(1, 5), mapped, 3, allow=torch.ones(299, dtype=torch.bool))


def test_parts_are_prefetched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mapping, "_AHEAD", 2)
    asked: queue.Queue[int] = queue.Queue()
    seen: list[int] = []
    for part in streamed(range(7), asked.put):
        while len(seen) < min(7, part + 3):
            seen.append(asked.get(timeout=60))  # raises unless the part was requested before this loop continues
    assert seen == list(range(7))
    assert asked.empty()


def test_an_error_of_prefetching_is_raised() -> None:
    def fails(part: int) -> None:
        raise OSError(5, "Input/output error")

    with pytest.raises(OSError, match="Input/output error"):
        list(streamed(range(7), fails))


@pytest.mark.usefixtures("short_parts")
def test_every_byte_is_prefetched_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = gk.ItemTable.from_rows(torch.ones(1000, 9), ids=torch.arange(1000), dtype=torch.int8)
    mapped, asked = on_disk(table, tmp_path), 0
    read_ahead = Mapping.read_ahead

    def counted(self: Mapping, x: torch.Tensor) -> None:
        nonlocal asked
        asked += x.nbytes
        read_ahead(self, x)

    monkeypatch.setattr(Mapping, "read_ahead", counted)
    gk.mips_topk(torch.ones(2, 9), mapped, 5)
    assert asked == table.nbytes
