"""Updates: every version equals a new table of the same rows, also for concurrent readers."""

import copy
import gc
import pickle
import threading
import weakref
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import BACKENDS, KINDS, assert_same

import grank_kernels as gk
from grank_kernels.table import versions as table_versions
from grank_kernels.table.versions import IdIndex, Log

pytestmark = pytest.mark.usefixtures("one_thread")
KINDS_OF_TABLES = [*((kind, None) for kind in KINDS), ("float32", torch.int8), ("float16", torch.int8)]


def table_of(
    rows: torch.Tensor, ids: torch.Tensor | None, kind: str = "float32", coarse: torch.dtype | None = None
) -> gk.ItemTable:
    return gk.ItemTable.from_rows(rows, ids=ids, dtype=getattr(torch, kind), coarse=coarse)


class Model:
    """A table, and a dictionary of its expected rows."""

    def __init__(self, rows: torch.Tensor, ids: torch.Tensor | None, kind: str, coarse: torch.dtype | None) -> None:
        self.kind = kind
        self.table = table_of(rows, ids, kind, coarse)
        self.rows = dict(zip((torch.arange(len(rows)) if ids is None else ids).tolist(), rows, strict=True))

    def upsert(self, ids: list[int]) -> None:
        rows = torch.randn(len(ids), self.table.dim)
        self.table.upsert(torch.tensor(ids, dtype=torch.int64), rows)
        self.rows |= zip(ids, rows, strict=True)

    def remove(self, ids: list[int]) -> None:
        self.table.remove(torch.tensor(ids, dtype=torch.int64))
        for each in ids:
            del self.rows[each]

    def fresh(self) -> gk.ItemTable:
        """A new table of the same rows, in another order."""
        ids = torch.tensor(sorted(self.rows), dtype=torch.int64)
        rows = torch.stack([self.rows[each] for each in ids.tolist()]) if len(ids) else torch.empty(0, self.table.dim)
        return table_of(rows, ids, self.kind)

    def check(self, backend: str = "cpu", **filters: Any) -> None:
        fresh = self.fresh()
        assert len(self.table) == len(fresh)
        assert torch.equal(self.table.ids.sort().values, fresh.ids)
        assert torch.equal(self.table.rows(fresh.ids), fresh.rows(fresh.ids))
        queries = torch.randn(3, self.table.dim)
        for k in (7, len(fresh) + 2):
            got = gk.mips_topk(queries, self.table, k, backend=backend, **filters)
            assert_same(got, gk.mips_topk(queries, fresh, k, backend=backend, **filters))


# ---- results ----


@pytest.mark.parametrize("with_ids", [False, True])
@pytest.mark.parametrize(("kind", "coarse"), KINDS_OF_TABLES)
def test_updates(kind: str, coarse: torch.dtype | None, with_ids: bool) -> None:
    """More rows than the capacity of a log: some updates append, some move the rows."""
    ids = torch.randperm(10_000)[:3000] if with_ids else None
    model = Model(torch.randn(3000, 8), ids, kind, coarse)
    moves = 0
    for step in range(24):
        known = sorted(model.rows)
        some = [known[i] for i in torch.randperm(len(known))[:150].tolist()]
        before = model.table.operands()[0].data_ptr()
        if step % 4 == 3:
            model.remove(some)
        else:
            model.upsert(sorted({*some[:75], *torch.randint(0, 10_000, (100,)).tolist()}))
        moves += model.table.operands()[0].data_ptr() != before
        assert model.table.version == step + 1
        if step % 6 == 5:
            model.check()
    assert 2 <= moves <= 8
    assert model.table.current.row_mask is not None  # the last version has deleted rows


@settings(max_examples=60)
@given(st.data())
def test_any_updates(data: st.DataObject) -> None:
    """Small logs and few ids: inserts, replacements, removals and repeated inserts in any order."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(table_versions, "_slack", lambda num_rows: data.draw(st.integers(0, 6)))
        model = Model(torch.randn(5, 4), torch.arange(5) if data.draw(st.booleans()) else None, "float32", None)
        for _ in range(data.draw(st.integers(1, 8))):
            if model.rows and data.draw(st.booleans()):
                model.remove(data.draw(st.lists(st.sampled_from(sorted(model.rows)), unique=True)))
            else:
                model.upsert(data.draw(st.lists(st.integers(0, 9), unique=True, max_size=6)))
            model.check()


@pytest.mark.parametrize("backend", BACKENDS)
def test_filters(backend: str) -> None:
    model = Model(torch.randn(400, 6), None, "float32", None)
    model.upsert(list(range(100, 300)))
    model.remove(list(range(250, 350, 2)))
    ids, exclude, snapshot = model.table.ids, torch.randint(-1, 500, (3, 60)), model.table.snapshot()
    model.check(backend, exclude=exclude)
    for allow in (torch.rand(len(ids)) < 0.5, torch.rand(3, len(ids)) < 0.5):
        got = gk.mips_topk(torch.ones(3, 6), snapshot, 400, allow=allow, exclude=exclude, backend=backend)
        for b, found in enumerate(got.indices):
            allowed = set(ids[allow if allow.dim() == 1 else allow[b]].tolist()) - set(exclude[b].tolist())
            assert set(found[found >= 0].tolist()) == allowed
    wrong = torch.ones(len(ids) + 1, dtype=torch.bool)
    with pytest.raises(ValueError, match=rf"allow must be \({len(ids)},\) or .* for 3 queries and {len(ids)} items"):
        gk.mips_topk(torch.ones(3, 6), snapshot, 4, allow=wrong)


def test_ties_are_ordered_by_id_at_any_position() -> None:
    table = gk.ItemTable.from_rows(torch.ones(2000, 4), ids=torch.arange(2000) + 10)
    table.upsert(torch.tensor([3, 15, 9000]), torch.ones(3, 4))
    table.upsert(torch.tensor([11]), torch.ones(1, 4))
    assert gk.mips_topk(torch.ones(1, 4), table, 5).indices.tolist() == [[3, 10, 11, 12, 13]]


def test_candidates_are_scored_by_the_newest_rows() -> None:
    rows, ids = torch.randn(50, 8), torch.arange(50)
    table = gk.ItemTable.from_rows(rows)
    rows[7:20] = torch.randn(13, 8)
    table.upsert(ids[7:20], rows[7:20])
    table.remove(torch.tensor([3]))
    given: dict[str, Any] = {
        "keys": torch.randn(4, 8), "values": torch.randn(4, 5), "cu_seqlens": torch.tensor([0, 4]),
        "user_hidden": torch.randn(1, 5), "item_weight": torch.randn(8, 5), "out_weight": torch.randn(5),
    }  # fmt: skip
    candidates = torch.tensor([[7, 19, 20, 49, -1]])
    assert torch.equal(gk.score_candidates(candidates, table, **given), gk.score_candidates(candidates, rows, **given))
    with pytest.raises(ValueError, match="candidate_ids must be in the table, got 3"):
        gk.score_candidates(torch.tensor([[3]]), table, **given)


def test_the_gradient_of_an_updated_table() -> None:
    model = Model(torch.randn(30, 4), None, "float32", None)
    model.upsert([3, 4, 90])
    queries = torch.randn(2, 4, requires_grad=True)
    top = gk.mips_topk(queries, model.table, 5)
    top.values.sum().backward()
    torch.testing.assert_close(queries.grad, model.table.rows(top.indices).sum(1))


# ---- versions ----


@pytest.mark.parametrize(("kind", "coarse"), KINDS_OF_TABLES)
def test_a_snapshot_does_not_change(kind: str, coarse: torch.dtype | None) -> None:
    model = Model(torch.randn(2000, 6), None, kind, coarse)
    queries = torch.randn(2, 6)
    kept = []
    for step in range(12):
        kept.append((model.table.snapshot(), model.table.ids, gk.mips_topk(queries, model.table, 50)))
        model.upsert(list(range(step * 100, step * 100 + 300)))
        model.remove(list(range(step * 50, step * 50 + 20)))
    for snapshot, ids, top in kept:
        assert torch.equal(snapshot.ids, ids)
        assert_same(gk.mips_topk(queries, snapshot, 50), top)


def test_an_updated_snapshot_leaves_the_table_unchanged() -> None:
    table = gk.ItemTable.from_rows(torch.zeros(10, 2))
    one = torch.ones(1, 2)
    table.upsert(torch.tensor([3]), one)
    fork = table.snapshot()
    fork.upsert(torch.tensor([4]), one * 2)
    table.upsert(torch.tensor([5]), one * 3)
    table.remove(torch.tensor([4]))
    assert fork.rows(torch.arange(10))[:, 0].tolist() == [0, 0, 0, 1, 2, 0, 0, 0, 0, 0]
    assert table.rows(torch.tensor([3, 5]))[:, 0].tolist() == [1, 3]
    assert (len(fork), len(table), fork.version, table.version) == (10, 9, 2, 3)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["copy", "pickle"])
@pytest.mark.parametrize("options", [{}, {"ids": torch.arange(50) * 7}, {"dtype": torch.int8}, {"coarse": torch.int8}])
def test_copies_are_equal_and_independent(options: dict[str, Any], copied: Any) -> None:
    table, queries = gk.ItemTable.from_rows(torch.randn(50, 8), **options), torch.randn(3, 8)
    table.upsert(torch.tensor([7, 1000]), torch.randn(2, 8))
    table.remove(torch.tensor([0, 14]))
    twin, before = copied(table), gk.mips_topk(queries, table, 60)
    assert_same(gk.mips_topk(queries, twin, 60), before)
    assert (len(twin), twin.version, twin.dtype) == (len(table), 2, table.dtype)
    twin.upsert(torch.tensor([7]), queries[:1] * 10)
    assert gk.mips_topk(queries[0], twin, 1).indices.item() == 7
    assert_same(gk.mips_topk(queries, table, 60), before)


def test_copies_hold_no_deleted_rows() -> None:
    model = Model(torch.randn(1500, 4), None, "float16", torch.int8)
    model.upsert(list(range(1000)))
    model.remove(list(range(100)))
    assert model.table.current.size > len(model.table)
    for twin in (copy.deepcopy(model.table), pickle.loads(pickle.dumps(model.table)), model.table.to("meta")):
        assert (len(twin), len(twin.operands()[0]), twin.version) == (1400, 1400, 2)
    same = pickle.loads(pickle.dumps(model.table))
    model.table = same
    model.check()
    model.upsert([7, 2000])
    model.check()


def soak(table: gk.ItemTable) -> tuple[set[Any], list[Any]]:
    """Runs three readers and a writer; returns the versions found by searches, and the results that match no version.

    Every row holds the number of its update, and each update removes 50 rows and the next one inserts them again, so
    all scores of a result must be equal, and it must have N or N - 50 rows.
    """
    N, ids = len(table), table.ids
    stop, seen, wrong = threading.Event(), set(), []

    def search() -> None:
        newest = (0.0, 0)
        while not stop.is_set():
            top = gk.mips_topk(torch.full((2, 4), 0.25), table, N + 100)
            values, count = top.values[top.indices >= 0], int((top.indices[0] >= 0).sum())
            version = (float(values[0]), N - count)
            if not bool((values == values[0]).all()) or version[1] not in (0, 50) or version < newest:
                wrong.append((newest, version))
            newest = version
            seen.add(version)

    readers = [threading.Thread(target=search) for _ in range(3)]
    for reader in readers:
        reader.start()
    for version in range(1, 100):
        table.upsert(ids, torch.full((N, 4), float(version)))
        table.remove(torch.randperm(N)[:50])
        if version % 10 == 0:
            stop.wait(0.01)
    stop.set()
    for reader in readers:
        reader.join()
    return seen, wrong


def test_readers_see_one_version_each() -> None:
    seen, wrong = soak(gk.ItemTable.from_rows(torch.zeros(3000, 4)))
    assert wrong == []
    assert len(seen) > 3


def test_the_soak_finds_an_update_in_two_steps() -> None:
    class TwoSteps(gk.ItemTable):
        def upsert(self, ids: torch.Tensor, rows: torch.Tensor) -> None:
            super().upsert(ids[:9], rows[:9])
            threading.Event().wait(0.001)
            super().upsert(ids[9:], rows[9:])

    assert soak(TwoSteps.from_rows(torch.zeros(3000, 4)))[1] != []


def test_writers_wait_for_each_other() -> None:
    table = gk.ItemTable.from_rows(torch.zeros(100, 2))

    def write(first: int) -> None:
        for i in range(50):
            table.upsert(torch.tensor([first + i]), torch.full((1, 2), float(first + i)))

    writers = [threading.Thread(target=write, args=(first,)) for first in (1000, 2000, 3000)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    ids = torch.cat([torch.arange(50) + first for first in (1000, 2000, 3000)])
    assert (len(table), table.version) == (250, 150)
    assert torch.equal(table.rows(ids)[:, 0], ids.float())


# ---- cost ----


def test_cost_and_memory_under_endless_updates(monkeypatch: pytest.MonkeyPatch) -> None:
    N, step, updates = 8000, 100, 300
    written, logs = [], []
    write, init = Log.write, Log.__init__

    def counting(self: Log, start: int, columns: Any, kept: torch.Tensor | None = None) -> None:
        written.append(len(columns.rows) if kept is None else len(kept))
        write(self, start, columns, kept)

    def remembering(self: Log, *arguments: Any) -> None:
        logs.append(weakref.ref(self))
        init(self, *arguments)

    monkeypatch.setattr(Log, "write", counting)
    monkeypatch.setattr(Log, "__init__", remembering)
    table = gk.ItemTable.from_rows(torch.randn(N, 8))
    for _ in range(updates):
        table.upsert(torch.randperm(N)[:step], torch.randn(step, 8))
        assert table.operands()[0].shape[0] <= N * 5 // 4
    gc.collect()
    assert len(logs) > 10
    assert [log() is not None for log in logs].count(True) == 1  # logs of old versions are freed
    assert table._log is not None
    assert table._log.capacity == N * 5 // 4
    # The first update copies the table; later, N rows are copied per N / 4 written rows.
    assert sum(written) <= N + updates * step * 5

    table.remove(torch.randperm(N)[: N - 10])
    assert table._log.capacity <= 10 + 1024


def test_an_index_has_few_runs_and_merges_each_id_a_few_times() -> None:
    index, merged, n = IdIndex(), 0, 1000
    ids = torch.randperm(n)
    for i in range(n):
        before = sum(len(run[0]) for run in index._runs[:-1]) if index._runs else 0
        index = index.updated(ids[i : i + 1], i)
        merged += sum(len(run[0]) for run in index._runs) - before
        assert len(index._runs) <= 10
    assert torch.equal(index.find(ids, -1), torch.arange(n))
    assert index.find(torch.tensor([[n, -1]]), n).tolist() == [[n, n]]
    assert merged <= n * 10 * 2


# ---- errors, and the table after them ----


FAILURES = [  # failing function, whether the rows move to a new log, the update
    *((place, True, update) for place in ("empty", "write", "wait") for update in ("upsert", "remove")),
    *((place, False, "upsert") for place in ("index", "write", "wait")),
    *((place, False, "remove") for place in ("write", "wait")),
]


@pytest.mark.parametrize(("place", "moves", "update"), FAILURES)
def test_an_update_without_memory_changes_nothing(
    place: str, moves: bool, update: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Model(torch.randn(2000, 4), None, "float32", torch.int8)
    if not moves:
        model.upsert([1, 2000])
    before = model.table.snapshot()
    own = {"empty": (table_versions, "empty"), "write": (Log, "write"), "index": (IdIndex, "updated"),
           "wait": (table_versions, "_wait")}  # fmt: skip
    work = getattr(*own[place])

    def fails(*arguments: Any) -> None:
        work(*arguments)
        raise MemoryError("no room")

    with monkeypatch.context() as patch:
        patch.setattr(*own[place], fails)
        given = (torch.tensor([5, 6]), torch.ones(2, 4))
        with pytest.raises(MemoryError, match="no room"):
            getattr(model.table, update)(*given[: 1 if update == "remove" else 2])
    assert model.table.version == before.version
    model.check()
    model.upsert([8, 3000])
    model.check()
    assert torch.equal(before.rows(torch.tensor([5, 6])), model.table.rows(torch.tensor([5, 6])))


TABLE = gk.ItemTable.from_rows(torch.ones(4, 3), ids=torch.arange(4) * 10)
NARROW, WIDE, NONE = torch.ones(1, 3), torch.ones(2, 4), torch.ones(1, dtype=torch.int32)
ERRORS: list[tuple[type[Exception], str, str, tuple[Any, ...]]] = [
    (TypeError, "rows must be a torch.Tensor or an array, got list", "upsert", (torch.arange(2), [1.0])),
    (TypeError, "ids must be a torch.Tensor or an array, got list", "upsert", ([1], NARROW)),
    (ValueError, r"rows must be \(n, 3\) on cpu, got \(2, 4\) on cpu", "upsert", (torch.arange(2), WIDE)),
    (ValueError, r"rows must have 2 dimensions, got \(3,\)", "upsert", (torch.arange(1), NARROW[0])),
    (ValueError, "rows must be .*, got torch.int8", "upsert", (torch.arange(1), NARROW.to(torch.int8))),
    (
        ValueError,
        "rows must have data, got a tensor on the meta device",
        "upsert",
        (torch.arange(1), NARROW.to("meta")),
    ),
    (ValueError, r"ids must be \(1,\), one a row, got \(2,\)", "upsert", (torch.arange(2), NARROW)),
    (ValueError, "ids must be unique, got 7", "upsert", (torch.tensor([7, 7]), WIDE[:, :3])),
    (ValueError, "ids must not be negative, got -1", "upsert", (torch.tensor([-1]), NARROW)),
    (TypeError, "ids must be a torch.Tensor or an array, got int", "remove", (3,)),
    (ValueError, "ids must be torch.int64, got torch.int32", "remove", (NONE,)),
    (ValueError, r"ids must have 1 dimension, got \(1, 1\)", "remove", (NONE[None].long(),)),
    (ValueError, "ids must be unique, got 10", "remove", (torch.tensor([10, 10]),)),
    (ValueError, "ids must be in the table, got 5", "remove", (torch.tensor([10, 5]),)),
]


@pytest.mark.parametrize(("error", "message", "update", "arguments"), ERRORS)
def test_errors(error: type[Exception], message: str, update: str, arguments: tuple[Any, ...]) -> None:
    with pytest.raises(error, match=message):
        getattr(TABLE, update)(*arguments)
    assert (len(TABLE), TABLE.version) == (4, 0)


def test_int8_takes_finite_numbers() -> None:
    table = gk.ItemTable.from_rows(torch.ones(4, 3), dtype=torch.int8)
    with pytest.raises(ValueError, match="rows must be finite for int8, got NaN or infinity in row 1"):
        table.upsert(torch.arange(2), torch.tensor([[1.0, 1, 1], [1, torch.inf, 1]]))
    assert table.version == 0


def test_an_empty_update_makes_no_version() -> None:
    table = gk.ItemTable.from_rows(torch.ones(4, 3))
    none = torch.empty(0, dtype=torch.int64)
    table.upsert(none, torch.empty(0, 3))
    table.remove(none)
    assert (table.version, len(table)) == (0, 4)


def test_a_table_may_become_empty_and_fill_again() -> None:
    model = Model(torch.randn(30, 4), None, "float32", None)
    model.remove(list(range(30)))
    model.check()
    model.upsert([5, 99])
    model.check()
    empty = Model(torch.empty(0, 4), None, "int8", None)
    empty.upsert([3])
    empty.check()
