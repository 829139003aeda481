"""The format of a user's own file: compression, separator, header, and the column of each role."""

import csv
import io
import re
import statistics
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

NAMES = {  # role -> usual column names, in lower case without punctuation, the best first
    "user": (
        *("user", "userid", "uid", "useridx", "customer", "customerid", "visitor", "visitorid", "reviewer"),
        *("reviewerid", "member", "memberid", "session", "sessionid", "sid"),
    ),
    "item": (
        *("item", "itemid", "iid", "movie", "movieid", "product", "productid", "parentasin", "asin", "sku", "isbn"),
        *("track", "trackid", "song", "songid", "artist", "artistid", "book", "bookid", "article", "articleid"),
        *("news", "newsid", "video", "videoid", "id"),
    ),
    "time": ("timestamp", "ts", "time", "datetime", "date", "eventtime", "createdat", "unixreviewtime"),
    "rating": ("rating", "ratings", "stars", "score", "overall", "event", "eventtype", "behavior", "behaviour"),
    "title": ("title", "name", "itemname", "label", "description"),
}
_SEPARATORS = {"::": "'::'", "\t": "tabs", ";": "semicolons", ",": "commas"}
_STAND_IN = "\x1f"  # for `::`, since parsers take one byte; a file with this byte is refused
_HEAD, _LINES = 1 << 16, 50  # bytes and lines that decide the format
_MARKS = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd", b"PK\x03\x04": "zip"}


@dataclass(frozen=True)
class Format:
    """How a file is read.

    Attributes:
        path: the file.
        names: name of each column; "1", "2", ... without a header.
        roles: role -> position of its column.
        separator: of the fields; "" for a Parquet file.
        header: whether the first line that is not blank names the columns.
        lines_before: number of lines up to and including the header.
    """

    path: Path
    names: tuple[str, ...]
    roles: Mapping[str, int]
    separator: str = ""
    header: bool = True
    lines_before: int = 0

    @property
    def words(self) -> str:
        """The format in words."""
        if not self.separator:
            return "Parquet"
        return f"{_SEPARATORS[self.separator]}, {'header' if self.header else 'no header'}"

    @property
    def delimiter(self) -> str:
        """The one character between the fields of `open_text`."""
        return _STAND_IN if self.separator == "::" else self.separator

    def records(self) -> Iterator[tuple[int, list[str]]]:
        """Line number and fields of each record, by Python's parser: pyarrow's does not count lines, for messages."""
        with open_text(self.path, self.separator) as raw:
            text = io.TextIOWrapper(raw, "utf-8-sig", errors="replace", newline="")
            reader = csv.reader(text, **_dialect(self.delimiter))
            for fields in reader:
                if reader.line_num > self.lines_before:
                    yield reader.line_num, fields


def formatted(path: Path, given: Mapping[str, str | None], needed: Sequence[str], wanted: Sequence[str]) -> Format:
    """Find out how a file is read.

    Args:
        path: a text file, also compressed by gzip, zip or zstd, or a Parquet file.
        given: role -> name of its column, or None to look for the usual names.
        needed: roles without which the file is of no use.
        wanted: roles that are looked for.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file is no such file, or a needed role has no column.
    """
    with path.open("rb") as file:
        mark = file.read(4)
    if mark == b"PAR1":
        import pyarrow
        from pyarrow import parquet

        try:
            names = tuple(parquet.read_schema(path).names)
        except (pyarrow.ArrowException, OSError) as error:
            raise ValueError(f"{path}: expected a whole Parquet file, got {error}") from None
        return Format(path, names, _roles(path, names, given, needed, wanted))
    first, rows, separator = _head(path)
    fields = rows[0]
    header = _is_header(fields, given, wanted)
    names = tuple(fields) if header else tuple(str(i + 1) for i in range(len(fields)))
    if not header:
        given = _by_position(rows, given, needed, wanted)
    return Format(path, names, _roles(path, names, given, needed, wanted), separator, header, first if header else 0)


def files_of(path: str | Path) -> list[Path]:
    """The files that a path names: a file, the files of a folder, or the matches of a pattern such as `logs/*.csv`.

    Raises:
        FileNotFoundError: there is none.
    """
    path = Path(path)
    if path.is_file():
        return [path]
    parent, pattern = (path, "*") if path.is_dir() else (path.parent, path.name)
    found = sorted(file for file in parent.glob(pattern) if file.is_file() and file.name[0] not in "._")
    if not found:
        raise FileNotFoundError(f"{path}: expected a file, a folder with files, or a pattern such as 'logs/*.csv'")
    return found


@contextmanager
def open_text(path: Path, separator: str = ",") -> Iterator[Any]:
    """The bytes of a text file, decompressed, with one character in the place of `::`."""
    import pyarrow

    with path.open("rb") as file:
        mark = file.read(4)
    kind = next((kind for start, kind in _MARKS.items() if mark.startswith(start)), None)
    try:
        if kind == "zip":  # an archive, of which pyarrow knows nothing
            with zipfile.ZipFile(path) as archive:
                members = [each for each in archive.namelist() if not each.endswith("/") and "__MACOSX" not in each]
                if len(members) != 1:
                    raise ValueError(f"{path}: expected a zip file with one file, got {len(members)}")
                with archive.open(members[0]) as member:
                    yield _replaced(pyarrow.PythonFile(member, "r"), path, separator)
        else:
            with pyarrow.input_stream(str(path), compression=kind) as stream:
                yield _replaced(stream, path, separator)
    except (OSError, EOFError, zipfile.BadZipFile) as error:
        if isinstance(error, FileNotFoundError):
            raise
        raise ValueError(f"{path}: expected a whole {kind or 'text'} file, got a damaged one: {error}") from None


def _replaced(stream: Any, path: Path, separator: str) -> Any:
    if separator != "::":
        return stream
    from pyarrow import lib

    lines, held = 1, b""

    def replace(block: Any) -> bytes:
        nonlocal lines, held
        text = held + bytes(block)
        place = text.find(_STAND_IN.encode())
        if place >= 0:
            line = lines + text[:place].count(b"\n")
            raise ValueError(f"{path}, line {line}: fields must not hold the control character 0x1f, got one")
        held = b":" if text.endswith(b":") and not text.endswith(b"::") else b""  # the half of a separator
        text = text[: len(text) - len(held)]
        lines += text.count(b"\n")
        return text.replace(b"::", _STAND_IN.encode())

    return lib.TransformInputStream(stream, replace)


def _dialect(delimiter: str) -> dict[str, Any]:
    return {"delimiter": delimiter, "quoting": csv.QUOTE_NONE if delimiter == _STAND_IN else csv.QUOTE_MINIMAL}


def _head(path: Path) -> tuple[int, list[list[str]], str]:
    """Number of the first line that is not blank, the fields of the first lines, and their separator."""
    with open_text(path) as stream:
        raw = stream.read(_HEAD)
    if raw[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise ValueError(f"{path}: expected UTF-8 text, got UTF-16; `iconv -f UTF-16 -t UTF-8` converts it")
    if b"\0" in raw:
        raise ValueError(f"{path}: expected text or Parquet, got a binary file")
    lines = raw.decode("utf-8-sig", errors="replace").splitlines()
    if len(raw) == _HEAD:
        lines = lines[:-1] or lines  # the last one may be cut
    blank = next((i for i, line in enumerate(lines) if line.strip()), len(lines))
    kept = [line for line in lines if line.strip()][:_LINES]
    if not kept:
        raise ValueError(f"{path}: expected lines of text, got an empty file")
    best: tuple[tuple[float, int], list[list[str]], str] | None = None
    for separator in _SEPARATORS:
        one = _STAND_IN if separator == "::" else separator
        rows = [row for row in csv.reader((line.replace(separator, one) for line in kept), **_dialect(one)) if row]
        width = statistics.mode(map(len, rows))
        if width > 1:
            score = (sum(len(row) == width for row in rows) / len(rows), width)
            if best is None or score > best[0]:
                best = (score, rows, separator)
    if best is None:
        raise ValueError(
            f"{path}: expected fields separated by {', '.join(_SEPARATORS.values())}, got {kept[0]!r:.200}"
        )
    return blank + 1, [[field.strip() for field in row] for row in best[1]], best[2]


def _plain(name: str) -> str:
    return re.sub(r"[\W_]", "", name).lower()


def _is_header(fields: Sequence[str], given: Mapping[str, str | None], wanted: Sequence[str]) -> bool:
    """Whether a first line names columns: it has a usual or a given name, or no field that looks like a number."""
    names = [name for name in given.values() if name is not None]
    if names and not any(name in fields for name in names):
        return not all(name.isdecimal() for name in names)
    if any(_plain(field) in NAMES[role] for field in fields for role in wanted):
        return True
    return not any(re.match(r"[-+]?\.?\d", field) for field in fields)


def _by_position(
    rows: Sequence[Sequence[str]], given: Mapping[str, str | None], needed: Sequence[str], wanted: Sequence[str]
) -> dict[str, str | None]:
    """Columns of a file without header: the needed roles first, then a time and a rating by their values."""
    chosen = dict(given)
    free = [i for i in range(len(rows[0])) if str(i + 1) not in given.values()]
    for role in needed:
        if chosen.get(role) is None and free:
            chosen[role] = str(free.pop(0) + 1)
    for i in free:
        value = rows[min(1, len(rows) - 1)][i] if i < len(rows[min(1, len(rows) - 1)]) else ""
        is_time = re.fullmatch(r"\d{9,19}(\.\d*)?|\d{4}-\d\d-\d\d.*", value) is not None
        role = "time" if is_time else "rating" if re.fullmatch(r"-?\d+(\.\d*)?", value) else "title"
        if role in wanted and chosen.get(role) is None:
            chosen[role] = str(i + 1)
    return chosen


def _roles(
    path: Path,
    names: Sequence[str],
    given: Mapping[str, str | None],
    needed: Sequence[str],
    wanted: Sequence[str],
) -> dict[str, int]:
    roles: dict[str, int] = {}
    plain = [_plain(name) for name in names]
    for role in wanted:
        name = given.get(role)
        if name is not None:
            if name not in names:
                raise ValueError(f"{path}: --{role}-column must be one of {_listed(names)}, got {name!r}")
            roles[role] = list(names).index(name)
            continue
        place = next((plain.index(usual) for usual in NAMES[role] if usual in plain), None)
        if place is not None and place not in roles.values():
            roles[role] = place
    missing = [role for role in needed if role not in roles]
    if missing:
        options = ", ".join(f"--{role}-column" for role in missing)
        raise ValueError(
            f"{path}: expected a column for {' and '.join(missing)} with a usual name such as "
            f"{' and '.join(NAMES[role][1] for role in missing)}, got columns {_listed(names)}; name it by {options}"
        )
    return roles


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(repr(name)[1:-1] for name in names[:20])
    return f"{shown}, ..." if len(names) > 20 else shown
