"""Files of tables: saving and loading."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from oracle import KINDS, assert_same
from safetensors import safe_open
from table_cases import KINDS_OF_TABLES, assert_equal_tables, table_of

import grank_kernels as gk
from grank_kernels.table import file as table_file
from grank_kernels.table import versions as table_versions

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize(("n", "d"), [(300, 16), (77, 5), (1, 1), (0, 3), (4, 0)])
@pytest.mark.parametrize("mmap", [False, True])
@pytest.mark.parametrize("with_ids", [False, True])
@pytest.mark.parametrize(("kind", "coarse"), KINDS_OF_TABLES)
def test_round_trip(
    kind: str, coarse: torch.dtype | None, with_ids: bool, mmap: bool, n: int, d: int, tmp_path: Path
) -> None:
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
def test_an_updated_table_is_saved_without_removed_rows(kind: str, coarse: torch.dtype | None, tmp_path: Path) -> None:
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


def test_rows_written_in_parts(tmp_path: Path) -> None:
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
        ("parts must hold at least one tensor .* got none", [], 0),
        ("num_rows must be the number of rows in all parts, got 9, and fewer", [torch.ones(4, 3), torch.ones(4, 3)], 9),
        ("num_rows must be the number of rows in all parts, got 7, and more", [torch.ones(4, 3), torch.ones(4, 3)], 7),
        (r"parts must have the width of the first one, 3, got rows \(4, 2\)", [torch.ones(4, 3), torch.ones(4, 2)], 8),
        ("rows must be .*, got torch.float64", [torch.ones(4, 3), torch.ones(4, 3).double()], 8),
    ],
)
def test_errors_of_parts(message: str, parts: list[torch.Tensor], num_rows: int, tmp_path: Path) -> None:
    old = table_of(5, 3, "float32")
    old.save(tmp_path / "table")
    with pytest.raises(ValueError, match=message):
        gk.ItemTable.write(tmp_path / "table", parts, num_rows=num_rows)
    assert_equal_tables(gk.ItemTable.load(tmp_path / "table"), old)
    assert os.listdir(tmp_path) == ["table"]


@pytest.mark.parametrize(
    ("error", "message", "num_rows"),
    [
        (ValueError, "num_rows must be 0 or more, got -1", -1),
        (TypeError, "num_rows must be an int, got float 10.0", 10.0),
        (TypeError, "num_rows must be an int, got bool", True),
        (ValueError, r"num_rows must be below 2\^40, got 4611686018427387904", 1 << 62),
    ],
)
def test_impossible_numbers_of_rows(error: type[Exception], message: str, num_rows: Any, tmp_path: Path) -> None:
    with pytest.raises(error, match=message):
        gk.ItemTable.write(tmp_path / "table", [torch.ones(4, 3)], num_rows=num_rows)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("error", "message", "part"),
    [
        (ValueError, r"part must be \(r, n\) with 0 <= r < n, got \(2, 2\)", (2, 2)),
        (ValueError, "part's r must be 0 or more, got -1", (-1, 2)),
        (ValueError, "part's n must be 1 or more, got 0", (0, 0)),
        (TypeError, "part's n must be an int, got float 2.5", (0, 2.5)),
        (TypeError, r"part must be a pair of ints \(r, n\), got \(0, 1, 2\)", (0, 1, 2)),
        (TypeError, r"part must be a pair of ints \(r, n\), got '01'", "01"),
    ],
)
def test_parts_that_no_table_has(error: type[Exception], message: str, part: Any, tmp_path: Path) -> None:
    table_of(5, 3, "float32").save(tmp_path / "table")
    with pytest.raises(error, match=message):
        gk.ItemTable.load(tmp_path / "table", part=part)


def test_paths_of_bytes_are_paths_and_file_descriptors_are_not(tmp_path: Path) -> None:
    table, path = table_of(5, 3, "float32"), os.fsencode(tmp_path / "table")
    table.save(path)  # type: ignore[arg-type]  # os.PathLike[str] in the signature: str is the usual one
    assert_equal_tables(gk.ItemTable.load(path), table)  # type: ignore[arg-type]
    with open(path, "rb") as file, pytest.raises(TypeError, match="expected str, bytes or os"):
        gk.ItemTable.load(file.fileno())  # type: ignore[arg-type]
