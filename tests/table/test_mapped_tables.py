"""Tables mapped from files."""

import copy
import errno
import gc
import os
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from oracle import assert_same
from table_cases import assert_equal_tables, run, table_of

import grank_kernels as gk
from grank_kernels.ops.mapped_search import order_key
from grank_kernels.table import mapping

pytestmark = pytest.mark.usefixtures("one_thread")


def test_a_mapped_table(tmp_path: Path) -> None:
    table = table_of(100, 8, "int8")
    table.save(tmp_path / "table")
    mapped = gk.ItemTable.load(tmp_path / "table", mmap=True)
    assert repr(mapped) == "ItemTable(100 x 8 int8, 0.002 MB, ids, memory-mapped)"
    one = torch.tensor([1])
    for update in (lambda: mapped.upsert(one, torch.ones(1, 8)), lambda: mapped.remove(one)):
        with pytest.raises(ValueError, match="the table must be in memory to be updated, got a memory-mapped one"):
            update()
    with pytest.raises(TypeError, match="a memory-mapped ItemTable cannot be pickled: send its path"):
        pickle.dumps(mapped)
    queries = torch.randn(2, 8)
    assert_same(gk.mips_topk(queries, copy.deepcopy(mapped), 9), gk.mips_topk(queries, table, 9))
    mapped.save(tmp_path / "table")  # onto its own file
    assert_equal_tables(gk.ItemTable.load(tmp_path / "table"), table)


def test_a_mapped_file_is_not_copied(tmp_path: Path) -> None:
    """The limit of the contract, 64 MB beside the result, for a table of 256 MB."""
    rows = torch.randn(1000, 64)
    gk.ItemTable.write(tmp_path / "table", (rows for _ in range(2000)), num_rows=2_000_000, dtype=torch.float16)
    code = """
        import sys, torch, grank_kernels as gk
        def anonymous():
            return int(next(line for line in open("/proc/self/status") if line.startswith("RssAnon")).split()[1])
        table = gk.ItemTable.load(sys.argv[1], mmap=True)
        queries = torch.ones(8, 64)
        gk.mips_topk(queries, torch.ones(100, 64), 5)
        before = anonymous()
        top = gk.mips_topk(queries, table, 100)
        print(anonymous() - before)
        assert top.indices.max() < 2_000_000 and top.indices.min() >= 0
    """
    done = run(code, tmp_path / "table")
    assert done.returncode == 0, done.stderr[-1000:]
    assert int(done.stdout) < 64 * 1024


# ---- files that change, and file systems without mmap ----


def shrink(path: Path) -> None:
    os.truncate(path, os.path.getsize(path) - 1)


def grow(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"more")


def rewrite(path: Path) -> None:
    """Rewrites a file with the same size and sets its time: the clock of files is coarser than a test."""
    with path.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"x")
    os.utime(path, ns=(0, 12345))


@pytest.mark.parametrize("coarse", [None, torch.int8])
@pytest.mark.parametrize("change", [shrink, grow, rewrite])
def test_a_file_changed_in_place_is_refused(
    change: Callable[[Path], None], coarse: torch.dtype | None, tmp_path: Path
) -> None:
    table_of(100, 8, "float32", coarse, with_ids=False).save(tmp_path / "table")
    mapped, one = gk.ItemTable.load(tmp_path / "table", mmap=True), torch.tensor([1])
    change(tmp_path / "table")
    for use in (
        lambda: gk.mips_topk(torch.ones(1, 8), mapped, 3),
        lambda: mapped.rows(one),
        lambda: mapped.save(tmp_path / "other"),
        lambda: mapped.to("meta"),
    ):
        with pytest.raises(ValueError, match=r"table was changed in place while it was mapped: load it again"):
            use()
    assert os.listdir(tmp_path) == ["table"]


def test_a_file_system_without_mmap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table_of(100, 8, "float32").save(tmp_path / "table")

    def fails(*_: object, **__: object) -> None:
        raise OSError(errno.ENODEV, "No such device")

    monkeypatch.setattr(mapping.mmap, "mmap", fails)
    message = r"cannot map the file into memory \(No such device\): load it with mmap=False and without part: .*table"
    for options in ({"mmap": True}, {"part": (0, 2)}):
        with pytest.raises(OSError, match=message):
            gk.ItemTable.load(tmp_path / "table", **options)  # type: ignore[arg-type]
    assert len(gk.ItemTable.load(tmp_path / "table")) == 100


def test_mapped_files_are_closed(tmp_path: Path) -> None:
    table_of(100, 8, "float32").save(tmp_path / "table")
    gc.collect()
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        gk.ItemTable.load(tmp_path / "table", mmap=True)
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("flush", [False, True])
def test_subnormal_scores_are_ordered_as_in_memory(flush: bool, tmp_path: Path) -> None:
    """Even if the process flushes subnormal numbers to 0."""
    table = gk.ItemTable.from_rows(torch.randperm(50)[:, None] * 1e-44 - 2e-43)
    table.save(tmp_path / "table")
    mapped = gk.ItemTable.load(tmp_path / "table", mmap=True)
    torch.set_flush_denormal(flush)
    try:
        assert_same(gk.mips_topk(torch.ones(1, 1), mapped, 30), gk.mips_topk(torch.ones(1, 1), table, 30))
    finally:
        torch.set_flush_denormal(False)


def test_order_keys() -> None:
    values = torch.tensor([-torch.inf, -3e38, -1.0, -1e-45, -0.0, 0.0, 1e-45, 1e-40, 1.0, 3e38, torch.inf])
    keys = order_key(values)
    assert torch.equal(keys.unique(return_inverse=True)[1], torch.tensor([0, 1, 2, 3, 4, 4, 5, 6, 7, 8, 9]))
