"""A CSV of one's own, from the command line alone."""

import json
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
from own_tables import write_titles, write_walks
from pyarrow import csv, parquet
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


def test_recommends_with_titles(walks: Path) -> None:
    by_user = call("recommend", walks / "run", "--user", "u01", "--k1", 40, "--k2", 5).splitlines()
    assert by_user[0] == "14 items seen, last: Title 18, é; Title 19, é; Title 20, é"
    assert [line.split()[0] for line in by_user[1:]] == list("12345")
    assert all(line.split("  ")[-1] == f"Title {int(line.split()[2][1:])}, é" for line in by_user[1:])
    assert call("retrieve", walks / "run", "--user", "u01", "--k1", 40, "--k2", 5).splitlines() == by_user
    assert call("recommend", walks / "run", "--history", "B18,B19").startswith("2 items seen, last: Title 18, é; ")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ("--user", "u1"),
            "must be a user of walks.csv, got u1; the nearest are u21, u19, u18; --history ITEM,ITEM,...",
        ),
        (("--history", "B18,B7"), "histories: item B7 is not in the catalogue; the nearest are B37, B27, B17"),
        (("--user", "u01", "--only-file", "NONE"), "must leave an item of the catalogue, got none"),
    ],
)
def test_unknown_ids(
    options: tuple[str, ...],
    message: str,
    walks: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "none.csv").write_text("item\nB99\n")
    given = [tmp_path / "none.csv" if each == "NONE" else each for each in options]
    assert message in fails(capsys, monkeypatch, "recommend", walks / "run", *given)


@pytest.mark.parametrize("text", ["item\nB30\nB31\nB99\n", "B30\nB31\n", "title,sku\nx,B30\ny,B31\n"])
def test_stock_lists(text: str, walks: Path, tmp_path: Path) -> None:
    stock = tmp_path / "stock.csv"
    stock.write_text(text)
    only = call("recommend", walks / "run", "--user", "u01", "--only-file", stock).splitlines()
    assert {line.split()[2] for line in only[1:]} == {"B30", "B31"}
    without = call("recommend", walks / "run", "--user", "u01", "--exclude-file", stock, "--k2", 40).splitlines()
    assert {line.split()[2] for line in without[1:]} == {f"B{i:02}" for i in range(40)} - {
        *(f"B{i:02}" for i in range(7, 21)),
        *("B30", "B31"),
    }
    assert call("recommend", walks / "run", "--history", "", "--only-file", stock).count("B3") == 2


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_all_users_in_one_file(kind: str, walks: Path, tmp_path: Path) -> None:
    call("recommend", walks / "run", "--all-users", "--out", tmp_path / f"all.{kind}", "--batch", 8, "--k2", 3, "-q")
    file = tmp_path / f"all.{kind}"
    table = csv.read_csv(file) if kind == "csv" else parquet.read_table(file)
    assert table.column_names == ["user", "rank", "item", "score", "title"]
    assert table.column("user").to_pylist() == [f"u{user:02}" for user in range(30) for _ in range(3)]
    assert table.column("rank").to_pylist() == [1, 2, 3] * 30
    one = call("recommend", walks / "run", "--user", "u01", "--k2", 3).splitlines()[1:]
    assert table.column("item").to_pylist()[3:6] == [line.split()[2] for line in one]
    assert table.column("title").to_pylist()[3:6] == [line.split("  ")[-1] for line in one]


def test_refresh_offers_other_items_without_training(
    walks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run, items = tmp_path / "run", tmp_path / "new.csv"
    shutil.copytree(walks / "run", run)
    items.write_text("item,title\nB30,New title\nB31,Other\n")
    assert call("refresh", run, "--items", items) == "2 of 40 items are offered: 0 added, 38 removed\n"
    lines = call("recommend", run, "--user", "u01").splitlines()
    assert {line.split()[2] for line in lines[1:]} == {"B30", "B31"}
    assert "14 items seen, last: Title 18, é" in lines[0]  # histories keep what is no longer offered
    assert "New title" in "\n".join(lines)
    call("recommend", run, "--all-users", "--out", tmp_path / "all", "-q")
    assert set(parquet.read_table(tmp_path / "all")["items"].combine_chunks().flatten().to_pylist()) == {"B30", "B31"}
    items.write_text("B30\nB32\n")
    assert call("refresh", run, "--items", items) == "2 of 40 items are offered: 1 added, 1 removed\n"
    items.write_text("B30\nB77\n")
    error = fails(capsys, monkeypatch, "refresh", run, "--items", items)
    assert "got 1 others, e.g. B77: an item without events cannot be placed" in error


def test_evaluate_prints_a_table_or_json(walks: Path) -> None:
    report = json.loads(call("evaluate", walks / "run", "--json"))
    assert set(report["compared"]) == {"model", "popularity", "item_knn"}
    for metric, mean in report["compared"]["model"].items():
        if metric in report["retrieved"] and metric != "mrr":
            assert mean == pytest.approx(report["retrieved"][metric])
            paired = report["differences"]["popularity"][metric]["mean"]
            assert paired == pytest.approx(mean - report["compared"]["popularity"][metric])
    head, *rows, note = call("evaluate", walks / "run").splitlines()
    assert head.split() == ["HR@10", "NDCG@10", "RECALL@50", "MRR", "coverage@10"]
    assert [row.split("  ")[0] for row in rows[:3]] == ["model", "popularity", "item-kNN"]
    assert rows[3].startswith("model - ")
    assert note.startswith("means over 30 test users ± standard errors")


def test_a_training_leaves_pictures(walks: Path) -> None:
    assert (walks / "run" / "curves.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    page = (walks / "run" / "report.html").read_text()
    assert page.count("<table>") == 3
    assert "http" not in page
    assert re.search(r"<tr><td>11-20</td><td>30</td>", page)  # all histories have 13 items
    assert 'src="data:image/png;base64,' in page


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
