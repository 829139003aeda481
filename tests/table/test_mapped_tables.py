"""Tables that stay in their files."""

import copy
import pickle
from pathlib import Path

import pytest
import torch
from oracle import assert_same
from table_cases import assert_equal_tables, run, table_of

import grank_kernels as gk

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
    mapped.save(tmp_path / "table")  # onto itself
    assert_equal_tables(gk.ItemTable.load(tmp_path / "table"), table)


def test_a_mapped_file_is_not_copied(tmp_path: Path) -> None:
    """The limit of the contract: 64 MB and what the result takes, for a table of 256 MB."""
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
