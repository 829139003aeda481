"""Settings: frozen dataclasses whose fields state the values they accept and refuse every other value by name."""

import difflib
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple, TypeVar, cast

S = TypeVar("S", bound="Settings")


class _Bound(NamedTuple):
    words: str
    holds: Callable[[Any], bool]


def takes(
    default: Any,
    *,
    least: float | None = None,
    above: float | None = None,
    most: float | None = None,
    below: float | None = None,
    choices: tuple[str, ...] | None = None,
) -> Any:
    """A dataclass field of `Settings` with a default value and the bounds of its number, or the accepted strings."""
    bounds = [
        _Bound(f"{least} or more", lambda x: x >= least),
        _Bound(f"above {above}", lambda x: x > above),
        _Bound(f"at most {most}", lambda x: x <= most),
        _Bound(f"below {below}", lambda x: x < below),
        _Bound(f"one of {', '.join(choices or ())}", lambda x: x in choices),  # type: ignore[operator]  # if given
    ]
    given = [x for x, limit in zip(bounds, (least, above, most, below, choices), strict=True) if limit is not None]
    return field(default=default, metadata={"bounds": given})


@dataclass(frozen=True)
class Settings:
    """Base class of settings; every instance has been validated.

    Raises:
        TypeError: a value is not of its field's type; an int is accepted for a float.
        ValueError: a value is NaN, infinite or out of the field's bounds; the message names the field.
    """

    def __post_init__(self) -> None:
        for entry in fields(self):
            value, kind = getattr(self, entry.name), cast(Any, entry.type)  # a type: annotations here are no strings
            accepted = kind | int if kind is float else kind
            if not isinstance(value, accepted) or (isinstance(value, bool) and kind is not bool):
                raise TypeError(f"{entry.name} must be {getattr(kind, '__name__', kind)}, got {value!r}")
            if kind is float and not _is_finite(value):
                raise ValueError(f"{entry.name} must be finite, got {value}")
            bounds: list[_Bound] = entry.metadata.get("bounds", [])
            if value is not None and not all(x.holds(value) for x in bounds):
                raise ValueError(f"{entry.name} must be {' and '.join(x.words for x in bounds)}, got {value!r}")

    @classmethod
    def from_dict(cls: type[S], values: Mapping[str, Any], section: str) -> S:
        """Settings from plain values, as a YAML or JSON file holds them; missing keys take their defaults.

        An int becomes the float that a field declares, and so does a string such as "1e-3", which YAML 1.1 does not
        read as a number.

        Args:
            values: field name -> value.
            section: name of the settings in the file; error messages name a value as `section.key`.

        Raises:
            ValueError: `values` is no mapping, a key is unknown (the message lists the known keys and suggests the
                nearest), or a value has the wrong type or is out of bounds.
        """
        if not isinstance(values, Mapping):
            raise ValueError(f"{section} must be a mapping of keys to values, got {values!r}")
        known = {entry.name: entry.type for entry in fields(cls)}
        for key in values:
            if key not in known:
                raise ValueError(unknown_key(key, known, section))
        try:
            return cls(**{key: _float(value) if known[key] is float else value for key, value in values.items()})
        except (TypeError, ValueError) as error:
            raise ValueError(f"{section}.{error}") from None

    def to_dict(self) -> dict[str, Any]:
        """Field name -> value, all of them; `from_dict` reads it back."""
        return {entry.name: getattr(self, entry.name) for entry in fields(self)}


def unknown_key(key: Any, known: Iterable[str], section: str = "") -> str:
    """The error message for a key that a section has not: the nearest known key, and all of them."""
    prefix = f"{section}." if section else ""
    near = difflib.get_close_matches(str(key), list(known), n=1)
    hint = f", did you mean {prefix}{near[0]}?" if near else "."
    return f"{prefix}{key} is unknown{hint} {f'Keys of {section}' if section else 'Keys'}: {', '.join(known)}"


def _float(value: Any) -> Any:
    """A float from an int or from a string that reads as one; any other value is left to the checks."""
    if isinstance(value, bool) or not isinstance(value, (int, str)):
        return value
    try:
        return float(value)
    except (OverflowError, ValueError):
        return value


def _is_finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # an int beyond the largest float
        return False
