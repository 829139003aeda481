"""A user's own file: formats that are understood, rows that are dropped and values that are refused."""

import gzip
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow
import pytest
from pyarrow import parquet

from grank_kernels.recommender.data.interactions import Interactions
from grank_kernels.recommender.data.own_file import ColumnNames, read_titles, understand

ROWS = [("u2", "b", 1_700_000_060, 5), ("u1", "a", 1_700_000_000, 3), ("u1", "c", 1_700_000_030, 1)]
NAMES = ("user", "item", "timestamp", "rating")


def lines(rows: list[tuple[object, ...]], header: tuple[str, ...] = NAMES, separator: str = ",") -> str:
    return "".join(separator.join(map(str, row)) + "\n" for row in ([header] if header else []) + rows)


def content(data: Interactions) -> list[tuple[object, ...]]:
    users, items = data.user_ids[data.users.numpy()], data.item_ids[data.items.numpy()]
    return list(zip(users.tolist(), items.tolist(), data.ratings.tolist(), strict=True))


NEWLINE = "\n"
WANTED = [("u1", "a", 3.0), ("u1", "c", 1.0), ("u2", "b", 5.0)]


@pytest.mark.parametrize(
    "text",
    [
        lines(ROWS),
        "\ufeff" + lines(ROWS),
        lines(ROWS).replace("\n", "\r\n"),
        lines(ROWS, separator="\t"),
        lines(ROWS, separator=";"),
        lines(ROWS, separator="::"),
        lines(ROWS, ()),
        lines(ROWS, (), "::"),
        "\n\n" + lines(ROWS) + "\n",
        lines(ROWS, ("UserID", "movie_id", "ts", "stars")),
        lines([(r, t, f'"{i}"', u) for u, i, t, r in ROWS], ("Score", "Date", "ASIN", "session_id")),
        lines([(u, i, t * 1000, r) for u, i, t, r in ROWS]),
        lines([(u, i, f"{t}.25", r) for u, i, t, r in ROWS]),
        lines([(u, i, np.datetime64(t, "s"), r) for u, i, t, r in ROWS]),
    ],
)
def test_formats_of_text(text: str, tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_bytes(text.encode())
    assert content(understand(tmp_path / "x.csv").interactions) == WANTED


def _gzip(path: Path) -> None:
    path.write_bytes(gzip.compress(lines(ROWS).encode()))


def _zstd(path: Path) -> None:
    path.write_bytes(pyarrow.compress(lines(ROWS).encode(), "zstd", asbytes=True))


def _zip(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("inner.csv", lines(ROWS))


def _parquet(path: Path) -> None:
    columns = dict(zip(NAMES, map(list, zip(*ROWS, strict=True)), strict=True))
    columns["timestamp"] = np.array(columns["timestamp"], "datetime64[s]")  # type: ignore[assignment]
    parquet.write_table(pyarrow.table(columns), path)


def _two_files(path: Path) -> None:
    path.mkdir()
    (path / "1.csv").write_text(lines(ROWS[:1]))
    (path / "2.tsv").write_text(lines([(t, i, r, u) for u, i, t, r in ROWS[1:]], ("ts", "item", "stars", "uid"), "\t"))


@pytest.mark.parametrize("write", [_gzip, _zstd, _zip, _parquet, _two_files])
def test_containers(write: Callable[[Path], None], tmp_path: Path) -> None:
    write(tmp_path / "x")
    assert content(understand(tmp_path / "x").interactions) == WANTED


def test_a_pattern_names_several_files(tmp_path: Path) -> None:
    _two_files(tmp_path / "logs")
    assert content(understand(tmp_path / "logs" / "*.*").interactions) == WANTED
    with pytest.raises(FileNotFoundError, match="a pattern such as"):
        understand(tmp_path / "logs" / "*.parquet")


def test_zones_of_iso_8601_are_heard(tmp_path: Path) -> None:
    times = ["2024-01-01T00:30:00+01:00", "2024-01-01T00:00:00Z", "2024-01-01 00:15:00.5", "2023-12-31"]
    (tmp_path / "x.csv").write_text(lines([("u", f"i{k}", t) for k, t in enumerate(times)], NAMES[:3]))
    found = understand(tmp_path / "x.csv")
    assert [item for _, item, _ in content(found.interactions)] == ["i3", "i0", "i1", "i2"]
    assert found.span == ("2023-12-31T00:00:00Z", "2024-01-01T00:15:00Z")


@pytest.mark.parametrize(
    ("factor", "unit"), [(1, "seconds"), (10**3, "milliseconds"), (10**6, "microseconds"), (10**9, "nanoseconds")]
)
def test_units_of_integers(factor: int, unit: str, tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text(lines([(u, i, t * factor, r) for u, i, t, r in ROWS]))
    found = understand(tmp_path / "x.csv")
    assert found.time_unit == unit
    assert found.span == ("2023-11-14T22:13:20Z", "2023-11-14T22:14:20Z")


def test_ids_are_integers_only_if_all_are_written_as_such(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text(lines([(-5, 2**64 - 1), (7, 10), (7, 9)], NAMES[:2]))
    data = understand(tmp_path / "x.csv").interactions
    assert content(data) == [(-5, 2**64 - 1, 1.0), (7, 10, 1.0), (7, 9, 1.0)]
    (tmp_path / "y.csv").write_text(lines([("007", 7), ("7", 10), (8, "9a")], NAMES[:2]))
    assert content(understand(tmp_path / "y.csv").interactions) == [("007", "7", 1), ("7", "10", 1), ("8", "9a", 1)]


def test_without_time_and_rating_it_says_so(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text(lines([("u", "b"), ("u", "a"), ("u", "b")], NAMES[:2]))
    found = understand(tmp_path / "x.csv")
    assert [item for _, item, _ in content(found.interactions)] == ["b", "a", "b"]  # repeated, with no time to tell
    said = "\n".join(found.lines())
    assert "no time column: rows are in the order of time" in said
    assert "no rating column: every row is positive feedback" in said


def test_a_rating_column_of_words_is_implicit_feedback(tmp_path: Path) -> None:
    rows = [("u", "a", 1, "view"), ("u", "b", 2, "view"), ("u", "c", 3, "buy")]
    (tmp_path / "x.csv").write_text(lines(rows, ("user", "item", "time", "event")))
    found = understand(tmp_path / "x.csv")
    assert found.interactions.implicit
    assert found.words == {"view": 2, "buy": 1}
    assert "the rating column has words (view 2, buy 1)" in found.lines()[3]


def test_rows_without_a_value_are_dropped_and_counted(tmp_path: Path) -> None:
    broken = [
        "",
        "u1,,1700000000,3",
        ",a,1700000000,nan",
        "u1,d",
        "u1,d,,4",
        "u1,d,1700000000,NULL",
        *["u1,a,1700000000,3"] * 2,
    ]
    text = lines(ROWS) + "\n".join(broken) + '\n"u ""q"" x","B, quoted",1700000100,4\n'
    (tmp_path / "x.csv").write_text(text)
    found = understand(tmp_path / "x.csv")
    assert content(found.interactions) == [('u "q" x', "B, quoted", 4.0), *WANTED]
    assert found.rows == 12
    assert found.dropped == {
        "are blank": 1,
        "have no item": 1,
        "have no user": 1,
        "have another number of fields than 4": 1,
        "have no time": 1,
        "have no rating": 1,
        "repeat another line": 2,
    }
    assert "1 of 12 lines have no item" in found.lines()[4]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("u1,0x10,1700000000,3", "item must be decimal integers or text, not hexadecimal numbers, got '0x10'"),
        ("u1,1.5,1700000000,3", "item must be integers or text, not decimal numbers, got '1.5'"),
        ("u\x1f1,a,1700000000,3", r"user must be without control characters, got 'u\\x1f1'"),
        ('u1,"a\n,b",1700000000,3', "item must be without control characters"),
        ("NaN,a,1700000000,3", "user must be integers or text, not NaN, got 'NaN'"),
        (f"{'u' * 300},a,1700000000,3", "user must be at most 256 characters long"),
        ("u1,a,1700000000,nan", "rating must be a finite number, got 'nan'"),
        ("u1,a,1700000000,1e39", "rating must be a finite number, got '1e39'"),
        ("u1,a,1700000000,good", "rating must be a finite number, got 'good'"),
        ("u1,a,yesterday,3", "timestamp must be integers, as most others, got 'yesterday'"),
        ("u1,a,0x10,3", "timestamp must be integers, as most others, got '0x10'"),
        ("u1,a,99999999999999999999,3", "timestamp must be integers"),
    ],
)
def test_values_that_cannot_be_read_are_refused_by_line(row: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text(lines(ROWS) + f"\n{row}\nu9,a,1700000000,3\n")
    with pytest.raises(ValueError, match=rf"x\.csv, line {5 + row.count(NEWLINE) + 1}: {message}"):
        understand(tmp_path / "x.csv")


@pytest.mark.parametrize(
    ("item", "message"),
    [
        (str(2**64), f"line 3: item must be integers from 0 to {2**64 - 1}, got '{2**64}'"),
        ("-1", "line 3: item must be integers of 0 or more, got '-1'"),
    ],
)
def test_integers_that_are_no_items_are_refused_by_line(item: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text(lines([(1, 2), (1, item)], NAMES[:2]))
    with pytest.raises(ValueError, match=message):
        understand(tmp_path / "x.csv")


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"", "an empty file"),
        (b"user\nu1\n", "expected fields separated by"),
        (b"user,item\n", "expected rows, got none"),
        (b"user,item\nu1,\n", "expected rows, got 1 have no item"),
        (b"user,item\nu1,caf\xe9\n", "line 2: expected UTF-8"),
        ("user,item\nu1,a\n".encode("utf-16"), "got UTF-16"),
        (b"user,item\nu1,a\0b\n", "got a binary file"),
        (b"\x1f\x8bnonsense", "expected a whole gzip file"),
        (b"PK\x03\x04nonsense", "expected a whole zip file"),
        (b"PAR1nonsense", "expected a whole Parquet file"),
        (b"1::2::3\n1::a\x1fb::3\n1::2::3\n", "line 2: fields must not hold the control character 0x1f"),
        (b"who,what\nu1,a\n", "got columns who, what; name it by --user-column, --item-column"),
    ],
)
def test_files_that_cannot_be_read_are_refused(raw: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_bytes(raw)
    with pytest.raises(ValueError, match=message):
        understand(tmp_path / "x.csv")


def test_columns_by_name(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text(lines(ROWS, ("who", "what", "when", "how")))
    assert content(understand(tmp_path / "x.csv", ColumnNames("who", "what", "when", "how")).interactions) == WANTED
    (tmp_path / "y.csv").write_text(lines([(i, u) for u, i, _, _ in ROWS], ()))
    assert understand(tmp_path / "y.csv", ColumnNames(user="2")).interactions.user_ids.tolist() == ["u1", "u2"]
    with pytest.raises(ValueError, match="--item-column must be one of who, what, when, how, got 'thing'"):
        understand(tmp_path / "x.csv", ColumnNames("who", "thing"))


def test_titles(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text('movieId,title,genres\n1,"Heat, 1995",x\n2,Café,y\n9,No,z\n')
    assert read_titles(tmp_path / "t.csv", np.array([1, 2, 3])) == {1: "Heat, 1995", 2: "Café"}
    assert read_titles(tmp_path / "t.csv", np.array(["1", "x"])) == {"1": "Heat, 1995"}
    with pytest.raises(ValueError, match="expected titles of items such as 'x', got such as '1' only"):
        read_titles(tmp_path / "t.csv", np.array(["x"]))


def test_nan_ratings_of_parquet_are_refused(tmp_path: Path) -> None:
    table = pyarrow.table({"user": [1, 1, 2], "item": [1, 2, 3], "rating": [1.0, None, float("nan")]})
    parquet.write_table(table.slice(0, 2), tmp_path / "x")
    assert understand(tmp_path / "x").dropped == {"have no rating": 1}
    parquet.write_table(table, tmp_path / "y")
    with pytest.raises(ValueError, match="a finite number, got 'nan'"):
        understand(tmp_path / "y")
