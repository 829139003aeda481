"""Experiments: YAML files and overrides, and the errors of what does not fit."""

from pathlib import Path
from random import Random

import pytest

from grank_kernels.recommender.models import GRankConfig
from grank_kernels.recommender.training.experiment import Experiment
from grank_kernels.recommender.training.settings import TrainingConfig

PATHS = ["20241129_0101", "007", "1e3", "0x10", "1:30", "yes", "${oc.env:HOME}"]


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
        ("data=ratings.csv", r"data is a section: an override must be data\.key=value, got 'data=ratings\.csv'"),
        ("settings=", "settings is a section"),
        ("training.epochs", r"an override must be section\.key=value, got 'training\.epochs'"),
        ("settings.dim=0", r"settings\.dim must be 1 or more, got 0"),
        ("settings.dropout=1", r"settings\.dropout must be 0 or more and below 1, got 1\.0"),
        ("settings.temperature=0", r"settings\.temperature must be above 0, got 0\.0"),
        ("settings.backbone=gru", r"settings\.backbone must be one of transformer, llama, hstu, got 'gru'"),
        ("settings.softmax=sampled", r"settings\.softmax must be one of corpus, batch, got 'sampled'"),
        ("training.learning_rate=1e38", r"training\.learning_rate must be above 0 and at most 1e\+30, got 1e\+38"),
        ("training.weight_decay=1e38", r"training\.weight_decay must be 0 or more and at most 1000000\.0, got 1e\+38"),
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


@pytest.mark.parametrize(
    "path", ["20241129_0101", "007", "1e3", "0x10", "1:30", "yes", "null", "${oc.env:HOME}", "a #1", "[x]"]
)
def test_a_path_is_taken_as_it_is(path: str, config: Path, tmp_path: Path) -> None:
    experiment = Experiment.load(config, [f"data.path={path}"])
    assert experiment.data.path == path
    experiment.save(tmp_path / "saved.yaml")
    assert Experiment.load(tmp_path / "saved.yaml") == experiment


@pytest.mark.parametrize("path", PATHS)
def test_a_path_in_a_file_needs_no_quotes(path: str, tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text(f"model: grank\ndata:\n  name: arrays\n  path: {path}\n")
    assert Experiment.load(tmp_path / "x.yaml").data.path == path


def test_numbers_are_read_as_they_are_written_in_yaml_and_elsewhere(config: Path) -> None:
    for text, value in (("1e-3", 1e-3), ("0.001", 1e-3), ("1", 1.0), ("2.5E-2", 0.025)):
        assert Experiment.load(config, [f"training.learning_rate={text}"]).training.learning_rate == value


def read_or_refused(path: Path) -> Experiment | None:
    try:
        return Experiment.load(path)
    except ValueError as error:
        if str(path) not in str(error):
            raise
        return None


@pytest.mark.slow
def test_damaged_experiment_files_are_refused_or_read_as_settings(config: Path, tmp_path: Path) -> None:
    """A fuzz target: no other error, no hang, whatever the bytes."""
    Experiment.load(config).save(tmp_path / "whole.yaml")
    whole, path, random = (tmp_path / "whole.yaml").read_bytes(), tmp_path / "fuzzed.yaml", Random(1)
    refused = 0
    for _ in range(3000):
        data = bytearray(whole)
        for _ in range(random.choice([1, 1, 2, 8])):
            at = random.randrange(len(data))
            action = random.randrange(4)
            if action == 0:
                data[at] = random.randrange(256)
            elif action == 1:
                del data[at : at + random.randrange(40)]
            elif action == 2:
                data[at:at] = random.choice(
                    [b"{", b"[", b"&a ", b"*a", b"!!python/name:os.system ", b"\0", b": ", b"? ", b"<<: "]
                )
            else:
                other = random.randrange(len(data))
                data[at:at] = data[other : other + 30]
            if not data:
                break
        path.write_bytes(data)
        loaded = read_or_refused(path)
        if loaded is None:
            refused += 1
        else:
            loaded.save(tmp_path / "again.yaml")
            assert Experiment.load(tmp_path / "again.yaml") == loaded
    assert 0 < refused < 3000
