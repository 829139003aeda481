"""`table.mask`: filters by id stay valid when updates move rows; masks by row are then refused."""

import copy
import pickle
from typing import Any

import pytest
import torch
from oracle import BACKENDS, assert_same

import grank_kernels as gk

pytestmark = pytest.mark.usefixtures("one_thread")
QUERIES = torch.randn(3, 6, generator=torch.Generator().manual_seed(1))


def table_of(n: int, with_ids: bool = True, **options: Any) -> gk.ItemTable:
    return gk.ItemTable.from_rows(torch.randn(n, 6), ids=torch.randperm(5 * n)[:n] if with_ids else None, **options)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("with_ids", [False, True])
@pytest.mark.parametrize("options", [{}, {"dtype": torch.int8}, {"coarse": torch.int8}], ids=str)
def test_a_mask_by_id_is_the_mask_by_row(options: dict[str, Any], with_ids: bool, backend: str) -> None:
    table, by_row = table_of(400, with_ids, **options), torch.rand(400) < 0.3
    want = gk.mips_topk(QUERIES, table, 50, allow=by_row, backend=backend)
    for mask in (table.mask(table.ids[by_row]), table.mask(by_row)):
        assert_same(gk.mips_topk(QUERIES, table, 50, allow=mask, backend=backend), want)


@pytest.mark.parametrize("with_ids", [False, True])
def test_a_mask_stays_valid_when_rows_move(with_ids: bool) -> None:
    table = table_of(400, with_ids)
    allowed = table.ids[torch.randperm(400)[:150]]
    mask = table.mask(allowed)
    for step in range(8):
        ids = table.ids
        table.remove(ids[torch.randperm(len(ids))[:9]])
        table.upsert(torch.cat([table.ids[5:20], torch.arange(3) + 10_000 + 3 * step]), torch.randn(18, 6))
        got = gk.mips_topk(QUERIES, table, 400, allow=mask).indices
        left = allowed[torch.isin(allowed, table.ids)].sort().values
        for found in got:
            assert torch.equal(found[found >= 0].sort().values, left)


def test_an_outdated_mask_by_row_is_refused() -> None:
    table = table_of(400, with_ids=False)
    by_row = torch.arange(400) % 10 < 3
    table.upsert(torch.tensor([400]), torch.randn(1, 6))
    gk.mips_topk(QUERIES, table, 9, allow=torch.cat([by_row, by_row[:1]]))  # a row was added, no row has moved
    table.upsert(torch.tensor([0]), torch.randn(1, 6))
    table.remove(torch.tensor([400]))
    for each in (table, copy.deepcopy(table), pickle.loads(pickle.dumps(table))):
        with pytest.raises(
            ValueError, match=r"allow must be table.mask\(ids\), got a mask by row: updates have removed"
        ):
            gk.mips_topk(QUERIES, each, 9, allow=by_row)


def test_a_snapshot_takes_masks_by_row() -> None:
    table = table_of(400)
    table.upsert(table.ids[:50], torch.randn(50, 6))
    snapshot = table.snapshot()
    by_row = torch.rand(400) < 0.3
    got = gk.mips_topk(QUERIES, snapshot, 400, allow=by_row).indices[0]
    assert torch.equal(got[got >= 0].sort().values, snapshot.ids[by_row].sort().values)
    snapshot.remove(snapshot.ids[:1])
    with pytest.raises(ValueError, match=r"allow must be table.mask\(ids\)"):
        gk.mips_topk(QUERIES, snapshot, 9, allow=by_row)


def test_a_mask_of_unknown_ids_and_of_no_ids() -> None:
    table = table_of(50)
    for ids in (torch.tensor([-1, 9_999, 2**62]), torch.empty(0, dtype=torch.int64)):
        assert (gk.mips_topk(QUERIES, table, 5, allow=table.mask(ids)).indices == -1).all()
    assert repr(table.mask(table.ids)) == "RowMask(50 ids)"


def test_a_mask_is_a_copy_and_can_be_pickled() -> None:
    table = table_of(50)
    ids = table.ids[:10].clone()
    mask, want = table.mask(ids), gk.mips_topk(QUERIES, table, 20, allow=table.mask(ids))
    ids.zero_()
    for each in (mask, pickle.loads(pickle.dumps(mask))):
        assert_same(gk.mips_topk(QUERIES, table, 20, allow=each), want)


def test_masks_with_other_arguments(tmp_path: Any) -> None:
    """Masks with exclusions, with one query, and on a mapped table."""
    table = table_of(100)
    by_row, seen = torch.rand(100) < 0.5, table.ids[torch.randint(0, 100, (3, 7))]
    table.save(tmp_path / "table")
    mapped = gk.ItemTable.load(tmp_path / "table", mmap=True)
    want = gk.mips_topk(QUERIES, table, 30, exclude=seen, allow=by_row)
    for each in (table, mapped):
        assert_same(gk.mips_topk(QUERIES, each, 30, exclude=seen, allow=each.mask(by_row)), want)
    assert torch.equal(
        gk.mips_topk(QUERIES[0], table, 30, exclude=seen[0], allow=table.mask(by_row)).indices, want.indices[0]
    )


@pytest.mark.parametrize(
    ("error", "message", "rows"),
    [
        (TypeError, "rows must be a torch.Tensor or an array, got list", [1, 2]),
        (ValueError, "rows must be torch.int64 or torch.bool, got torch.int32", torch.ones(3, dtype=torch.int32)),
        (ValueError, r"rows must have 1 dimension, got \(1, 3\)", torch.ones(1, 3, dtype=torch.int64)),
        (ValueError, r"rows must be bool \(50,\), one entry a row, got \(3,\)", torch.ones(3, dtype=torch.bool)),
    ],
)
def test_errors(error: type[Exception], message: str, rows: Any) -> None:
    with pytest.raises(error, match=message):
        table_of(50).mask(rows)
