"""Interactions from arrays in an .npz file: what other data is easily brought into."""

import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from grank_kernels.recommender.data.interactions import Columns, Interactions

_NAMES = {
    "user": ("user", "session"),
    "item": ("item",),
    "timestamp": ("timestamp", "t_rel_days"),
    "rating": ("rating",),
}
_IDS = ("iuU", "integers or strings")
_KINDS = {"user": _IDS, "item": _IDS, "timestamp": ("iu", "integers"), "rating": ("iuf", "numbers")}


def read_arrays(path: str | Path) -> Interactions:
    """Columns that `numpy.savez` wrote; other arrays in the file are ignored.

    Args:
        path: an .npz file, or the folder that holds one, with (n,) arrays `user` or `session` and `item` (integers or
            strings), perhaps `timestamp` or `t_rel_days` (integers) and `rating` (finite numbers). Without times the
            order of the rows is the order of time.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a column that is missing or does not fit; the message names file and column.
    """
    path = Path(path)
    files = sorted(path.glob("*.npz")) if path.is_dir() else [path]
    if not files or not files[0].is_file():
        raise FileNotFoundError(f"{path}: expected an .npz file, or the folder that holds it")
    if len(files) > 1:
        raise ValueError(f"{path}: expected one .npz file, got {', '.join(file.name for file in files)}")
    file = files[0]
    try:
        with np.lib.npyio.NpzFile(file) as archive:  # type: ignore[arg-type]  # it opens paths, too
            columns = {column: _column(file, archive, column) for column in _NAMES}
    except (zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{file}: expected a whole .npz file, got a damaged or foreign one: {error}") from None
    given: Columns = {name: values for name, values in columns.items() if values is not None}
    shapes = {name: np.shape(values) for name, values in given.items()}
    if len(set(shapes.values())) != 1:
        raise ValueError(f"{file}: expected columns of one length, got {shapes}")
    return Interactions.take(given)


def _column(file: Path, archive: Any, column: str) -> npt.NDArray[Any] | None:
    name = next((name for name in _NAMES[column] if name in archive), None)
    if name is None:
        if column in ("user", "item"):
            wanted = " or ".join(_NAMES[column])
            raise ValueError(f"{file}: expected an array {wanted}, got {', '.join(archive) or 'none'}")
        return None
    kinds, takes = _KINDS[column]
    try:
        values: npt.NDArray[Any] = archive[name]
    except ValueError as error:
        raise ValueError(f"{file}, array {name}: expected {takes}, got {error}") from None
    if values.ndim != 1 or values.dtype.kind not in kinds or not len(values):
        got = f"{values.dtype} of shape {values.shape}"
        raise ValueError(f"{file}, array {name}: expected (n,) {takes}, n at least 1, got {got}")
    if column == "rating" and not np.isfinite(values).all():
        raise ValueError(f"{file}, array {name}: expected finite numbers, got {values[~np.isfinite(values)][0]}")
    return values
