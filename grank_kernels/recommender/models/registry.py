"""The trainable models by name, each with its settings; importing this needs no trainer."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from grank_kernels.recommender.models.dual_tower import DualTower, DualTowerConfig
from grank_kernels.recommender.models.grank import GRank, GRankConfig
from grank_kernels.recommender.models.recommender import Recommender
from grank_kernels.recommender.models.sequential import Sequential, SequentialConfig
from grank_kernels.recommender.models.unigrf import UniGRF, UniGRFConfig
from grank_kernels.recommender.settings import Settings


class ModelClass(NamedTuple):
    """A model and its settings: `model(num_items, settings)` builds it, its weights drawn from torch's generator."""

    model: type[Any]
    settings: type[Settings]


MODELS = {
    "dual_tower": ModelClass(DualTower, DualTowerConfig),
    "grank": ModelClass(GRank, GRankConfig),
    "sequential": ModelClass(Sequential, SequentialConfig),
    "unigrf": ModelClass(UniGRF, UniGRFConfig),
}

_PAPERS = {  # names that papers and other libraries use -> the model here that implements them
    "sasrec": "sequential with settings.backbone=transformer",
    "hstu": "sequential with settings.backbone=hstu",
    "dssm": "dual_tower",
    "twotower": "dual_tower",
}


def model_class(name: Any) -> ModelClass:
    """The model of this name.

    Raises:
        ValueError: there is no such model; the message lists those that exist.
    """
    if not isinstance(name, str) or name not in MODELS:
        paper = _PAPERS.get(str(name).lower().replace("_", "").replace("-", ""))
        hint = f"; {name} is {paper}" if paper else ""
        raise ValueError(f"model must be one of {', '.join(MODELS)}, got {name!r}{hint}")
    return MODELS[name]


def model_settings(name: Any, values: Mapping[str, Any], section: str = "settings") -> Settings:
    """Settings of the model of this name from plain values; see `Settings.from_dict` for the errors."""
    return model_class(name).settings.from_dict(values, section)


def build_model(name: str, num_items: int, settings: Settings) -> Recommender:
    """A model with fresh weights, drawn from torch's global generator.

    Raises:
        TypeError: `settings` are those of another model.
        ValueError: there is no model of this name, or the settings contradict each other.
    """
    model, kind = model_class(name)
    if not isinstance(settings, kind):
        raise TypeError(f"settings of {name} must be {kind.__name__}, got {type(settings).__name__}")
    built: Recommender = model(num_items, settings)
    return built
