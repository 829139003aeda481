"""Failures while a table is saved, loaded or updated: the old or the new table survives."""

import os
import re
import resource
import threading
from pathlib import Path

import pytest
import torch
from oracle import assert_same
from table_cases import assert_equal_tables, run, table_of

import grank_kernels as gk

pytestmark = pytest.mark.usefixtures("one_thread")


def test_killed_at_any_call(tmp_path: Path) -> None:
    """Ends a saving process before its n-th system call, for every n; the next one must not wait for a lock."""
    code = """
        import os, sys, torch, grank_kernels as gk
        from grank_kernels.table import file as table_file
        torch.set_num_threads(1)
        table_file.PART_BYTES = 1000
        path, ids = sys.argv[1], torch.arange(500)

        def counted(call):
            def run(*arguments, **named):
                global left
                left -= 1
                if left < 0: os._exit(9)
                return call(*arguments, **named)
            return run

        gk.ItemTable.from_rows(torch.full((500, 4), 1.0), ids=ids).save(path)
        for calls in range(100):
            if (child := os.fork()) == 0:
                left = calls
                for name in ("open", "pwrite", "fsync", "rename", "close"):
                    setattr(os, name, counted(getattr(os, name)))
                gk.ItemTable.from_rows(torch.full((500, 4), 2.0), ids=ids).save(path)
                os._exit(0)
            ended = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            values = gk.ItemTable.load(path).rows(ids).unique().tolist()
            print(ended, *values, *sorted(os.listdir(os.path.dirname(path))), sep=",")
            if ended == 0: break
    """
    done = run(code, tmp_path / "table")
    assert done.returncode == 0, done.stderr
    *killed, last = done.stdout.split()
    assert last == "0,2.0,table"
    renamed = killed.index("9,2.0,table")
    assert killed[0] == "9,1.0,table"
    assert {re.sub("[0-9a-f]{8}", "X", line) for line in killed[1:renamed]} == {
        "9,1.0,.table.X.partial,table",
        "9,1.0,table",  # the earlier temporary is deleted, the new one not yet created
    }
    assert set(killed[renamed:]) == {"9,2.0,table"}


def test_killed_at_any_moment(tmp_path: Path) -> None:
    """Kills processes that save in a loop; they are forked, so torch is imported once."""
    code = """
        import os, random, signal, sys, time, torch, grank_kernels as gk
        torch.set_num_threads(1)
        path, ids = sys.argv[1], torch.arange(0, 200_000, 97)
        tables = [gk.ItemTable.from_rows(torch.full((200_000, 8), float(version))) for version in range(3)]
        tables[0].save(path)
        for trial in range(20):
            if (child := os.fork()) == 0:
                while True:
                    for table in tables: table.save(path)
            time.sleep(random.Random(trial).uniform(0, 0.2))
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            print(*gk.ItemTable.load(path).rows(ids).unique().tolist(), len(os.listdir(os.path.dirname(path))))
    """
    done = run(code, tmp_path / "table", timeout=200)
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    assert len(lines) == 20
    assert all(len(line) == 2 and line[1] in "12" for line in lines)  # one version, at most one temporary
    assert len({version for version, _ in lines}) > 1


def test_saves_at_the_same_time(tmp_path: Path) -> None:
    path = tmp_path / "table"

    def save(value: float) -> None:
        for _ in range(10):
            gk.ItemTable.from_rows(torch.full((3000, 4), value)).save(path)

    writers = [threading.Thread(target=save, args=(float(value),)) for value in range(4)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert len(gk.ItemTable.load(path).rows(torch.arange(3000)).unique()) == 1
    assert os.listdir(tmp_path) == ["table"]


@pytest.mark.parametrize("mmap", [False, True])
def test_a_table_outlives_its_file(mmap: bool, tmp_path: Path) -> None:
    table, queries = table_of(500, 8, "float16"), torch.randn(3, 8)
    table.save(tmp_path / "table")
    loaded = gk.ItemTable.load(tmp_path / "table", mmap=mmap)
    table_of(9, 3, "int8").save(tmp_path / "table")
    os.unlink(tmp_path / "table")
    assert_same(gk.mips_topk(queries, loaded, 9), gk.mips_topk(queries, table, 9))


@pytest.mark.parametrize("room", [0, 500, 8_000])
def test_a_full_disk(room: int, tmp_path: Path) -> None:
    """A limit on the file size: it fails in the same calls as a full disk."""
    old, new = table_of(5, 3, "float32"), table_of(1000, 4, "float32")
    old.save(tmp_path / "table")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
    try:
        with pytest.raises(OSError, match=r"File too large: .*table"):
            new.save(tmp_path / "table")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert_equal_tables(gk.ItemTable.load(tmp_path / "table"), old)
    assert os.listdir(tmp_path) == ["table"]
    new.save(tmp_path / "table")
    assert_equal_tables(gk.ItemTable.load(tmp_path / "table"), new)


@pytest.mark.parametrize("call", ["fsync", "rename", "pwrite"])
def test_a_disk_that_fails(call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = table_of(5, 3, "float32")
    old.save(tmp_path / "table")

    def fails(*_: object) -> None:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(os, call, fails)
        with pytest.raises(OSError, match=r"Input/output error: .*table"):
            table_of(50, 3, "float32").save(tmp_path / "table")
    assert_equal_tables(gk.ItemTable.load(tmp_path / "table"), old)
    assert os.listdir(tmp_path) == ["table"]


def test_no_memory_to_load_or_update(tmp_path: Path) -> None:
    """Under a memory limit: an error that says so, and an unchanged table."""
    table_of(2_000_000, 16, "float32", with_ids=False).save(tmp_path / "table")
    code = """
        import resource, sys, torch, grank_kernels as gk
        torch.set_num_threads(1)
        queries = torch.ones(1, 16)
        def allow(megabytes):
            used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (used + megabytes * 2**20, -1))
        table = gk.ItemTable.load(sys.argv[1])
        before = gk.mips_topk(queries, table, 10)
        allow(50)
        for action in (lambda: gk.ItemTable.load(sys.argv[1]), lambda: table.upsert(torch.tensor([1]), queries)):
            try:
                action()
                raise SystemExit("128 MB in 50")
            except (MemoryError, RuntimeError) as error:
                print(error)
        after = gk.mips_topk(queries, table, 10)
        assert torch.equal(before.indices, after.indices) and table.version == 0
        allow(500)
        table.upsert(torch.tensor([1]), queries * 100)
        assert gk.mips_topk(queries, table, 1).indices.tolist() == [[1]] and table.version == 1
    """
    done = run(code, tmp_path / "table")
    assert done.returncode == 0, done.stderr[-1000:]
    assert "allocate" in done.stdout.lower()
