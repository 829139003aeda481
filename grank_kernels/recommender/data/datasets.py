"""The data sets by name: what reads them, and where they come from."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from grank_kernels.recommender.data.arrays import read_arrays
from grank_kernels.recommender.data.interactions import Interactions
from grank_kernels.recommender.data.movielens import INSTALL, read_movielens_1m, read_movielens_20m, read_movielens_100k
from grank_kernels.recommender.data.shops import read_amazon, read_user_behavior


class Dataset(NamedTuple):
    """A data set.

    Attributes:
        read: path -> `Interactions`.
        source: one line: where it is to be had.
    """

    read: Callable[[str | Path], Interactions]
    source: str


DATASETS = {
    "ml-100k": Dataset(read_movielens_100k, f"https://grouplens.org/datasets/movielens/100k, or `{INSTALL}`"),
    "ml-1m": Dataset(read_movielens_1m, "https://grouplens.org/datasets/movielens/1m"),
    "ml-20m": Dataset(read_movielens_20m, "https://grouplens.org/datasets/movielens/20m"),
    "user-behavior": Dataset(read_user_behavior, "https://tianchi.aliyun.com/dataset/649"),
    "amazon": Dataset(read_amazon, "https://jmcauley.ucsd.edu/data/amazon/links.html, ratings only"),
    "arrays": Dataset(read_arrays, "your own: numpy.savez(path, user=..., item=..., timestamp=..., rating=...)"),
}


def read(name: str, path: str | Path | None = None) -> Interactions:
    """Read a data set.

    Args:
        name: one of `DATASETS`.
        path: its file or the folder that holds it; only ml-100k does without, from a package.

    Raises:
        ValueError: there is no data set of this name, or a file does not hold what it should.
        FileNotFoundError: the files are not there; the message says where they are to be had.
    """
    if name not in DATASETS:
        raise ValueError(f"name is {name!r}; it takes one of {', '.join(map(repr, DATASETS))}")
    if path is None and name == "ml-100k":
        return read_movielens_100k()
    dataset = DATASETS[name]
    if path is None:
        raise ValueError(f"path must name the file of {name}, or its folder; it is to be had at {dataset.source}")
    try:
        return dataset.read(path)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{error}; it is to be had at {dataset.source}") from None
