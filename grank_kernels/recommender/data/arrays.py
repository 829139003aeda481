"""Interactions from arrays in an .npz file, as `numpy.savez` writes them."""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from grank_kernels.recommender.data.columns import Columns, checked_ids, checked_ratings, checked_timestamps
from grank_kernels.recommender.data.interactions import Interactions

_NAMES = {
    "user": ("user", "session"),
    "item": ("item",),
    "timestamp": ("timestamp", "t_rel_days"),
    "rating": ("rating",),
}


def read_arrays(path: str | Path) -> Interactions:
    """The columns of an .npz file; other arrays in the file are ignored, and pickled ones refused.

    Args:
        path: an .npz file, or a folder with one. Arrays, all (n,): `user` or `session` (integers or strings), `item`
            (integers of 0 or more, or strings), and optionally `timestamp` or `t_rel_days` (integers) and `rating`
            (finite numbers). Without timestamps the rows are in the order of time.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: an array is missing or does not fit; the message names file, array and row.
    """
    path = Path(path)
    files = sorted(path.glob("*.npz")) if path.is_dir() else [path]
    if not files or not files[0].is_file():
        raise FileNotFoundError(f"{path}: expected an .npz file, or the folder that holds it")
    if len(files) > 1:
        raise ValueError(f"{path}: expected one .npz file, got {', '.join(file.name for file in files)}")
    file = files[0]
    columns = _columns(file)
    lengths = {name: len(column) for name, column in columns.items()}
    if len(set(lengths.values())) != 1 or not lengths["user"]:
        raise ValueError(f"{file}: arrays must have one length of 1 or more, got {lengths}")
    given: Columns = {**columns}
    return Interactions.take(given)


def _columns(file: Path) -> dict[str, npt.NDArray[Any]]:
    present, arrays = _load(file)
    columns = {}
    for column, names in _NAMES.items():
        name = next((name for name in names if name in arrays), None)
        if name is not None:
            columns[column] = _checked(column, f"{file}: array {name}", arrays[name])
        elif column in ("user", "item"):
            raise ValueError(f"{file}: expected an array {' or '.join(names)}, got {', '.join(present) or 'none'}")
    return columns


def _load(file: Path) -> tuple[list[str], dict[str, npt.NDArray[Any]]]:
    """The names of all arrays in the file, and the arrays that are columns."""
    wanted = {name for names in _NAMES.values() for name in names}
    with file.open("rb") as opened:
        try:
            with np.lib.npyio.NpzFile(opened) as archive:  # pickled arrays are refused
                return archive.files, {name: np.asarray(archive[name]) for name in archive.files if name in wanted}
        except Exception as error:  # zipfile and NumPy raise a dozen types for damaged bytes
            raise ValueError(f"{file}: expected a whole .npz file of plain arrays, got {error!r}") from None


def _checked(column: str, array: str, values: npt.NDArray[Any]) -> npt.NDArray[Any]:
    if column == "timestamp":
        return checked_timestamps(array, values)
    if column == "rating":
        return checked_ratings(array, values)
    return checked_ids(array, values, negative=column == "user")
