"""Experiments: what YAML may say, and a whole run from a file of arrays to a report."""

import json
from pathlib import Path

import numpy as np
import pytest

from grank_kernels.recommender.models import GRankConfig
from grank_kernels.recommender.training.evaluation import metrics, recommend
from grank_kernels.recommender.training.experiment import Experiment
from grank_kernels.recommender.training.run import evaluate, run
from grank_kernels.recommender.training.run_folder import load_model
from grank_kernels.recommender.training.settings import TrainingConfig

pytestmark = pytest.mark.usefixtures("one_thread")


def write_circle(path: Path, users: int = 30, items: int = 40, length: int = 16) -> Path:
    """Users who take the items in turns, each from a start of their own, and like every third."""
    who = np.arange(users).repeat(length)
    what = (7 * who + np.tile(np.arange(length), users)) % items
    np.savez(path, user=who + 100, item=what + 1, timestamp=np.arange(len(who)), rating=np.where(what % 3, 2.0, 5.0))
    return path


@pytest.fixture
def config(tmp_path: Path) -> Path:
    data = write_circle(tmp_path / "circle.npz")
    path = tmp_path / "grank.yaml"
    path.write_text(
        f"""
model: grank
settings: {{dim: 16, short_history: 8, long_history: 12, hidden: 16, negatives: 8}}
data: {{name: arrays, path: {data}}}
training: {{epochs: 2, targets: 8, context: 4, batch_items: 256, learning_rate: 0.01}}
k1: [20]
"""
    )
    return path


def test_yaml_and_overrides(config: Path) -> None:
    experiment = Experiment.load(config, ["training.epochs=7", "settings.ranker=false", "data.positive=2"])
    assert (experiment.training.epochs, experiment.settings.ranker, experiment.data.positive) == (7, False, 2.0)
    assert experiment.training.batch_items == 256
    assert experiment.settings.dim == 16
    assert experiment.k1 == (20,)


def test_what_is_saved_is_what_was(config: Path, tmp_path: Path) -> None:
    experiment = Experiment.load(config, ["training.patience=3"])
    experiment.save(tmp_path / "saved.yaml")
    assert Experiment.load(tmp_path / "saved.yaml") == experiment


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: grnk", "model must be one of dual_tower, grank, sequential, unigrf, got 'grnk'"),
        ("settings: {dim: 16}", "model must be one of .*, got None"),
        (
            "model: grank\nsettings: {dims: 16}",
            r"settings\.dims is unknown.* did you mean settings\.dim\?.* hidden",
        ),
        ("model: grank\nsettings: {dim: wide}", r"settings\.dim must be int, got 'wide'"),
        ("model: grank\nsetting: {dim: 16}", r"setting is unknown.* did you mean settings\?"),
        ("model: grank\nepochs: 3", r"epochs is unknown; did you mean training\.epochs\?"),
        ("model: grank\ntraining: {epochs: 1.5}", r"training\.epochs must be int, got '1\.5'"),
        ("model: grank\ntraining: {epochs: [3]}", r"training\.epochs must be a single value, got a list"),
        ("model: grank\ntraining: 3", "training must be a mapping of keys to values, got a str"),
        ("model: grank\nmodel: unigrf", "model must be given once, got it 2 times"),
        ("- grank", "the file must be a mapping of keys to values, got a list"),
        ("", "the file must be a mapping of keys to values, got a NoneType"),
        ("model: !!python/object/apply:os.system [true]", "could not determine a constructor for the tag"),
        ("[" * 2_000, "expected YAML, got too deep a nesting"),
        ("model: [grank", r"expected YAML, got .*line 1, column 14"),
    ],
)
def test_yaml_that_does_not_fit_is_refused(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "experiment.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=f"(?s){path}.*{message}"):
        Experiment.load(path)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.protocol=all", r"data\.protocol must be one of leave_one_out, half_and_half, got 'all'"),
        ("data.positive=nan", r"data\.positive must be finite, got nan"),
        ("training.epochs", r"an override must be section\.key=value, got 'training\.epochs'"),
        ("settings.dim=0", r"settings\.dim must be 1 or more, got 0"),
        ("settings.dropout=1", r"settings\.dropout must be 0 or more and below 1, got 1\.0"),
        ("settings.temperature=0", r"settings\.temperature must be above 0, got 0\.0"),
        ("settings.backbone=gru", r"settings\.backbone must be one of transformer, llama, hstu, got 'gru'"),
        ("settings.softmax=sampled", r"settings\.softmax must be one of corpus, batch, got 'sampled'"),
        ("training.epochs=-1", r"training\.epochs must be 1 or more, got -1"),  # the trainer's word for endless
        ("training.validate_every=3", r"training\.validate_every must be at most epochs, got 3 of 2"),
        ("training.monitor=hr@7", r"training\.monitor must be one of hr@10, .*, ranked_mrr, got 'hr@7'"),
        ("training.patience=-1", r"training\.patience must be 0 or more, got -1"),
        ("k1=[20,9]", r"k1 must hold ints of 10 or more, the first cut of the report, got \[20, 9\]"),
        ("k1=many", r"k1 must hold ints of 10 or more, .*, got \['many'\]"),
    ],
)
def test_values_that_a_setting_does_not_take_are_refused(override: str, message: str, config: Path) -> None:
    with pytest.raises(ValueError, match=f"{config}: {message}"):
        Experiment.load(config, [override])


def test_settings_of_other_types_are_refused() -> None:
    assert TrainingConfig(learning_rate=1).learning_rate == 1  # an int for a float
    for name, value, kind in (
        ("epochs", 2.0, "int"),
        ("epochs", True, "int"),
        ("clip", "1", "float"),
        ("seed", None, "int"),
    ):
        with pytest.raises(TypeError, match=f"{name} must be {kind}, got {value!r}"):
            TrainingConfig(**{name: value})
    with pytest.raises(TypeError, match="ranker must be bool, got 1"):
        GRankConfig(ranker=1)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"patience must be int \| None, got '3'"):
        TrainingConfig(patience="3")  # type: ignore[arg-type]


def test_one_k1_needs_no_brackets(config: Path) -> None:
    assert Experiment.load(config, ["k1=30"]).k1 == (30,)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nothing\.yaml"):
        Experiment.load(tmp_path / "nothing.yaml")


def test_a_whole_run(config: Path, tmp_path: Path) -> None:
    experiment, folder = Experiment.load(config), tmp_path / "run"
    report = run(experiment, folder, progress=False)
    assert json.loads((folder / "report.json").read_text()) == report
    assert set(report) >= {"users", "retrieved", "ranked_20", "auc", "seconds", "threads", "machine"}
    assert Experiment.load(folder / "experiment.yaml") == experiment
    split = experiment.data.split(experiment.data.read())
    model = load_model(folder, split.num_items)
    found = recommend(model, split.test, 20)
    assert found.ranked is not None
    assert metrics(found.ranked, split.test.targets, (10,))["hr@10"] == report["ranked_20"]["hr@10"]
    assert evaluate(experiment, model, split)["retrieved"] == report["retrieved"]

    # The same again finds everything done; another experiment is refused, and the folder is as it was.
    again = run(experiment, folder, progress=False)
    assert again["retrieved"] == report["retrieved"]
    with pytest.raises(ValueError, match=r"run with another one: training.epochs is 2 there, 3 here"):
        run(Experiment.load(config, ["training.epochs=3"]), folder, progress=False)
    assert Experiment.load(folder / "experiment.yaml") == experiment
