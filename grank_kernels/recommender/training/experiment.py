"""`Experiment`: the settings of a run and their YAML file. Needs no trainer."""

import difflib
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, get_args

import torch
import yaml

from grank_kernels.common.atomic_files import write_text
from grank_kernels.recommender.data import DATASETS, Interactions, Split, half_and_half, leave_one_out, read
from grank_kernels.recommender.data.own_file import ColumnNames, Understood, understand
from grank_kernels.recommender.data.splits import REPEATS
from grank_kernels.recommender.models.recommender import Recommender
from grank_kernels.recommender.models.registry import build_model, model_class
from grank_kernels.recommender.settings import Settings, takes, unknown_key
from grank_kernels.recommender.training.settings import TrainingConfig

KS = {"leave_one_out": (10, 50, 200), "half_and_half": (10, 50, 200, 500)}
"""The cuts k that each protocol reports."""

_COLUMNS = ("user_column", "item_column", "time_column", "rating_column")
_SECTIONS = ("settings", "data", "training")


@dataclass(frozen=True)
class DataConfig(Settings):
    """Data set and evaluation protocol.

    Attributes:
        name: one of `grank_kernels.recommender.data.DATASETS`.
        path: file or folder of the data set; None for a data set that is installed as a package.
        protocol: "leave_one_out" or "half_and_half".
        positive: lowest rating that counts as positive feedback.
        validation: number of validation users (half_and_half).
        test: number of test users (half_and_half).
        repeats: "keep", "first" or "last": policy for rows in which a user meets an item again; see `leave_one_out`.
        user_column: name of a column of your own file ("own"); None for the usual names. So are the next three.
        item_column: column of item ids.
        time_column: column of times.
        rating_column: column of ratings.
        titles: file of item ids and titles, for your own file.
    """

    name: str = takes("ml-100k", choices=tuple(DATASETS))
    path: str | None = None
    protocol: str = takes("leave_one_out", choices=tuple(KS))
    positive: float = 4.0
    validation: int = takes(500, least=1)
    test: int = takes(1000, least=1)
    repeats: str = takes("keep", choices=REPEATS)
    user_column: str | None = None
    item_column: str | None = None
    time_column: str | None = None
    rating_column: str | None = None
    titles: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        given = [name for name in (*_COLUMNS, "titles") if getattr(self, name) is not None]
        if given and self.name != "own":
            raise ValueError(f"{given[0]} must be left out unless name is own, got {getattr(self, given[0])!r}")

    def read(self) -> Interactions:
        """Read the data set."""
        return read(self.name, self.path) if self.name != "own" else self.understand().interactions

    def understand(self) -> Understood:
        """Read your own file, and say what it was understood as."""
        if self.path is None:
            raise ValueError("path must be a file of your own, got None")
        return understand(self.path, ColumnNames(*(getattr(self, name) for name in _COLUMNS)), self.titles)

    def split(self, interactions: Interactions) -> Split:
        """Split interactions by the protocol."""
        if self.protocol == "leave_one_out":
            return leave_one_out(interactions, positive=self.positive, repeats=self.repeats)
        return half_and_half(
            interactions,
            positive=self.positive,
            validation=self.validation,
            test=self.test,
            repeats=self.repeats,
        )


@dataclass(frozen=True)
class Experiment:
    """Settings of model, data and training.

    Attributes:
        model: name of the model, a key of `MODELS`.
        settings: settings of the model, an instance of the dataclass in `MODELS`.
        data: settings of the data.
        training: settings of the training.
        k1: numbers of candidates for the second stage; the report has one section for each. Each is at least the
            protocol's first cut. Ignored for a model without a second stage.
    """

    model: str
    settings: Any
    data: DataConfig = field(default_factory=DataConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    k1: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        least = min(KS[self.data.protocol])
        if any(not isinstance(k1, int) or k1 < least for k1 in self.k1):
            raise ValueError(f"k1 must hold ints of {least} or more, the first cut of the report, got {list(self.k1)}")

    @classmethod
    def load(cls, path: str | Path, overrides: Sequence[str] = ()) -> "Experiment":
        """Read a YAML file and apply overrides.

        The type of a setting decides how its text is read: `path: 007` is the path "007". Nothing is interpolated.

        Args:
            path: YAML file.
            overrides: `section.key=value`, `model=value` or `k1=value`; they replace values of the file.

        Raises:
            FileNotFoundError: the file does not exist.
            ValueError: invalid YAML, an unknown key or an invalid value; the message names it.
        """
        path = Path(path)
        try:
            given = _mapping(_parsed(path.read_text(encoding="utf-8")), "the file")
            sections = {name: dict(_mapping(given.get(name) or {}, name)) for name in _SECTIONS}
            for override in overrides:
                _apply(override, given, sections)
            return cls._from_text(given, sections)
        except IsADirectoryError:
            raise ValueError(f"{path}: expected a YAML file, got a folder") from None
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path}: {error}") from None

    @classmethod
    def _from_text(cls, given: dict[str, Any], sections: dict[str, dict[str, Any]]) -> "Experiment":
        """The experiment of a parsed file: all values are text, None, lists or mappings."""
        model = model_class(given.get("model"))
        configs: dict[str, type[Settings]] = {
            "settings": model.settings,
            "data": DataConfig,
            "training": TrainingConfig,
        }
        for key in given:
            if key not in (*_SECTIONS, "model", "k1"):
                raise ValueError(_unknown(key, configs))
        built = {name: config.from_dict(_typed(config, sections[name], name), name) for name, config in configs.items()}
        k1 = given.get("k1") or []
        k1 = tuple(_value(int, entry, "k1") for entry in (k1 if isinstance(k1, list) else [k1]))
        return cls(model=given["model"], k1=k1, **built)  # type: ignore[arg-type]  # each of its own class

    def save(self, path: str | Path) -> None:
        """Write all settings as YAML, as `load` reads it."""
        write_text(path, self._text())

    def overridden(self, overrides: Sequence[str]) -> "Experiment":
        """The experiment with other values, as `load` takes them; another model has its own default settings."""
        given = _mapping(_parsed(self._text()), "settings")
        sections = {name: dict(given[name]) for name in _SECTIONS}
        if any(each.startswith("model=") and each != f"model={self.model}" for each in overrides):
            sections["settings"] = {}
        for override in overrides:
            _apply(override, given, sections)
        return self._from_text(given, sections)

    def _text(self) -> str:
        settings = {"model": self.model, **self._sections(), "k1": list(self.k1)}
        text: str = yaml.safe_dump(settings, sort_keys=False, allow_unicode=True)
        return text

    def flat(self) -> dict[str, Any]:
        """All settings by their full names, such as `training.epochs`."""
        sections = {f"{name}.{key}": value for name, own in self._sections().items() for key, value in own.items()}
        return {"model": self.model, **sections, "k1": list(self.k1)}

    def _sections(self) -> dict[str, dict[str, Any]]:
        return {name: getattr(self, name).to_dict() for name in _SECTIONS}

    def with_absolute_path(self) -> "Experiment":
        """The same experiment; `data.path` and `data.titles` do not depend on the current folder."""
        paths = {"path": self.data.path, "titles": self.data.titles}
        absolute: dict[str, Any] = {name: os.path.abspath(path) for name, path in paths.items() if path is not None}
        return replace(self, data=replace(self.data, **absolute)) if absolute else self

    def build(self, num_items: int) -> Recommender:
        """A new model; its weights are drawn from the seed of the training."""
        torch.manual_seed(self.training.seed)
        return build_model(self.model, num_items, self.settings)


class _TextLoader(yaml.SafeLoader):  # type: ignore[misc]  # PyYAML has no types
    """YAML whose scalars stay text, except null; a key that occurs twice is refused.

    YAML 1.1 would read 007 as 7, 1:30 as 90, 20241129_0101 as 202411290101, and 1e-3 as text.
    """

    yaml_implicit_resolvers = {  # noqa: RUF012  # as PyYAML declares it
        first: [entry for entry in entries if entry[0] == "tag:yaml.org,2002:null"]
        for first, entries in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        for key, count in Counter(key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)).items():
            if count > 1:
                raise ValueError(f"{key} must be given once, got it {count} times")
        mapping: dict[Any, Any] = super().construct_mapping(node, deep)
        return mapping


def _parsed(text: str) -> Any:
    try:
        return yaml.load(text, _TextLoader)
    except yaml.YAMLError as error:
        raise ValueError(f"expected YAML, got {error}") from None
    except RecursionError:
        raise ValueError("expected YAML, got too deep a nesting") from None


def _mapping(given: Any, name: str) -> dict[str, Any]:
    if not isinstance(given, dict):
        raise ValueError(f"{name} must be a mapping of keys to values, got a {type(given).__name__}")
    return given


def _apply(override: str, given: dict[str, Any], sections: dict[str, dict[str, Any]]) -> None:
    """Set the value of `section.key=value`, `model=value` or `k1=value`."""
    name, equals, value = override.partition("=")
    section, dot, key = name.partition(".")
    if not equals:
        raise ValueError(f"an override must be section.key=value, got {override!r}")
    if name in sections:
        raise ValueError(f"{name} is a section: an override must be {name}.key=value, got {override!r}")
    if dot and section in sections:
        sections[section][key] = value
    else:
        given[name] = _parsed(value) if name == "k1" else value


def _typed(config: type[Settings], given: dict[str, Any], section: str) -> dict[str, Any]:
    kinds = {entry.name: entry.type for entry in fields(config)}
    return {key: _value(kinds.get(key, str), value, f"{section}.{key}") for key, value in given.items()}


def _value(kind: Any, given: Any, name: str) -> Any:
    """The value of a setting of type `kind` from its text; text of another type is left to the checks of `Settings`."""
    if isinstance(given, (list, dict)):
        raise ValueError(f"{name} must be a single value, got a {type(given).__name__}")
    kinds = get_args(kind) or (kind,)
    if given is None or str in kinds:
        return given
    if given in ("", "~", "null"):  # of an override; in a file null is None already
        return None
    if bool in kinds:
        return {"true": True, "false": False}.get(given.lower(), given)
    try:
        return kinds[0](given)
    except ValueError:
        return given


def _unknown(key: Any, configs: dict[str, type[Settings]]) -> str:
    """The message for an unknown key outside of the sections; it may be the name of a setting in one of them."""
    places = {entry.name: f"{section}.{entry.name}" for section, config in configs.items() for entry in fields(config)}
    near = difflib.get_close_matches(str(key), places, n=1)
    if near:
        return f"{key} is unknown; did you mean {places[near[0]]}?"
    return unknown_key(key, (*_SECTIONS, "model", "k1"))
