"""Damaged and foreign files: an error that names the file."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from table_cases import assert_equal_tables, table_of

import grank_kernels as gk
from grank_kernels.table import file as table_file
from grank_kernels.table.versions import Columns

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file with every tensor of the format but the basis."""
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
    """Flips one bit of every byte of header, padding and data; the slow test flips every bit."""
    good, path = saved.read_bytes(), tmp_path / "damaged"
    for at in range(len(good)):
        for bit in bits:
            damaged = bytearray(good)
            damaged[at] ^= 1 << (at * 5 % 8 if bit is None else bit)
            with pytest.raises(ValueError, match=r"damaged (is|has)"):
                loads(path, damaged)
    assert len(loads(path, good)) == 9


def test_other_lengths_are_refused(saved: Path, tmp_path: Path) -> None:
    good, path = saved.read_bytes(), tmp_path / "damaged"
    for length in range(len(good)):
        with pytest.raises(ValueError, match=r"damaged is (empty|truncated)"):
            loads(path, good[:length])
    with pytest.raises(ValueError, match="damaged is malformed: it has"):
        loads(path, good + b"\0")


def edited(good: bytes, edit: Callable[[dict[str, Any]], None]) -> bytes:
    """The file with another header and the same data."""
    start = 8 + int.from_bytes(good[:8], "little")
    header = json.loads(good[8:start])
    edit(header)
    text = json.dumps(header).encode()
    text += b" " * (-(8 + len(text)) % 64)
    return len(text).to_bytes(8, "little") + text + good[start:]


EMPTY = {"__metadata__": {"format": "grank_kernels.ItemTable", "format_version": "1"}}
REFUSED: list[tuple[str, Callable[[dict[str, Any]], Any]]] = [
    ("has format_version '2'; this version of grank_kernels reads '1'",
     lambda h: h["__metadata__"].update(format_version="2")),
    ("has format_version None", lambda h: h["__metadata__"].pop("format_version")),
    ("is not a table: its header does not say", lambda h: h["__metadata__"].update(format="pt")),
    ("is not a table: its header does not say", lambda h: h.pop("__metadata__")),
    ("is not a table: its header does not say", lambda h: h.update(__metadata__=[])),
    ("tables have no tensor 'weight'", lambda h: h.update(weight=h.pop("ids"))),
    ("is malformed: rows must be .* got None", lambda h: h.pop("rows")),
    ("is malformed: it has no coarse_error", lambda h: h.pop("coarse_error")),
    ("is malformed: rows must be", lambda h: h["rows"].update(shape=[27])),
    ("is malformed: rows is", lambda h: h["rows"].update(shape=[9, -3])),
    ("is malformed: rows is", lambda h: h["rows"].update(shape=[9.0, 3])),
    ("is malformed: rows is", lambda h: h["rows"].update(shape=[True, 27])),
    ("is malformed: rows is", lambda h: h["rows"].update(shape=[1 << 62, 0])),
    ("is malformed: rows is", lambda h: h["rows"].update(shape=None)),
    ("is malformed: rows is", lambda h: h["rows"].update(dtype="F8_E4M3")),
    ("is malformed: rows is", lambda h: h["rows"].update(dtype=["F32"])),
    ("is malformed: rows is", lambda h: h["rows"].update(data_offsets=[0])),
    ("is malformed: rows is", lambda h: h.update(rows=7)),
    ("is malformed: rows of width 0 must be at most 16777216, got 1099511627775",
     lambda h: (h.clear(), h.update(EMPTY, rows={"dtype": "F32", "shape": [2**40 - 1, 0], "data_offsets": [0, 0]}))),
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
    with pytest.raises(ValueError, match="other is not a table: its header does not say that its format"):
        gk.ItemTable.load(path)
    torch.save(torch.ones(4, 3), path)
    with pytest.raises(ValueError, match="other is not a table: its header must have at most"):
        gk.ItemTable.load(path)
    for text in (b"[" * 60_000, b"{'a': 1}", b"\xff\xfe", b"1" * 5000, b"[]", b'{"__metadata__": 3}'):
        with pytest.raises(ValueError, match="other is not a table"):
            loads(path, len(text).to_bytes(8, "little") + text)
    with pytest.raises(FileNotFoundError, match="nothing here"):
        gk.ItemTable.load(tmp_path / "nothing here")
    with pytest.raises(IsADirectoryError):
        gk.ItemTable.load(tmp_path)
    with pytest.raises(IsADirectoryError, match="path must be a file, got a folder"):
        table_of(2, 2, "float32").save(tmp_path)
    with pytest.raises(FileNotFoundError):
        table_of(2, 2, "float32").save(tmp_path / "no folder" / "table")


@pytest.mark.parametrize(
    ("ids", "message"), [([5, 5], "ids must be unique, got 5"), ([5, -1], "ids must not be negative")]
)
def test_invalid_ids_are_refused(ids: list[int], message: str, tmp_path: Path) -> None:
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
    """Any value in place of one value of the header: ValueError, or the same table if the meaning is the same."""

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


@pytest.mark.parametrize("mmap", [False, True])
@pytest.mark.parametrize(("name", "value"), [("coarse_error", torch.nan), ("coarse_error", -1.0),
                                             ("coarse_scale", torch.nan), ("coarse_scale", torch.inf)])  # fmt: skip
def test_bounds_that_would_hide_rows(name: str, value: float, mmap: bool, tmp_path: Path) -> None:
    """Too small error bounds with valid checksums are refused; `verify=False` does not check them."""
    columns = table_of(9, 3, "float32", torch.int8).current.columns
    getattr(columns, name)[4] = value
    table_file.write(tmp_path / "foreign", columns, [columns])
    for verify in (False, True):
        with pytest.raises(ValueError, match=f"foreign is malformed: {name} must be from 0 to"):
            gk.ItemTable.load(tmp_path / "foreign", mmap=mmap, verify=verify)


@pytest.mark.slow
@settings(max_examples=3000, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_damage_to_an_unverified_file(data: st.DataObject, saved: Path, tmp_path: Path) -> None:
    """Changed, removed and inserted bytes with `verify=False`: an error, or a table that can be searched."""
    content = bytearray(saved.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        at, count = data.draw(st.integers(0, len(content))), data.draw(st.integers(0, 9))
        content[at : at + count] = data.draw(
            st.binary(min_size=count, max_size=data.draw(st.sampled_from([count, 12])))
        )
    path = tmp_path / "fuzzed"
    path.write_bytes(content)
    for mmap in (False, True):
        try:
            table = gk.ItemTable.load(path, mmap=mmap, verify=False)
            top = gk.mips_topk(torch.ones(2, table.dim), table, 20)
        except ValueError as error:
            assert "fuzzed" in str(error)  # noqa: PT017  some damage is not seen
        else:
            assert set(top.indices[0].tolist()) <= {-1, *table.ids.tolist()}


def test_damage_that_verify_false_accepts(saved: Path, tmp_path: Path) -> None:
    """`verify=False` skips the checksums, for files too large to be read at every start."""
    path = tmp_path / "damaged"
    data = bytearray(saved.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    for mmap in (False, True):
        assert len(gk.ItemTable.load(path, mmap=mmap, verify=False)) == 9
