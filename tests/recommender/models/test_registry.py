"""The registry: every model is built from plain values, and importing it needs no trainer."""

import subprocess
import sys
from typing import Any

import pytest
import torch

from grank_kernels.recommender.models import GRankConfig, SequentialConfig
from grank_kernels.recommender.models.registry import MODELS, build_model, model_class, model_settings

BLOCKED = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {
            "lightning", "omegaconf", "torchmetrics", "scipy", "typer", "tensorboardX", "matplotlib", "pyarrow"
        }:
            raise ModuleNotFoundError(f"blocked: {name}")

sys.meta_path.insert(0, Blocked())
import grank_kernels.recommender.data
import grank_kernels.recommender.models.neighbours
import grank_kernels.recommender.models.registry
import grank_kernels.recommender.training.evaluation
"""


@pytest.mark.parametrize("name", MODELS)
def test_models_are_built_from_plain_values(name: str) -> None:
    settings = model_settings(name, {"dim": 8})
    assert isinstance(settings, MODELS[name].settings)
    model = build_model(name, 12, settings)
    assert isinstance(model, MODELS[name].model)
    assert model.item_vectors().shape == (12, 8)


def test_weights_follow_from_the_seed() -> None:
    built = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        built.append(build_model("sequential", 12, SequentialConfig(dim=8)).item_vectors())
    assert torch.equal(built[0], built[1])
    assert not torch.equal(built[0], built[2])


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("grnk", ""),
        (None, ""),
        (["grank"], ""),
        ("SASRec", "; SASRec is sequential with settings.backbone=transformer"),
        ("two-tower", "; two-tower is dual_tower"),
    ],
)
def test_an_unknown_model_is_refused(name: Any, hint: str) -> None:
    with pytest.raises(ValueError) as raised:
        model_class(name)
    assert str(raised.value) == f"model must be one of dual_tower, grank, sequential, unigrf, got {name!r}{hint}"


def test_settings_must_be_those_of_the_model() -> None:
    with pytest.raises(TypeError, match="settings of sequential must be SequentialConfig, got GRankConfig"):
        build_model("sequential", 12, GRankConfig())
    with pytest.raises(ValueError, match=r"settings\.dims is unknown, did you mean settings\.dim\?"):
        model_settings("grank", {"dims": 16})


def test_imports_need_no_trainer() -> None:
    done = subprocess.run([sys.executable, "-c", BLOCKED], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
