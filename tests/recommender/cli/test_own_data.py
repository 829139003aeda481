"""A CSV of one's own, from the command line alone."""

import json
import sys
from pathlib import Path

import pytest
import torch
from own_tables import write_titles, write_walks
from typer.testing import CliRunner

from grank_kernels.recommender.cli import main as cli
from grank_kernels.recommender.cli.commands import app
from grank_kernels.recommender.data.own_file import understand
from grank_kernels.recommender.training.experiment import DataConfig, Experiment
from grank_kernels.recommender.training.sizing import experiment_for

QUICK = ("training.epochs=2", "settings.dim=8", "settings.history=8")


@pytest.fixture(scope="module")
def walks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `walks.csv`, `titles.csv` and the finished `run`. Tests only read it."""
    folder = tmp_path_factory.mktemp("walks")
    threads = torch.get_num_threads()
    call(
        "train",
        write_walks(folder / "walks.csv"),
        folder / "run",
        *QUICK,
        "--items",
        write_titles(folder / "titles.csv"),
        "-q",
        "--threads",
        1,
    )
    torch.set_num_threads(threads)
    return folder


def call(*arguments: object) -> str:
    done = CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.stdout


def fails(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: object) -> str:
    """Standard error of the console command, which ends with status 1."""
    monkeypatch.setattr(sys, "argv", ["grank", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 1
    return capsys.readouterr().err


def test_inspect(walks: Path) -> None:
    facts = json.loads(call("inspect", walks / "walks.csv", "--json", "--items", walks / "titles.csv"))
    assert (facts["users"], facts["items"], facts["events"], facts["dropped"]) == (30, 40, 420, {})
    assert (facts["first"], facts["last"]) == ("2023-11-14T22:13:20Z", "2023-11-15T05:12:20Z")
    assert facts["sample"] == {"user": "u00", "item": "B00", "time": "1700000000", "rating": "1"}
    said = call("inspect", walks / "walks.csv").splitlines()
    assert len(said) == 5
    assert said[1].startswith("420 events of 30 users and 40 items")


def test_columns_by_option(
    walks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    strange = tmp_path / "strange.csv"
    strange.write_text((walks / "walks.csv").read_text().replace("user,item,timestamp,rating", "who,what,when,how"))
    options = ("--user-column", "who", "--item-column", "what", "--time-column", "when", "--rating-column", "how")
    assert json.loads(call("inspect", strange, "--json", *options))["columns"]["rating"] == "how"
    error = fails(capsys, monkeypatch, "inspect", strange)
    assert "got columns who, what, when, how; name it by --user-column, --item-column" in error


def test_a_run_of_an_own_file_records_how_it_was_read(
    walks: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    experiment = Experiment.load(walks / "run" / "experiment.yaml")
    assert experiment.data.name == "own"
    assert experiment.data.titles == str(walks / "titles.csv")
    assert experiment.training.epochs == 2
    error = fails(
        capsys,
        monkeypatch,
        "train",
        walks / "walks.csv",
        walks / "run",
        *QUICK[1:],
        "--items",
        walks / "titles.csv",
        "-q",
    )
    assert "with another one: training.epochs is 2 there, 40 here" in error


def test_settings_by_size(walks: Path, tmp_path: Path) -> None:
    small = experiment_for(understand(walks / "walks.csv"), DataConfig("own", "x"))
    assert (small.settings.dim, small.settings.history, small.settings.softmax) == (32, 16, "corpus")
    assert (small.training.epochs, small.data.positive) == (40, 4.0)
    rows = "".join(f"{user},{60 * user + k},{user + k},{k % 101}\n" for user in range(1000) for k in range(60))
    (tmp_path / "large.csv").write_text("user,item,time,rating\n" + rows)
    large = experiment_for(understand(tmp_path / "large.csv"), DataConfig("own", "x"))
    assert (large.settings.dim, large.settings.history, large.settings.softmax) == (64, 64, "batch")
    assert (large.training.epochs, large.data.positive) == (10, 29.0)  # the median of ratings from 0 to 59
    assert large.overridden(["model=grank", "settings.blocks=1"]).settings.blocks == 1
