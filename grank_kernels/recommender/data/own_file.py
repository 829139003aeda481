"""Interactions from a user's own file: understood by itself, judged by stated rules, counted aloud.

| rows | what happens |
|---|---|
| blank lines; another number of fields; no user, item, time or rating (empty or NULL) | dropped, counted by reason |
| user, item, time and rating all equal to those of another row | one is kept, the others dropped and counted |
| a value that is there and cannot be read: see `own_values` | the file is refused, by line |
| everything else, users with one row too | kept |
"""

import datetime
import io
import re
import statistics
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from grank_kernels.recommender.data import own_values as values
from grank_kernels.recommender.data.columns import Columns
from grank_kernels.recommender.data.interactions import Interactions
from grank_kernels.recommender.data.own_format import NAMES, Format, files_of, formatted, open_text
from grank_kernels.recommender.data.own_values import MISSING, BadValueError

_BLOCK = 1 << 24  # bytes of text parsed at a time
_ROLES = ("user", "item", "time", "rating")
_TIMES = {"integers": values.integers, "decimal seconds": values.seconds, "ISO 8601": values.instants}
_UNITS = ((1e8, 0, "order only"), (1e11, 1, "seconds"), (1e14, 10**3, "milliseconds"), (1e17, 10**6, "microseconds"))


class ColumnNames(NamedTuple):
    """Names of the columns of a file; None for the usual names, see `own_format.NAMES`."""

    user: str | None = None
    item: str | None = None
    time: str | None = None
    rating: str | None = None


@dataclass
class Understood:
    """What a file was understood as.

    Attributes:
        interactions: the rows that were kept.
        formats: format of each file.
        rows: number of rows read.
        dropped: reason -> number of rows that were dropped.
        time_unit: "seconds", "ISO 8601", ...; None without a time column.
        words: value -> number of rows, of a rating column of words, which are not used.
        sample: role -> text of the first row that was kept.
    """

    interactions: Interactions
    formats: list[Format]
    rows: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    time_unit: str | None = None
    words: Counter[str] = field(default_factory=Counter)
    sample: dict[str, str] = field(default_factory=dict)

    @property
    def span(self) -> tuple[str | int, str | int] | None:
        """First and last time, ISO 8601 in UTC, or plain integers where they count something else."""
        times = self.interactions.timestamps
        if self.time_unit is None or not len(times):
            return None
        low, high = (int(x) for x in times.aminmax())
        per_second = dict((name, scale) for _, scale, name in _UNITS).get(self.time_unit, 10**6)
        if self.time_unit == "nanoseconds":
            per_second = 10**9
        return (_instant(low, per_second), _instant(high, per_second)) if per_second else (low, high)

    def to_dict(self) -> dict[str, Any]:
        """All facts, as JSON takes them."""
        data, span = self.interactions, self.span
        first = self.formats[0]
        lengths = data.offsets.diff()
        return {
            "files": [str(each.path) for each in self.formats],
            "format": first.words,
            "columns": {role: first.names[place] for role, place in first.roles.items()},
            "rows": self.rows,
            "events": len(data),
            "users": data.num_users,
            "items": data.num_items,
            "user_ids": "integers" if data.user_ids.dtype.kind in "iu" else "strings",
            "item_ids": "integers" if data.item_ids.dtype.kind in "iu" else "strings",
            "dropped": dict(self.dropped),
            "users_with_one_event": int((lengths == 1).sum()),
            "first": None if span is None else span[0],
            "last": None if span is None else span[1],
            "time_unit": self.time_unit,
            "feedback": "implicit" if data.implicit else "ratings",
            "rating_words": dict(self.words.most_common(20)),
            "sample": self.sample,
        }

    def lines(self) -> list[str]:
        """What was understood, in five lines."""
        facts, data = self.to_dict(), self.interactions
        files = facts["files"][0] if len(self.formats) == 1 else f"{facts['files'][0]} and {len(self.formats) - 1} more"
        columns = ", ".join(f"{role} = {name}" for role, name in facts["columns"].items())
        drops = "; ".join(f"{n:,} of {self.rows:,} lines {why}" for why, n in self.dropped.items())
        lengths = data.offsets.diff().tolist()
        if self.time_unit is None:
            times = "no time column: rows are in the order of time"
        else:
            times = f"{facts['first']} to {facts['last']} ({self.time_unit})"
        if self.words:
            shown = ", ".join(f"{word} {count:,}" for word, count in self.words.most_common(4))
            feedback = f"the rating column has words ({shown}): every row is positive feedback"
        elif data.implicit:
            feedback = "no rating column: every row is positive feedback"
        else:
            low, high = (float(x) for x in data.ratings.aminmax())
            feedback = f"ratings from {low:g} to {high:g}"
        return [
            f"{files}: {facts['format']}; {columns}; e.g. {', '.join(map(repr, self.sample.values()))}",
            f"{len(data):,} events of {data.num_users:,} users and {data.num_items:,} items "
            f"({statistics.median(lengths):g} events per user at the median, "
            f"{facts['users_with_one_event']:,} users with one)",
            f"time: {times}",
            f"feedback: {feedback}",
            f"dropped: {drops or 'nothing'}",
        ]


def understand(path: str | Path, names: ColumnNames | None = None, titles: str | Path | None = None) -> Understood:
    """Read a file of interactions and say what it was understood as.

    Args:
        path: text with a separator (comma, tab, semicolon, `::`), also compressed (gzip, zip, zstd), or Parquet; or a
            folder of such files or a pattern.
        names: names of the columns.
        titles: file of item ids and titles, in any of these formats.

    Raises:
        ImportError: pyarrow is not installed.
        FileNotFoundError: there is no such file.
        ValueError: a file cannot be read; the message names file and line.
    """
    given = (names or ColumnNames())._asdict()
    formats = [formatted(file, given, ("user", "item"), _ROLES) for file in files_of(path)]
    if any(set(each.roles) != set(formats[0].roles) for each in formats):
        found = "; ".join(f"{each.path.name}: {', '.join(each.roles)}" for each in formats)
        raise ValueError(f"{path}: expected files with the same columns, got {found}")
    reading = _Reading(formats)
    columns = reading.columns()
    taken = Interactions.take(columns)
    if "time" in formats[0].roles:
        taken, repeated = _without_repeats(taken)
        reading.drop("repeat another line", repeated)
    if titles is not None:
        taken = replace(taken, names=read_titles(titles, taken.item_ids))
    return Understood(
        taken, formats, reading.rows, reading.dropped, reading.time_unit(taken), reading.words, reading.sample
    )


def read_titles(path: str | Path, item_ids: npt.NDArray[Any]) -> dict[Any, str]:
    """Titles by item id from a file with a column of items and one of titles.

    Raises:
        ValueError: the file cannot be read, or no title is of one of the items.
    """
    by_text = {str(item): item for item in item_ids.tolist()}
    found, example = {}, ""
    for file in files_of(path):
        form = formatted(file, {}, ("item", "title"), ("item", "title"))
        for block in _blocks(form):
            for item, title in zip(block["item"].to_pylist(), block["title"].to_pylist(), strict=True):
                example = example or item.strip()
                if title and item.strip() in by_text:
                    found[by_text[item.strip()]] = title
    if not found and len(item_ids):
        raise ValueError(
            f"{path}: expected titles of items such as {item_ids[0].item()!r}, got such as {example!r} only"
        )
    return found


def read_ids(path: str | Path) -> list[str]:
    """Item ids, as text, from a file with a column of items or with one id a line; each id once."""
    found: dict[str, None] = {}
    for file in files_of(path):
        try:
            form = formatted(file, {}, ("item",), ("item",))
        except ValueError as error:
            if "fields separated by" not in str(error):
                raise
            with open_text(file) as stream:  # a list of ids is no table
                texts = io.TextIOWrapper(io.BufferedReader(stream), "utf-8-sig").read().splitlines()
            texts = [text.strip().strip('"') for text in texts]
            header = texts and re.sub(r"[\W_]", "", texts[0]).lower() in NAMES["item"]
            found |= dict.fromkeys(texts[1:] if header else texts)
        else:
            for block in _blocks(form):
                found |= dict.fromkeys(text.strip() for text in block["item"].to_pylist())
    found.pop("", None)
    return list(found)


def has_titles(path: str | Path) -> bool:
    """Whether a file of items has a column of titles."""
    try:
        return all("title" in formatted(file, {}, (), ("item", "title")).roles for file in files_of(path))
    except ValueError:  # a list of ids
        return False


class _Reading:
    """Columns of the files so far, and counts."""

    def __init__(self, formats: list[Format]) -> None:
        self._formats = formats
        self._parts: dict[str, list[Any]] = {role: [] for role in formats[0].roles}
        self._time_kind: str | None = None
        self._rating_kind: str | None = None
        self.rows, self.dropped = 0, Counter[str]()
        self.words: Counter[str] = Counter()
        self.sample: dict[str, str] = {}

    def columns(self) -> Columns:
        """Read all files; the columns of `Interactions.take`."""
        for form in self._formats:
            try:
                for block in _blocks(form, self._skipped):
                    self._add(block)
            except BadValueError as error:
                raise _refusal(form, error) from None
        if not self._parts["user"] or not sum(map(len, self._parts["user"])):
            drops = "; ".join(f"{n:,} {why}" for why, n in self.dropped.items())
            raise ValueError(f"{self._formats[0].path}: expected rows, got {drops or 'none'}")
        columns: Columns = {}
        try:
            columns["user"] = values.ids_of(self._parts.pop("user"), negative=True)
            columns["item"] = values.ids_of(self._parts.pop("item"), negative=False)
        except BadValueError as error:
            raise _refusal(self._formats, error) from None
        for role, name in (("time", "timestamp"), ("rating", "rating")):
            if self._parts.get(role):
                columns[name] = np.concatenate(self._parts.pop(role))
        return columns

    def time_unit(self, taken: Interactions) -> str | None:
        """The unit of the times, from their size where they are integers."""
        if self._time_kind is None:
            return None
        if self._time_kind != "integers":
            return self._time_kind
        median = float(taken.timestamps.abs().median())
        return next((name for most, _, name in _UNITS if median < most), "nanoseconds")

    def drop(self, why: str, count: int) -> None:
        """Count dropped rows."""
        if count:
            self.dropped[why] += count

    def _skipped(self, width: int, count: int) -> None:
        self.rows += count
        self.drop(f"have another number of fields than {width}", count)

    def _add(self, block: dict[str, Any]) -> None:
        import pyarrow as pa
        from pyarrow import compute as pc

        n = len(block["user"])
        self.rows += n
        if not n:
            return
        ids = {role: block[role].dictionary_encode() for role in ("user", "item")}
        gone = {}
        for role, column in ids.items():
            empty = pc.is_in(pc.utf8_trim_whitespace(column.dictionary), value_set=pa.array(MISSING, pa.string()))
            gone[role] = empty.to_numpy(zero_copy_only=False)[column.indices.to_numpy()]
        bad = gone["user"] | gone["item"]
        blank = gone["user"] & gone["item"]
        self.drop("are blank", int(blank.sum()))
        self.drop("have no user", int((gone["user"] & ~blank).sum()))
        self.drop("have no item", int((gone["item"] & ~blank).sum()))
        numbers: dict[str, npt.NDArray[Any]] = {}
        for role in ("time", "rating"):
            if role in block:
                found, missing = self._numbers(role, block[role], bad)
                if found is None:
                    continue
                numbers[role] = found
                if missing is not None:
                    self.drop(f"have no {role}", int((missing & ~bad).sum()))
                    bad = bad | missing
        kept = ~bad
        if not self.sample and kept.any():
            first = int(kept.argmax())
            self.sample = {role: str(block[role][first]) for role in self._parts}
        whole = bool(kept.all())
        for role, column in ids.items():
            self._parts[role].append(column if whole else column.filter(pa.array(kept)))
        for role, column in numbers.items():
            self._parts[role].append(column if whole else column[kept])

    def _numbers(self, role: str, column: Any, bad: npt.NDArray[np.bool_]) -> tuple[Any, Any]:
        """Values and missing mask of a column of times or ratings; None for ratings that are words."""
        import pyarrow as pa
        from pyarrow import compute as pc

        if not pa.types.is_string(column.type):  # of a Parquet file
            return self._typed(role, column)
        if bad.any():  # values of rows that are dropped anyway are not judged
            column = pc.if_else(pa.array(bad), "", column)
        if role == "time":
            self._time_kind = self._time_kind or values.kind_of(column, _TIMES) or "ISO 8601"
            must = f"{self._time_kind}, as most others"
            return values.parsed(column, _TIMES[self._time_kind], must)
        if self._rating_kind is None:
            self._rating_kind = values.kind_of(column, {"numbers": values.numbers}) or "words"
        if self._rating_kind == "words":
            for entry in pc.value_counts(column).to_pylist():
                self.words[entry["values"]] += entry["counts"]
            return None, None
        found, missing = values.parsed(column, values.numbers, "a finite number")
        return found.astype(np.float32), missing

    def _typed(self, role: str, column: Any) -> tuple[Any, Any]:
        import pyarrow as pa
        from pyarrow import compute as pc

        missing = column.is_null().to_numpy(zero_copy_only=False) if column.null_count else None
        kind = column.type
        if role == "rating":
            if not (pa.types.is_floating(kind) or pa.types.is_integer(kind) or pa.types.is_boolean(kind)):
                raise ValueError(f"{self._formats[0].path}: ratings must be numbers or words, got {kind}")
            found = pc.fill_null(column.cast("float64"), 0.0).to_numpy(zero_copy_only=False)
            wrong = np.flatnonzero(~(np.abs(found) < 3.4e38))
            if len(wrong):
                raise BadValueError(str(found[wrong[0]]), "a finite number")
            return found.astype(np.float32), missing
        if pa.types.is_integer(kind):
            self._time_kind = "integers"
        elif pa.types.is_timestamp(kind) or pa.types.is_date(kind):
            self._time_kind, column = "ISO 8601", column.cast(pa.timestamp("us", getattr(kind, "tz", None)), safe=False)
        else:
            raise ValueError(f"{self._formats[0].path}: times must be integers, timestamps or text, got {kind}")
        return pc.fill_null(column.cast("int64"), 0).to_numpy(zero_copy_only=False), missing


def _blocks(
    form: Format, skipped: Callable[[int, int], object] = lambda width, count: None
) -> Iterator[dict[str, Any]]:
    """The columns of each role, block by block: text, or numbers of a Parquet file."""
    import pyarrow as pa
    from pyarrow import csv, parquet

    names = {role: str(place) for role, place in form.roles.items()}
    if not form.separator:
        with parquet.ParquetFile(form.path) as file:
            for batch in file.iter_batches(1 << 20, columns=[form.names[place] for place in form.roles.values()]):
                columns = {role: batch.column(form.names[place]) for role, place in form.roles.items()}
                yield {role: _plain(form, role, column) for role, column in columns.items()}
        return
    width, bad = len(form.names), 0

    def count(row: Any) -> str:
        nonlocal bad
        bad += 1
        return "skip"

    with open_text(form.path, form.separator) as stream:
        try:
            blocks = csv.open_csv(
                stream,
                csv.ReadOptions(
                    block_size=_BLOCK, skip_rows=form.lines_before, column_names=[str(i) for i in range(width)]
                ),
                csv.ParseOptions(
                    delimiter=form.delimiter,
                    quote_char=False if form.separator == "::" else '"',
                    newlines_in_values=form.separator != "::",
                    ignore_empty_lines=False,
                    invalid_row_handler=count,
                ),
                csv.ConvertOptions(
                    include_columns=[*names.values()],
                    column_types=dict.fromkeys(names.values(), pa.string()),
                    null_values=[],
                ),
            )
            for batch in blocks:
                yield {role: batch.column(name) for role, name in names.items()}
        except pa.ArrowInvalid as error:
            raise _broken(form, error) from None
    skipped(width, bad)


def _plain(form: Format, role: str, column: Any) -> Any:
    """A column of a Parquet file: ids and text as strings, numbers as they are."""
    import pyarrow as pa
    from pyarrow import compute as pc

    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    kind = column.type
    if role in ("user", "item", "title") and not (pa.types.is_integer(kind) or _is_text(kind)):
        raise ValueError(f"{form.path}: column {form.names[form.roles[role]]} must be integers or text, got {kind}")
    if role in ("user", "item", "title") or _is_text(kind):
        return pc.fill_null(column.cast(pa.string()), "")
    return column


def _is_text(kind: Any) -> bool:
    import pyarrow as pa

    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


def _broken(form: Format, error: Exception) -> ValueError:
    """The message for text that pyarrow does not parse."""
    if "UTF8" in str(error):
        with open_text(form.path) as stream:
            for number, line in enumerate(io.BufferedReader(stream), 1):
                try:
                    line.decode()
                except UnicodeDecodeError:
                    return ValueError(
                        f"{form.path}, line {number}: expected UTF-8, got {line.strip()!r:.200}; "
                        "`iconv -f LATIN1 -t UTF-8` converts it"
                    )
    return ValueError(f"{form.path}: expected fields with closed quotes, got {str(error).splitlines()[0]}")


def _refusal(forms: Format | list[Format], error: BadValueError) -> ValueError:
    """The message for a value that is refused, with its line."""
    forms = forms if isinstance(forms, list) else [forms]
    for form in forms:
        if not form.separator:
            continue
        for line, fields in form.records():
            for role, place in form.roles.items():
                if place < len(fields) and fields[place].strip() == error.text.strip() and role in _ROLES:
                    return ValueError(f"{form.path}, line {line}: {form.names[place]} {error}")
    return ValueError(f"{forms[0].path}: a column {error}")


def _without_repeats(data: Interactions) -> tuple[Interactions, int]:
    """The first of all rows of one user, time, item and rating, and the number of others."""
    if len(data) < 2:
        return data, 0
    user, time = data.users, data.timestamps
    new = torch.ones(len(data), dtype=torch.bool)
    new[1:] = (time[1:] != time[:-1]) | (user[1:] != user[:-1])
    keys = new.cumsum(0) * data.num_items + data.items  # rows of one user and time are neighbours
    ordered = np.sort(keys.numpy())
    if not (ordered[1:] == ordered[:-1]).any():
        return data, 0
    order = np.lexsort((data.ratings.numpy(), keys.numpy()))  # stable
    keys, ratings = keys[order], data.ratings[order]
    same = (keys[1:] == keys[:-1]) & (ratings[1:] == ratings[:-1])
    kept = torch.ones(len(data), dtype=torch.bool)
    kept[torch.from_numpy(order)[1:][same]] = False
    counts = torch.bincount(user[kept], minlength=data.num_users)
    offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    kept_ratings = data.ratings if data.implicit else data.ratings[kept]
    if data.implicit:
        kept_ratings = torch.ones(1).expand(int(kept.sum()))
    taken = replace(data, items=data.items[kept], timestamps=time[kept], ratings=kept_ratings, offsets=offsets)
    return taken, int((~kept).sum())


def _instant(time: int, per_second: int) -> str | int:
    try:
        moment = datetime.datetime.fromtimestamp(time // per_second, datetime.timezone.utc)
    except (OverflowError, OSError, ValueError):
        return time
    return moment.isoformat().replace("+00:00", "Z")
