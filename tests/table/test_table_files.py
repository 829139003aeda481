"""Files of tables: what was saved is loaded, anything else is refused, and whatever fails, no table is lost."""

import copy
import json
import os
import pickle
import re
import resource
import signal
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from oracle import KINDS, TESTS, assert_same
from safetensors import safe_open
from safetensors.torch import save_file

import grank_kernels as gk
from grank_kernels.table import file as table_file
from grank_kernels.table import versions as table_versions
from grank_kernels.table.versions import Columns

pytestmark = pytest.mark.usefixtures("one_thread")
KINDS_OF_TABLES = [*((kind, None) for kind in KINDS), ("float32", torch.int8), ("bfloat16", torch.int8)]


def table_of(n: int, d: int, kind: str, coarse: torch.dtype | None = None, with_ids: bool = True) -> gk.ItemTable:
    ids = torch.randperm(10 * n + 1)[:n] if with_ids else None
    return gk.ItemTable.from_rows(torch.randn(n, d), ids=ids, dtype=getattr(torch, kind), coarse=coarse)


def assert_equal_tables(got: gk.ItemTable, want: gk.ItemTable) -> None:
    kept = want.current.compact()
    for name, column in got.current.compact()._asdict().items():
        other = getattr(kept, name)
        assert (column is None) == (other is None), name
        if column is not None and other is not None:
            assert (column.dtype, column.shape) == (other.dtype, other.shape)
            assert torch.equal(column, other), name
    basis, other = got.current.basis, want.current.basis
    assert (basis is None) == (other is None)
    assert basis is None or other is None or torch.equal(basis, other)


# ---- there and back ----


@pytest.mark.parametrize("mmap", [False, True])
@pytest.mark.parametrize("with_ids", [False, True])
@pytest.mark.parametrize(("kind", "coarse"), KINDS_OF_TABLES)
def test_there_and_back(kind: str, coarse: torch.dtype | None, with_ids: bool, mmap: bool, tmp_path: Path) -> None:
    for n, d in ((300, 16), (77, 5), (1, 1), (0, 3), (4, 0)):
        table = table_of(n, d, kind, coarse, with_ids)
        table.save(tmp_path / "table")
        assert_equal_tables(gk.ItemTable.load(tmp_path / "table", mmap=mmap), table)
    assert os.listdir(tmp_path) == ["table"]


@pytest.mark.parametrize("mmap", [False, True])
def test_a_basis_is_kept(mmap: bool, tmp_path: Path) -> None:
    rows = torch.randn(600, 16) * torch.tensor([30.0, 30.0, *[1.0] * 14])
    table = gk.ItemTable.from_rows(rows, dtype=torch.float32, coarse=torch.int8)
    assert table.current.basis is not None
    table.save(tmp_path / "table")
    loaded = gk.ItemTable.load(tmp_path / "table", mmap=mmap)
    assert_equal_tables(loaded, table)
    queries = torch.randn(5, 16)
    assert_same(gk.mips_topk(queries, loaded, 20), gk.mips_topk(queries, table, 20))
    assert torch.equal(gk.count_rescored(queries, loaded, 5), gk.count_rescored(queries, table, 5))


@pytest.mark.parametrize(("kind", "coarse"), KINDS_OF_TABLES)
def test_an_updated_table_is_saved_without_what_is_gone(kind: str, coarse: torch.dtype | None, tmp_path: Path) -> None:
    table = table_of(2000, 8, kind, coarse, with_ids=False)
    table.upsert(torch.arange(1900, 2100), torch.randn(200, 8))
    table.remove(torch.arange(50, 150))
    assert table.current.size > len(table)
    table.save(tmp_path / "table")
    loaded = gk.ItemTable.load(tmp_path / "table")
    assert_equal_tables(loaded, table)
    loaded.upsert(torch.tensor([60]), torch.ones(1, 8))
    assert len(loaded) == len(table) + 1


def test_parts_shorter_than_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (table_versions, table_file):
        monkeypatch.setattr(module, "PART_BYTES", 100)
    table = table_of(501, 7, "float16", torch.int8)
    table.save(tmp_path / "table")
    for mmap in (False, True):
        assert_equal_tables(gk.ItemTable.load(tmp_path / "table", mmap=mmap), table)


@pytest.mark.parametrize(("kind", "coarse"), KINDS_OF_TABLES)
def test_the_safetensors_library_reads_the_file(kind: str, coarse: torch.dtype | None, tmp_path: Path) -> None:
    table = table_of(64, 8, kind, coarse)
    table.save(tmp_path / "table")
    with safe_open(tmp_path / "table", "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  it is no dictionary
        assert file.metadata()["format"] == "grank_kernels.ItemTable"
    present = table.current.columns.present()
    assert tensors.keys() == present.keys()
    assert all(torch.equal(tensors[name], column) for name, column in present.items())


@pytest.mark.parametrize("kind", KINDS)
def test_rows_begin_with_a_cache_line(kind: str, tmp_path: Path) -> None:
    table_of(64, 8, kind).save(tmp_path / "table")
    assert gk.ItemTable.load(tmp_path / "table", mmap=True).operands()[0].data_ptr() % 64 == 0


def test_rows_that_come_in_parts(tmp_path: Path) -> None:
    rows = torch.randn(1000, 12)
    for kind in KINDS:
        dtype = getattr(torch, kind)
        parts = (rows[start : start + 300] for start in range(0, 1000, 300))
        gk.ItemTable.write(tmp_path / "table", parts, num_rows=1000, dtype=dtype)
        assert_equal_tables(gk.ItemTable.load(tmp_path / "table"), gk.ItemTable.from_rows(rows, dtype=dtype))
    gk.ItemTable.write(tmp_path / "table", [rows.half(), rows], num_rows=2000)
    assert gk.ItemTable.load(tmp_path / "table").dtype == torch.float16


@pytest.mark.parametrize(
    ("message", "parts", "num_rows"),
    [
        ("parts has none; it takes at least one", [], 0),
        ("parts hold fewer rows than the 9 ", [torch.ones(4, 3), torch.ones(4, 3)], 9),
        ("parts hold more rows than the 7 ", [torch.ones(4, 3), torch.ones(4, 3)], 7),
        (r"rows have shape \(4, 2\); the first part's have width 3", [torch.ones(4, 3), torch.ones(4, 2)], 8),
        ("rows are torch.float64", [torch.ones(4, 3), torch.ones(4, 3).double()], 8),
    ],
)
def test_errors_of_parts(message: str, parts: list[torch.Tensor], num_rows: int, tmp_path: Path) -> None:
    old = table_of(5, 3, "float32")
    old.save(tmp_path / "table")
    with pytest.raises(ValueError, match=message):
        gk.ItemTable.write(tmp_path / "table", parts, num_rows=num_rows)
    assert_equal_tables(gk.ItemTable.load(tmp_path / "table"), old)
    assert os.listdir(tmp_path) == ["table"]


# ---- what is refused ----


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A table with every tensor there is but the basis."""
    torch.manual_seed(1)
    path = tmp_path_factory.mktemp("tables") / "table"
    table_of(9, 3, "float32", torch.int8).save(path)
    return path


def loads(path: Path, data: bytes) -> gk.ItemTable:
    path.write_bytes(data)
    gk.ItemTable.load(path, mmap=True)
    return gk.ItemTable.load(path)


@pytest.mark.parametrize("bits", [[None], pytest.param(range(8), marks=pytest.mark.slow)])
def test_no_bit_can_change_unnoticed(bits: list[int | None], saved: Path, tmp_path: Path) -> None:
    """Every byte of the file, header, padding and data: one bit of it, and in the slow test each."""
    good, path = saved.read_bytes(), tmp_path / "damaged"
    for at in range(len(good)):
        for bit in bits:
            damaged = bytearray(good)
            damaged[at] ^= 1 << (at * 5 % 8 if bit is None else bit)
            with pytest.raises(ValueError, match=r"damaged (is|has)"):
                loads(path, damaged)
    assert len(loads(path, good)) == 9


def test_no_length_but_the_right_one(saved: Path, tmp_path: Path) -> None:
    good, path = saved.read_bytes(), tmp_path / "damaged"
    for length in range(len(good)):
        with pytest.raises(ValueError, match=r"damaged is (empty|truncated)"):
            loads(path, good[:length])
    with pytest.raises(ValueError, match="damaged is malformed: it has"):
        loads(path, good + b"\0")


def edited(good: bytes, edit: Callable[[dict[str, Any]], None]) -> bytes:
    """The file with another header, and the data as they were."""
    start = 8 + int.from_bytes(good[:8], "little")
    header = json.loads(good[8:start])
    edit(header)
    text = json.dumps(header).encode()
    text += b" " * (-(8 + len(text)) % 64)
    return len(text).to_bytes(8, "little") + text + good[start:]


REFUSED: list[tuple[str, Callable[[dict[str, Any]], Any]]] = [
    ("has format_version '2'; this version of grank_kernels reads '1'",
     lambda h: h["__metadata__"].update(format_version="2")),
    ("has format_version None", lambda h: h["__metadata__"].pop("format_version")),
    ("is no table: its header does not say", lambda h: h["__metadata__"].update(format="pt")),
    ("is no table: its header does not say", lambda h: h.pop("__metadata__")),
    ("is no table: its header does not say", lambda h: h.update(__metadata__=[])),
    ("tables have no tensor 'weight'", lambda h: h.update(weight=h.pop("ids"))),
    ("is malformed: rows are None", lambda h: h.pop("rows")),
    ("is malformed: it has no coarse_error", lambda h: h.pop("coarse_error")),
    ("is malformed: rows are", lambda h: h["rows"].update(shape=[27])),
    ("is malformed: rows is", lambda h: h["rows"].update(shape=[9, -3])),
    ("is malformed: rows is", lambda h: h["rows"].update(shape=[9.0, 3])),
    ("is malformed: rows is", lambda h: h["rows"].update(shape=[True, 27])),
    ("is malformed: rows is", lambda h: h["rows"].update(shape=[1 << 62, 0])),
    ("is malformed: rows is", lambda h: h["rows"].update(shape=None)),
    ("is malformed: rows is", lambda h: h["rows"].update(dtype="F8_E4M3")),
    ("is malformed: rows is", lambda h: h["rows"].update(dtype=["F32"])),
    ("is malformed: rows is", lambda h: h["rows"].update(data_offsets=[0])),
    ("is malformed: rows is", lambda h: h.update(rows=7)),
    ("rows has 108 bytes for shape", lambda h: h["rows"].update(shape=[10, 3])),
    ("rows has 108 bytes for shape", lambda h: h["rows"].update(dtype="F16")),
    ("is malformed: ids has shape", lambda h: h["ids"].update(dtype="F64")),
    ("is malformed: coarse_scale has shape", lambda h: h["coarse_scale"].update(shape=[3, 3])),
    ("begins at byte", lambda h: h["ids"].update(data_offsets=[x + 8 for x in h["ids"]["data_offsets"]])),
    ("begins at byte", lambda h: h["coarse_scale"].update(data_offsets=h["coarse_error"]["data_offsets"])),
    ("is corrupted: rows has checksum", lambda h: h["__metadata__"].update({"xxh3_64.rows": "0" * 16})),
    ("is corrupted: rows has checksum .* not None", lambda h: h["__metadata__"].pop("xxh3_64.rows")),
    ("is corrupted", lambda h: (h["coarse_scale"].update(data_offsets=h["coarse_error"]["data_offsets"]),
                                h["coarse_error"].update(data_offsets=[72 + 108, 72 + 108 + 36]))),
]  # fmt: skip


@pytest.mark.parametrize(("message", "edit"), REFUSED)
def test_headers_that_are_refused(
    message: str, edit: Callable[[dict[str, Any]], Any], saved: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=f"damaged {message}" if message.startswith(("is", "has")) else message):
        loads(tmp_path / "damaged", edited(saved.read_bytes(), edit))


def test_other_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "other"
    save_file({"rows": torch.ones(4, 3)}, path)
    with pytest.raises(ValueError, match="other is no table: its header does not say that its format is grank_kernels"):
        gk.ItemTable.load(path)
    torch.save(torch.ones(4, 3), path)
    with pytest.raises(ValueError, match="other is no table: its header would have"):
        gk.ItemTable.load(path)
    for text in (b"[" * 60_000, b"{'a': 1}", b"\xff\xfe", b"1" * 5000, b"[]", b'{"__metadata__": 3}'):
        with pytest.raises(ValueError, match="other is no table"):
            loads(path, len(text).to_bytes(8, "little") + text)
    with pytest.raises(FileNotFoundError, match="nothing here"):
        gk.ItemTable.load(tmp_path / "nothing here")
    with pytest.raises(IsADirectoryError):
        gk.ItemTable.load(tmp_path)
    with pytest.raises(IsADirectoryError, match="path must be a file, got a folder"):
        table_of(2, 2, "float32").save(tmp_path)
    with pytest.raises(FileNotFoundError):
        table_of(2, 2, "float32").save(tmp_path / "no folder" / "table")


@pytest.mark.parametrize(("ids", "message"), [([5, 5], "ids must be unique; 5"), ([5, -1], "ids must not be negative")])
def test_ids_that_no_table_has(ids: list[int], message: str, tmp_path: Path) -> None:
    columns = Columns(torch.ones(2, 3), ids=torch.tensor(ids))
    table_file.write(tmp_path / "foreign", columns, [columns])
    with pytest.raises(ValueError, match=f"foreign is malformed: {message}"):
        gk.ItemTable.load(tmp_path / "foreign")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
    | st.sampled_from(["rows", "ids", "F32", "I8", "__metadata__", "dtype", "shape", "data_offsets"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)  # fmt: skip


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_header_is_read_or_refused(data: st.DataObject, saved: Path, tmp_path: Path) -> None:
    """Some value in the header becomes any other: ValueError or, if it means the same, the same table."""

    def edit(header: dict[str, Any]) -> None:
        at: Any = header
        while True:
            key = data.draw(st.sampled_from(sorted(at) if isinstance(at, dict) else range(len(at))))
            if isinstance(at[key], (dict, list)) and at[key] and data.draw(st.booleans()):
                at = at[key]
                continue
            at[key] = data.draw(JSON)
            return

    try:
        got = loads(tmp_path / "fuzzed", edited(saved.read_bytes(), edit))
    except ValueError as error:
        assert "fuzzed" in str(error)  # noqa: PT017  most, but not all of them are refused
    else:
        assert_equal_tables(got, gk.ItemTable.load(saved))


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.binary(max_size=300), front=st.integers(0, 2))
def test_any_bytes_are_refused(data: bytes, front: int, tmp_path: Path) -> None:
    data = (b"", len(data).to_bytes(8, "little"), (len(data) // 2).to_bytes(8, "little"))[front] + data
    with pytest.raises(ValueError, match="fuzzed is"):
        loads(tmp_path / "fuzzed", data)


def test_damage_that_is_not_looked_for(saved: Path, tmp_path: Path) -> None:
    """`verify=False` is for files too large to be read at every start."""
    path = tmp_path / "damaged"
    data = bytearray(saved.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    for mmap in (False, True):
        assert len(gk.ItemTable.load(path, mmap=mmap, verify=False)) == 9


# ---- nothing is lost ----


def run(code: str, *arguments: object, **options: Any) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)],
        capture_output=True, text=True, cwd=TESTS.parent, env=os.environ | {"OMP_NUM_THREADS": "1"}, **options,
    )  # fmt: skip


def test_killed_at_any_call(tmp_path: Path) -> None:
    """A process that saves ends before its n-th system call, for every n. The next one waits for no lock."""
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
        "9,1.0,table",  # the temporary of the process before is deleted, and there is no new one yet
    }
    assert set(killed[renamed:]) == {"9,2.0,table"}


@pytest.mark.slow
def test_killed_at_any_moment(tmp_path: Path) -> None:
    code = """
        import sys, torch, grank_kernels as gk
        print("ready", flush=True)
        version = 1.0
        while True:
            version += 1
            gk.ItemTable.from_rows(torch.full((200_000, 8), version)).save(sys.argv[1])
    """
    path = tmp_path / "table"
    gk.ItemTable.from_rows(torch.full((200_000, 8), 1.0)).save(path)
    for delay in torch.rand(8).tolist():
        writer = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(code), str(path)], stdout=subprocess.PIPE, cwd=TESTS.parent
        )
        assert writer.stdout is not None
        writer.stdout.readline()
        threading.Event().wait(0.3 * delay)
        writer.send_signal(signal.SIGKILL)
        writer.communicate()
        assert len(gk.ItemTable.load(path).rows(torch.arange(0, 200_000, 97)).unique()) == 1
        assert "table" in (left := os.listdir(tmp_path))
        assert len(left) <= 2


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
    """A limit on the size of a file fails in the same calls as a disk without room."""
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
    """Under a limit on memory: an error that says so, and a table that goes on as it was."""
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


# ---- on disk ----


def test_a_mapped_table(tmp_path: Path) -> None:
    table = table_of(100, 8, "int8")
    table.save(tmp_path / "table")
    mapped = gk.ItemTable.load(tmp_path / "table", mmap=True)
    assert repr(mapped) == "ItemTable(100 x 8 int8, 0.002 MB, ids, memory-mapped)"
    one = torch.tensor([1])
    for update in (lambda: mapped.upsert(one, torch.ones(1, 8)), lambda: mapped.remove(one)):
        with pytest.raises(ValueError, match="a memory-mapped table takes no updates; load it with mmap=False"):
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
