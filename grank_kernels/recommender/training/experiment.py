"""An experiment: which data, which model, how it is trained; written as YAML, recorded with what came of it."""

import json
import os
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from omegaconf import OmegaConf  # typed dataclasses, YAML and `key=value` in one: the field's library for settings
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from grank_kernels.doctor import show_config
from grank_kernels.recommender.data import DATASETS, Interactions, Split, half_and_half, leave_one_out, read
from grank_kernels.recommender.models import Recommender
from grank_kernels.recommender.models.registry import MODELS, build_model
from grank_kernels.recommender.settings import Settings, takes
from grank_kernels.recommender.training.evaluation import DEPTH, feedback_auc, metrics, recommend
from grank_kernels.recommender.training.fit import fit, load_best
from grank_kernels.recommender.training.settings import TrainingConfig

KS = {"leave_one_out": (10, 50, 200), "half_and_half": (10, 50, 200, 500)}
"""The cuts that each protocol reports."""


@dataclass(frozen=True)
class DataConfig(Settings):
    """What is learned from.

    Attributes:
        name: one of `grank_kernels.recommender.data.DATASETS`.
        path: its file or folder; None where the data set does without.
        protocol: "leave_one_out" or "half_and_half".
        positive: the least rating that is positive feedback.
        validation: users held out for validation, for half_and_half.
        test: users held out for the test, for half_and_half.
    """

    name: str = takes("ml-100k", choices=tuple(DATASETS))
    path: str | None = None
    protocol: str = takes("leave_one_out", choices=tuple(KS))
    positive: float = 4.0
    validation: int = takes(500, least=1)
    test: int = takes(1000, least=1)

    def read(self) -> Interactions:
        """The data set."""
        return read(self.name, self.path)

    def split(self, interactions: Interactions) -> Split:
        """The split that the protocol makes."""
        if self.protocol == "leave_one_out":
            return leave_one_out(interactions, positive=self.positive)
        return half_and_half(interactions, positive=self.positive, validation=self.validation, test=self.test)


@dataclass(frozen=True)
class Experiment:
    """Data, model and training.

    Attributes:
        model: name of the model, one of `MODELS`.
        settings: its settings, an instance of the dataclass that `MODELS` names.
        data: what it learns from.
        training: how it is fitted.
        k1: how many retrieved items the second stage ranks, one report each; at least the protocol's first cut. Models
            that only retrieve have none.
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
        """Read a YAML file, with `section.key=value` overrides.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is no YAML, or has a key or a value that the settings do not take; the message names it.
        """
        path = Path(path)
        try:
            given: Any = OmegaConf.merge(OmegaConf.load(path), OmegaConf.from_dotlist(list(overrides)))
            name = given.get("model") if OmegaConf.is_dict(given) else None
            if name not in MODELS:
                raise ValueError(f"model must be one of {', '.join(MODELS)}, got {name!r}")
            sections = {"settings": MODELS[name].settings, "data": DataConfig, "training": TrainingConfig}
            defaults = {section: _defaults(config) for section, config in sections.items()}
            schema = OmegaConf.create({"model": name, **defaults, "k1": []})
            OmegaConf.set_struct(schema, True)
            merged: Any = OmegaConf.merge(schema, given)
            built = {section: _build(section, config, merged[section]) for section, config in sections.items()}
            k1 = merged.k1 if OmegaConf.is_list(merged.k1) else [merged.k1]
            return cls(model=name, k1=tuple(k1), **built)
        except FileNotFoundError:
            raise
        except (OmegaConfBaseException, OSError, ValueError, YAMLError) as error:
            raise ValueError(f"{path}: {error}") from None

    def save(self, path: str | Path) -> None:
        """Write it as YAML, every setting in full."""
        settings = {
            "model": self.model,
            "settings": _plain(self.settings),
            "data": _plain(self.data),
            "training": _plain(self.training),
            "k1": list(self.k1),
        }
        _write(Path(path), OmegaConf.to_yaml(OmegaConf.create(settings)))

    def build(self, num_items: int) -> Recommender:
        """A fresh model, its weights drawn from the seed of the training."""
        torch.manual_seed(self.training.seed)
        return build_model(self.model, num_items, self.settings)


def run(experiment: Experiment, folder: str | Path, *, progress: bool = True) -> dict[str, Any]:
    """Train a model, or go on with a run that was stopped, and report on the test part of the split.

    Writes `experiment.yaml`, the checkpoints, a CSV log and `report.json` into the folder.

    Args:
        experiment: what to do.
        folder: of the run.
        progress: draw a progress bar.

    Returns:
        What `report.json` holds: the metrics, and how they were obtained. Of several processes that train together, the
        first reports; what the others return is empty.

    Raises:
        ValueError: the folder holds a run of another experiment.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    record = folder / "experiment.yaml"
    if not record.exists():
        experiment.save(record)
    elif Experiment.load(record) != experiment:
        raise ValueError(f"{folder} holds another experiment; take another folder or remove it")
    split = experiment.data.split(experiment.data.read())
    model = experiment.build(split.num_items)
    seconds = fit(model, split, experiment.training, folder=folder, progress=progress)
    if dist.is_initialized() and dist.get_rank() > 0:
        return {}
    report = evaluate(experiment, model, split) | {
        "seconds": round(seconds, 1),
        "threads": torch.get_num_threads(),
        "machine": show_config(),
    }
    _write(folder / "report.json", json.dumps(report, indent=2) + "\n")
    return report


def load(folder: str | Path, split: Split) -> Recommender:
    """The model of a run with the weights of its best epoch, in evaluation mode."""
    folder = Path(folder)
    model = Experiment.load(folder / "experiment.yaml").build(split.num_items)
    load_best(model, folder)
    return model.eval()


def evaluate(experiment: Experiment, model: Recommender, split: Split) -> dict[str, Any]:
    """The protocol's metrics on the test part: of the retrieval, after the second stage for each k1, and the AUC."""
    cases, ks = split.test, [k for k in KS[experiment.data.protocol] if k <= split.num_items]
    found = recommend(model, cases, min(DEPTH, split.num_items), rank=False)
    report: dict[str, Any] = {"users": len(cases), "retrieved": metrics(found.retrieved, cases.targets, ks)}
    for k1 in experiment.k1 if model.ranks else ():
        second = recommend(model, cases, k1).ranked
        if second is None:
            raise RuntimeError("a model that ranks returned no ranking")
        report[f"ranked_{k1}"] = metrics(second, cases.targets, [k for k in ks if k <= k1])
    liked = cases.targets.feedback
    if model.ranks and bool(liked.any()) and not bool(liked.all()):
        report["auc"] = feedback_auc(model, cases)
    return report


def _defaults(config: type[Any]) -> Any:
    schema = OmegaConf.structured(config)
    OmegaConf.set_readonly(schema, False)  # the dataclass is frozen, what is merged into its defaults is not
    return schema


def _build(section: str, config: type[Any], node: Any) -> Any:
    try:
        return config(**{entry.name: node[entry.name] for entry in fields(config)})
    except ValueError as error:
        raise ValueError(f"{section}.{error}") from None


def _write(path: Path, text: str) -> None:
    """A file that is there whole or not at all, whoever else writes it."""
    part = path.with_name(f"{path.name}.{uuid.uuid4().hex}")
    part.write_text(text)
    os.replace(part, path)


def _plain(config: Any) -> dict[str, Any]:
    return {entry.name: getattr(config, entry.name) for entry in fields(config)}
