"""Tables in spawned and forked processes, and in threads that outlive the main thread."""

import os
import textwrap
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from oracle import assert_same
from table_cases import run, table_of

import grank_kernels as gk
from grank_kernels.table import mapping

pytestmark = pytest.mark.usefixtures("one_thread")


# ---- spawned processes ----

SPAWNED = """
    import sys, torch, torch.multiprocessing as mp
    from torch.utils.data import DataLoader, Dataset
    from grank_kernels import ItemTable, mips_topk

    class Searches(Dataset):
        def __init__(self, tables, queries):
            self.tables, self.queries = tables, queries
        def __len__(self):
            return len(self.tables)
        def __getitem__(self, i):
            torch.set_num_threads(1)
            return mips_topk(self.queries, self.tables[i], 5).indices

    def child(rank, tables, queries, wanted, replies):
        torch.set_num_threads(1)
        for table, want in zip(tables, wanted):
            assert torch.equal(mips_topk(queries, table, 5).indices, want)
            assert len(table) == 0 or table.operands()[0].is_shared()
            table.upsert(torch.tensor([10**6]), queries[:1] * 9)
            assert mips_topk(queries[0], table, 1).indices.item() == 10**6
        replies.put("fine")

    if __name__ == "__main__":
        torch.manual_seed(0)
        rows, queries = torch.randn(3000, 8), torch.randn(2, 8)
        options = [{}, {"dtype": torch.int8}, {"coarse": torch.int8}, {"ids": torch.arange(3000) * 3}]
        tables = [ItemTable.from_rows(rows, **each) for each in options]
        tables.append(ItemTable.from_rows(rows[:0]))
        updated = ItemTable.from_rows(rows)
        updated.upsert(torch.arange(50), rows[:50] + 1)
        updated.remove(torch.arange(9))
        tables.append(updated)
        wanted = [mips_topk(queries, table, 5).indices for table in tables]
        replies = mp.get_context("spawn").SimpleQueue()
        mp.spawn(child, args=(tables, queries, wanted, replies), nprocs=1)
        print(replies.get())
        assert all(torch.equal(mips_topk(queries, t, 5).indices, w) for t, w in zip(tables, wanted))
        loader = DataLoader(Searches(tables, queries), None, num_workers=1, multiprocessing_context="forkserver")
        for found, want in zip(loader, wanted):
            assert torch.equal(found, want)
        print("loaded")
"""


def test_spawned_processes_search_the_same_memory(tmp_path: Path) -> None:
    code = tmp_path / "spawned.py"  # a file, since a spawned process imports the main module
    code.write_text(textwrap.dedent(SPAWNED))
    done = run("import runpy, sys; sys.argv[0] = sys.argv[1]; runpy.run_path(sys.argv[0], run_name='__main__')",
               code, timeout=200)  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() == ["fine", "loaded"]


def test_rows_move_to_shared_memory_once_per_version() -> None:
    """Pickles as for a spawned process, without starting one."""
    table, queries = table_of(500, 8, "float32", torch.int8), torch.randn(2, 8)
    want = gk.mips_topk(queries, table, 9)
    make, (version,) = table._reduce_shared()
    assert all(x.is_shared() for x in version.columns.present().values())
    for again in (table.current, table._reduce_shared()[1][0]):
        assert again.columns.rows.data_ptr() == version.columns.rows.data_ptr()
    assert_same(gk.mips_topk(queries, table, 9), want)
    assert_same(gk.mips_topk(queries, make(version), 9), want)
    table.upsert(table.ids[:5], torch.randn(5, 8))
    assert not table.operands()[0].is_shared()
    assert_same(gk.mips_topk(queries, make(version), 9), want)
    assert table._reduce_shared()[1][0].num_rows == 500


# ---- forked processes ----


def in_a_child(check: Callable[[], object]) -> int:
    """Exit status of a check in a forked process: 0, 1 if it raises, 9 if it hangs."""
    if (child := os.fork()) == 0:
        status = [1]
        thread = threading.Thread(target=lambda: (check(), status.append(0)), daemon=True)
        thread.start()
        thread.join(30)
        os._exit(9 if thread.is_alive() else status[-1])
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_a_fork_during_an_update_updates_in_the_child() -> None:
    """The thread that holds the lock does not exist in the child."""
    table = table_of(500, 8, "float32", with_ids=False)
    with table._writing:
        status = in_a_child(lambda: table.upsert(torch.tensor([3]), torch.ones(1, 8)))
    assert status == 0


@pytest.mark.slow
def test_forks_while_threads_update() -> None:
    table, stop = table_of(2000, 8, "float32", with_ids=False), threading.Event()

    def update() -> None:
        while not stop.is_set():
            table.upsert(torch.randperm(2000)[:200], torch.randn(200, 8))

    writers = [threading.Thread(target=update) for _ in range(3)]
    for writer in writers:
        writer.start()

    def check() -> None:
        table.upsert(torch.tensor([7]), torch.full((1, 8), 100.0))
        assert gk.mips_topk(torch.ones(8), table, 1).indices.item() == 7
        assert len(table) == 2000

    statuses = [in_a_child(check) for _ in range(20)]
    stop.set()
    for writer in writers:
        writer.join()
    assert statuses == [0] * 20


# ---- the prefetcher ----


@pytest.fixture
def mapped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> gk.ItemTable:
    """A table of several parts."""
    monkeypatch.setattr("grank_kernels.ops.mapped_search.PART_BYTES", 4096)
    table_of(2000, 16, "float32").save(tmp_path / "table")
    return gk.ItemTable.load(tmp_path / "table", mmap=True)


def test_searches_share_one_thread(mapped: gk.ItemTable) -> None:
    gk.mips_topk(torch.ones(1, 16), mapped, 5)
    before = threading.active_count()
    for _ in range(5):
        gk.mips_topk(torch.ones(1, 16), mapped, 5)
    assert threading.active_count() == before
    assert sum(thread.name == "grank_kernels prefetcher" for thread in threading.enumerate()) == 1


def test_a_small_table_needs_no_thread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = table_of(500, 16, "float32")
    table.save(tmp_path / "table")

    def submit(*_: object) -> None:
        raise AssertionError("a thread for one part")

    monkeypatch.setattr(mapping._prefetcher, "submit", submit)
    small = gk.ItemTable.load(tmp_path / "table", mmap=True)
    assert_same(gk.mips_topk(torch.ones(1, 16), small, 5), gk.mips_topk(torch.ones(1, 16), table, 5))


def test_a_forked_process_has_its_own_prefetcher(mapped: gk.ItemTable) -> None:
    want = gk.mips_topk(torch.ones(1, 16), mapped, 5)
    assert in_a_child(lambda: assert_same(gk.mips_topk(torch.ones(1, 16), mapped, 5), want)) == 0


def test_without_threads_requests_are_made_by_the_search(mapped: gk.ItemTable, monkeypatch: pytest.MonkeyPatch) -> None:
    def start(_: object) -> None:
        raise RuntimeError("can't start new thread")

    want = gk.mips_topk(torch.ones(1, 16), mapped, 5)
    monkeypatch.setattr(mapping, "_prefetcher", mapping._Prefetcher())
    monkeypatch.setattr(threading.Thread, "start", start)
    assert_same(gk.mips_topk(torch.ones(1, 16), mapped, 5), want)


def test_an_error_of_a_request_reaches_the_search(mapped: gk.ItemTable, monkeypatch: pytest.MonkeyPatch) -> None:
    def read_ahead(*_: object) -> None:
        raise OSError("Input/output error")

    monkeypatch.setattr(mapping.Mapping, "read_ahead", read_ahead)
    with pytest.raises(OSError, match="Input/output error"):
        gk.mips_topk(torch.ones(1, 16), mapped, 5)


def test_mapped_tables_work_after_the_main_thread_has_ended(tmp_path: Path) -> None:
    """In a non-daemon thread, and in an exit handler."""
    table_of(2000, 16, "float32").save(tmp_path / "table")
    code = """
        import atexit, sys, threading, torch, grank_kernels as gk
        from grank_kernels.ops import mapped_search
        from grank_kernels.table import file
        torch.set_num_threads(1)
        mapped_search.PART_BYTES = file.PART_BYTES = 4096

        def work(name):
            threading.main_thread().join()
            table = gk.ItemTable.load(sys.argv[1], mmap=True)
            gk.ItemTable.load(sys.argv[1], part=(0, 2))
            print(name, gk.mips_topk(torch.ones(1, 16), table, 5).indices.shape[1], flush=True)

        atexit.register(lambda: print("exit", gk.mips_topk(torch.ones(1, 16), gk.ItemTable.load(sys.argv[1], mmap=True),
                                                           5).indices.shape[1], flush=True))
        threading.Thread(target=work, args=("thread",)).start()
    """
    done = run(code, tmp_path / "table", timeout=100)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.split() == ["thread", "5", "exit", "5"]
