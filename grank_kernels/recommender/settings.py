"""Settings: frozen dataclasses whose fields say which values they take, and refuse any other by name.

Fields hold numbers, words and switches, as OmegaConf's structured configurations do, which reads YAML into them.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple, cast


class _Accepted(NamedTuple):
    words: str
    test: Callable[[Any], bool]


def takes(
    default: Any,
    *,
    least: float | None = None,
    above: float | None = None,
    most: float | None = None,
    below: float | None = None,
    choices: tuple[str, ...] | None = None,
) -> Any:
    """A field of `Settings` with its default and the bounds of its number, or the words that it may be."""
    accepted = [
        _Accepted(f"{least} or more", lambda x: x >= least),
        _Accepted(f"above {above}", lambda x: x > above),
        _Accepted(f"at most {most}", lambda x: x <= most),
        _Accepted(f"below {below}", lambda x: x < below),
        _Accepted(f"one of {', '.join(choices or ())}", lambda x: x in choices),  # type: ignore[operator]  # if given
    ]
    given = [x for x, bound in zip(accepted, (least, above, most, below, choices), strict=True) if bound is not None]
    return field(default=default, metadata={"accepted": given})


@dataclass(frozen=True)
class Settings:
    """Base of settings: an instance holds what its fields take.

    Raises:
        TypeError: a value of another type than the field's; an int may stand for a float.
        ValueError: one that the field does not take, NaN and infinities among them; the message names the field.
    """

    def __post_init__(self) -> None:
        for entry in fields(self):
            value, kind = getattr(self, entry.name), cast(Any, entry.type)  # annotations here are types
            own = kind | int if kind is float else kind
            if not isinstance(value, own) or (isinstance(value, bool) and kind is not bool):
                raise TypeError(f"{entry.name} must be {getattr(kind, '__name__', kind)}, got {value!r}")
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"{entry.name} must be finite, got {value}")
            accepted: list[_Accepted] = entry.metadata.get("accepted", [])
            if value is not None and not all(x.test(value) for x in accepted):
                raise ValueError(f"{entry.name} must be {' and '.join(x.words for x in accepted)}, got {value!r}")
