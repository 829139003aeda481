"""Values of a user's own file: ids, times and ratings from text, each judged by a stated rule."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from grank_kernels.recommender.data.columns import Numbered

MISSING = ("", "NULL", "null", "\\N")
"""Fields without a value: their rows are dropped and counted. Any other value that cannot be read is refused."""

_UINT64_MAX, _INT64_MAX, _ID_LENGTH = 2**64 - 1, 2**63 - 1, 256
_INTEGER = "^(0|-?[1-9][0-9]*)$"  # written as Python writes it: 007 stays text
_REFUSED = {  # pattern of an id -> what is wrong with it
    r"[\x00-\x1f\x7f]": "without control characters",
    r"^[+-]?0[xX][0-9a-fA-F]{1,16}$": "decimal integers or text, not hexadecimal numbers",
    r"^[+-]?([0-9]+\.[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?$": "integers or text, not decimal numbers",
    r"(?i)^[+-]?nan$": "integers or text, not NaN",
    rf"^[^\x00]{{{_ID_LENGTH + 1},}}": f"at most {_ID_LENGTH} characters long",
}


class BadValueError(ValueError):
    """A value that is refused.

    Attributes:
        text: the value as the file has it.
        must: what its column must hold.
    """

    def __init__(self, text: str, must: str) -> None:
        super().__init__(f"must be {must}, got {text!r:.200}")
        self.text, self.must = text, must


def ids_of(parts: Sequence[Any], *, negative: bool) -> Numbered:
    """Numbered ids of dictionary-encoded text: integers if all are, as Python writes them, otherwise strings.

    Args:
        parts: pyarrow DictionaryArrays of strings.
        negative: whether negative integers are ids.

    Raises:
        BadValueError: an id that is refused.
    """
    import pyarrow as pa
    import torch
    from pyarrow import compute as pc

    column = pa.chunked_array(parts).unify_dictionaries()
    codes = np.concatenate([chunk.indices.to_numpy() for chunk in column.chunks])
    texts = pc.utf8_trim_whitespace(column.chunk(0).dictionary)
    used = np.bincount(codes, minlength=len(texts)) > 0
    texts = texts.filter(pa.array(used))
    for pattern, must in _REFUSED.items():
        wrong = texts.filter(pc.match_substring_regex(texts, pattern))
        if len(wrong):
            raise BadValueError(wrong[0].as_py(), must)
    if pc.all(pc.match_substring_regex(texts, _INTEGER)).as_py():
        ids = _integers(texts.to_numpy(zero_copy_only=False), negative)
    else:
        ids = texts.to_numpy(zero_copy_only=False).astype(np.str_)
    distinct, places = np.unique(ids, return_inverse=True)
    place = np.zeros(len(used), np.int32)
    place[used] = places
    return Numbered(distinct, torch.from_numpy(place[codes]))


def _integers(texts: npt.NDArray[Any], negative: bool) -> npt.NDArray[Any]:
    lengths = np.fromiter(map(len, texts), np.int64, len(texts))
    wide = {text: int(text) for text in texts[lengths >= 19].tolist()}
    low = -(2**63) if negative else 0
    least = texts[np.array([text[0] == "-" for text in texts.tolist()], bool)]
    high = _INT64_MAX if len(least) else _UINT64_MAX
    for text, number in wide.items():
        if number > high or number < -(2**63):
            raise BadValueError(text, f"integers from {max(low, -(2**63)) if len(least) else 0} to {high}")
    if not negative and len(least):
        raise BadValueError(least[0], "integers of 0 or more")
    big = any(number > _INT64_MAX for number in wide.values())
    return texts.astype(np.str_).astype(np.uint64 if big else np.int64)


def kind_of(column: Any, kinds: Mapping[str, Callable[[Any], Any]]) -> str | None:
    """The kind that most of the first values of a column of text are of; None if the most are of none."""
    from pyarrow import ArrowInvalid

    values = [x for x in column.slice(0, 200).to_pylist() if x.strip() not in MISSING]
    counts = dict.fromkeys(kinds, 0)
    for x in values:
        for kind, read in kinds.items():
            try:
                read(_text([x.strip()]))
            except (ArrowInvalid, BadValueError):
                continue
            counts[kind] += 1
    best = max(counts, key=lambda kind: counts[kind])
    return best if values and 2 * counts[best] >= len(values) else None


def parsed(column: Any, read: Callable[[Any], npt.NDArray[Any]], must: str) -> tuple[npt.NDArray[Any], Any]:
    """Numbers (n,) of a column of text, and a bool mask (n,) of the missing ones or None if there are none.

    Raises:
        BadValueError: a value that is neither missing nor of its kind.
    """
    import pyarrow as pa
    from pyarrow import compute as pc

    try:
        return read(column), None
    except (pa.ArrowInvalid, BadValueError):
        pass  # the values are looked at one by one
    texts = pc.utf8_trim_whitespace(column)
    missing = pc.is_in(texts, value_set=_text(MISSING)).to_numpy(zero_copy_only=False)
    there = texts.filter(pa.array(~missing))
    try:
        found = read(there)
    except (pa.ArrowInvalid, BadValueError):
        raise BadValueError(_first_bad(there, read), must) from None
    values = np.zeros(len(column), found.dtype)
    values[~missing] = found
    return values, missing if missing.any() else None


def _first_bad(column: Any, read: Callable[[Any], Any]) -> str:
    """The first value that `read` refuses, by bisection: some are refused as a whole column only."""
    from pyarrow import ArrowInvalid

    good, bad = 0, len(column)
    while bad - good > 1:
        middle = (good + bad) // 2
        try:
            read(column.slice(0, middle))
        except (ArrowInvalid, BadValueError):
            bad = middle
        else:
            good = middle
    return str(column[bad - 1].as_py())


def integers(column: Any) -> npt.NDArray[np.int64]:
    """Decimal integers; pyarrow alone would read 0x10 as 16."""
    from pyarrow import compute as pc

    if not pc.all(pc.ascii_is_decimal(pc.utf8_ltrim(column, "-")), min_count=0).as_py():
        raise BadValueError("", "integers")
    return _numpy(column.cast("int64"))


def seconds(column: Any) -> npt.NDArray[np.int64]:
    """Decimal numbers of seconds, as microseconds."""
    values = numbers(column)
    if len(values) and np.abs(values).max() > 1e12:
        raise BadValueError("", "seconds")
    return np.round(values * 1e6).astype(np.int64)


def instants(column: Any) -> npt.NDArray[np.int64]:
    """ISO 8601 dates and times, as microseconds; without a zone in UTC."""
    import pyarrow as pa
    from pyarrow import compute as pc

    for unit in ("us", "ns"):
        for zone in ("UTC", None):
            try:
                found = column.cast(pa.timestamp(unit, zone))
            except pa.ArrowInvalid:
                continue
            return _numpy(found.cast("int64")) // (1 if unit == "us" else 1000)
    zoned = pc.match_substring_regex(column, r"(Z|[+-]\d\d:?(\d\d)?)$").to_numpy(zero_copy_only=False)
    zoned &= pc.match_substring_regex(column, ":").to_numpy(zero_copy_only=False)  # 2024-01-01 ends like a zone
    if zoned.all() or not zoned.any():
        raise BadValueError("", "ISO 8601")
    values = np.empty(len(column), np.int64)
    for mask in (zoned, ~zoned):
        values[mask] = instants(column.filter(pa.array(mask)))
    return values


def numbers(column: Any) -> npt.NDArray[np.float64]:
    """Finite numbers that float32 holds."""
    values = _numpy(column.cast("float64"))
    if not np.all(np.abs(values) < 3.4e38):  # False for NaN
        raise BadValueError("", "finite numbers")
    return values


def _numpy(column: Any) -> npt.NDArray[Any]:
    found: npt.NDArray[Any] = column.to_numpy(zero_copy_only=False)
    return found


def _text(values: Sequence[str]) -> Any:
    import pyarrow as pa

    return pa.array(values, pa.string())
