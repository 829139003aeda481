"""Runs: from a file to a report, what the folder records, and which changes of data and settings are refused."""

import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pyarrow import parquet
from tiny_runs import write_circle

from grank_kernels.recommender.data import Interactions
from grank_kernels.recommender.training import run as run_module
from grank_kernels.recommender.training.data_record import checked_data, save_data
from grank_kernels.recommender.training.evaluation import metrics, recommend
from grank_kernels.recommender.training.experiment import Experiment
from grank_kernels.recommender.training.run import evaluate, evaluate_run, run
from grank_kernels.recommender.training.run_folder import check_run, load_model, locked

pytestmark = pytest.mark.usefixtures("one_thread")


def report_of(folder: Path) -> dict[str, Any]:
    report: dict[str, Any] = json.loads((folder / "report.json").read_text())
    return report


def with_data(folder: Path, data: Path) -> Path:
    """The run in a folder, as if its data file had been replaced by `data`."""
    experiment = Experiment.load(folder / "experiment.yaml")
    replace(experiment, data=replace(experiment.data, path=str(data))).save(folder / "experiment.yaml")
    return folder


# ---- a whole run ----


def test_the_report_is_that_of_the_best_epoch(finished: Path) -> None:
    folder = finished / "run"
    report, experiment = report_of(folder), Experiment.load(folder / "experiment.yaml")
    assert set(report) >= {"users", "retrieved", "ranked_20", "auc", "seconds", "threads", "machine"}
    assert "incomplete" not in report
    split = experiment.data.split(experiment.data.read())
    model = load_model(folder, split.num_items)
    found = recommend(model, split.test, 20)
    assert found.ranked is not None
    assert metrics(found.ranked, split.test.targets, (10,))["hr@10"] == report["ranked_20"]["hr@10"]
    assert evaluate(experiment, model, split)["retrieved"] == report["retrieved"]
    assert evaluate_run(folder)["retrieved"] == report["retrieved"]


def test_the_folder_records_items_and_facts_of_the_data(finished: Path) -> None:
    items = parquet.read_table(finished / "run" / "items.parquet")
    assert items.column_names == ["id"]  # arrays have no titles
    assert items["id"].to_pylist() == list(range(1, 41))
    facts = json.loads((finished / "run" / "data.json").read_text())
    digest = facts.pop("xxh3_128")
    assert len(bytes.fromhex(digest)) == 16
    assert facts == {
        "users": 30,
        "items": 40,
        "rows": 480,
        "user_ids": "integers",
        "item_ids": "integers",
        "ratings": True,
        "behaviours": False,
    }


def test_titles_are_recorded(tmp_path: Path) -> None:
    titled = Interactions.from_columns(["u", "v"], ["b", "a"], titles={"a": "Alpha"})
    save_data(tmp_path, titled)
    assert parquet.read_table(tmp_path / "items.parquet").to_pydict() == {
        "id": ["a", "b"],
        "title": ["Alpha", "item b"],
    }
    assert checked_data(tmp_path, titled) is titled


def test_a_finished_run_is_not_trained_again(trained: Path, finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (trained / "best.ckpt").read_bytes()
    again = run(Experiment.load(finished / "grank.yaml"), trained)
    assert again["retrieved"] == report_of(finished / "run")["retrieved"]
    assert (trained / "best.ckpt").read_bytes() == before
    output, errors = capsys.readouterr()
    assert output == ""
    assert errors == f"nothing to train: the run in {trained} is finished\n"


@pytest.mark.parametrize(
    ("override", "difference"),
    [
        ("training.seed=1", "training.seed is 0 there, 1 here"),
        ("training.learning_rate=0.02", "training.learning_rate is 0.01 there, 0.02 here"),
        ("training.targets=7", "training.targets is 8 there, 7 here"),
        ("settings.dim=32", "settings.dim is 16 there, 32 here"),
        ("data.positive=2", "data.positive is 4.0 there, 2.0 here"),
        ("k1=[30]", r"k1 is \[20\] there, \[30\] here"),
    ],
)
def test_another_experiment_is_refused(override: str, difference: str, trained: Path, finished: Path) -> None:
    before = (trained / "experiment.yaml").read_text()
    with pytest.raises(ValueError, match=f"run with another one: {difference}$"):
        run(Experiment.load(finished / "grank.yaml", [override]), trained, progress=False)
    assert (trained / "experiment.yaml").read_text() == before


def test_one_process_trains_in_a_folder(
    config: Path, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two would mix their files: settings of one, weights of the other."""
    experiment = Experiment.load(config)
    (tmp_path / "new").mkdir()
    for folder, one in ((tmp_path / "new", experiment), (trained, Experiment.load(trained / "experiment.yaml"))):
        before = {path: path.read_bytes() for path in folder.glob("*.*")}
        with locked(folder), pytest.raises(ValueError, match=r"folder must not be in use, got .* another process"):
            run(one, folder, progress=False)
        assert {path: path.read_bytes() for path in folder.glob("*.*")} == before
    with locked(trained), monkeypatch.context() as other_rank:
        other_rank.setenv("LOCAL_RANK", "1")  # of the run that has the lock
        with locked(trained):
            pass


def test_a_run_that_was_finished_meanwhile_is_not_overwritten(
    config: Path, trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = iter([False, True])  # before and after the folder was locked
    monkeypatch.setattr(run_module, "has_started", lambda folder: next(answers))
    before = (trained / "best.ckpt").read_bytes()
    with pytest.raises(ValueError, match="where another process has trained meanwhile"):
        run(Experiment.load(config), trained, progress=False)
    assert (trained / "best.ckpt").read_bytes() == before


# ---- data that has changed ----


@pytest.fixture
def renamed(tmp_path: Path) -> Path:
    """One item has gone and one has come; all item numbers but the last shift."""
    return write_circle(tmp_path / "renamed.npz", renamed={1: 99})


def test_a_run_finds_its_data_from_any_folder(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, finished: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    experiment = Experiment.load(config, ["data.path=circle.npz", "training.epochs=1"])
    report = run(experiment, "run", progress=False)
    monkeypatch.chdir(finished)
    assert evaluate_run(tmp_path / "run")["retrieved"] == report["retrieved"]
    moved = Path(os.rename(tmp_path / "circle.npz", tmp_path / "moved.npz") or tmp_path / "moved.npz")
    run(replace(experiment, data=replace(experiment.data, path=str(moved))), tmp_path / "run", progress=False)
    assert evaluate_run(tmp_path / "run")["retrieved"] == report["retrieved"]


def test_changed_data_is_refused(trained: Path, finished: Path, renamed: Path) -> None:
    experiment = Experiment.load(finished / "grank.yaml", [f"data.path={renamed}"])
    before = (trained / "report.json").read_bytes()
    changes = r"1 items are gone \(1\), 1 items are new \(99\); data_changed=True \(--data-changed\)"
    with pytest.raises(ValueError, match=changes):
        run(experiment, trained, progress=False)
    with pytest.raises(ValueError, match=changes):
        evaluate_run(with_data(trained, renamed))
    assert (trained / "report.json").read_bytes() == before


def test_changed_data_is_evaluated_on_the_items_that_both_have(trained: Path, finished: Path, renamed: Path) -> None:
    changed = evaluate_run(with_data(trained, renamed), data_changed=True)
    experiment = Experiment.load(trained / "experiment.yaml")
    same = experiment.data.read()
    assert same.num_items == 40
    # By hand: the file without the item, in the numbers of the run, and a corpus without it.
    whole = np.load(finished / "circle.npz")
    kept = whole["item"] != 1
    rest = Interactions.from_columns(*(whole[name][kept] for name in ("user", "item", "timestamp", "rating")))
    split = experiment.data.split(replace(rest, items=rest.items + 1, item_ids=np.arange(1, 41)))
    model = load_model(trained, 40)
    allow = torch.arange(40) > 0
    assert changed["retrieved"] == evaluate(experiment, model, split, allow=allow)["retrieved"]
    assert changed["users"] == 30
    assert run(experiment, trained, data_changed=True, progress=False)["retrieved"] == changed["retrieved"]


def test_ids_below_and_above_2_to_63_stay_exact(tmp_path: Path) -> None:
    ids = np.array([1, 2**63 + 1, 2**63 + 3], np.uint64)  # as floats the last two would be equal
    save_data(tmp_path, Interactions.from_columns([1, 1, 2], ids))
    now = Interactions.from_columns([1, 1, 2, 2], np.append(ids, np.uint64(5)))
    changed = checked_data(tmp_path, now, data_changed=True)
    assert changed.item_ids.tolist() == ids.tolist()
    assert changed.item_ids.dtype == np.uint64
    assert changed.item_ids[changed.items.numpy()].tolist() == ids.tolist()


@pytest.mark.parametrize(
    ("column", "change", "words"),
    [
        ("rating", lambda x: 7 - x, "as many users, items and rows, with other values"),
        ("timestamp", lambda x: 2 * x, "as many users, items and rows, with other values"),
        ("user", lambda x: x + 1000 * (x == 100), "as many users, items and rows, with other values"),
        ("item", lambda x: x.astype(str), r"40 items are gone \(1, 10, 11, \.\.\.\), .*item_ids integers before"),
        (None, lambda x: x[:-1], "rows 480 before and 479 now"),
    ],
)
def test_every_change_of_the_data_is_noticed(
    column: str | None, change: Any, words: str, trained: Path, finished: Path
) -> None:
    whole = dict(np.load(finished / "circle.npz"))
    columns = {name: change(x) if column in (None, name) else x for name, x in whole.items()}
    given = [columns[name] for name in ("user", "item", "timestamp", "rating")]
    with pytest.raises(ValueError, match=words):
        checked_data(trained, Interactions.from_columns(*given))
    rows = np.random.default_rng(0).permutation(len(whole["user"]))  # the order of the rows is no change
    whole = {name: x[rows] for name, x in whole.items()}
    same = Interactions.from_columns(*(whole[name] for name in ("user", "item", "timestamp", "rating")))
    assert checked_data(trained, same) is same


@pytest.mark.parametrize("name", ["data.json", "items.parquet", "best.ckpt", "experiment.yaml"])
@pytest.mark.parametrize("damage", ["gone", "empty", "foreign"])
def test_damaged_files_are_refused_by_name(name: str, damage: str, trained: Path, renamed: Path) -> None:
    with_data(trained, renamed)
    (trained / name).unlink()
    if damage != "gone":
        (trained / name).write_bytes(b"" if damage == "empty" else b'[{"a": 5}]')
    with pytest.raises((FileNotFoundError, ValueError), match=name.replace(".", r"\.")):
        evaluate_run(trained, data_changed=name != "data.json")


# ---- starts that fail ----


def write_rows(path: Path, users: list[int], items: list[int]) -> Path:
    np.savez(path, user=np.array(users), item=np.array(items), timestamp=np.arange(len(users)))
    return path


@pytest.mark.parametrize(
    ("rows_each", "users", "message"),
    [
        (1, 200, "train must have a history of 2 items or more"),
        (2, 200, "validation must have a case"),
        (2, 1, "valid"),
    ],
)
def test_too_little_data_is_refused_before_training(
    rows_each: int, users: int, message: str, config: Path, tmp_path: Path
) -> None:
    who = [user for user in range(users) for _ in range(rows_each)]
    data = write_rows(tmp_path / "few.npz", who, [7 * row % 90 for row in range(len(who))])
    with pytest.raises(ValueError, match=message):
        run(Experiment.load(config, [f"data.path={data}"]), tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()
    run(Experiment.load(config, ["training.epochs=1"]), tmp_path / "run", progress=False)


def test_a_corpus_of_few_items_has_a_report(config: Path, tmp_path: Path) -> None:
    data = write_circle(tmp_path / "few.npz", items=8, length=5)
    report = run(Experiment.load(config, [f"data.path={data}", "training.epochs=1"]), tmp_path / "run", progress=False)
    assert report["retrieved"]["hr@10"] == 1.0  # 8 items, of which 4 were seen


def test_a_missing_file_leaves_no_folder(config: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nothing\.npz"):
        run(Experiment.load(config, [f"data.path={tmp_path / 'nothing.npz'}"]), tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()


def test_a_run_without_a_finished_epoch_is_replaced(config: Path, tmp_path: Path) -> None:
    with pytest.raises(FloatingPointError, match=r"retrieval is nan after epoch 1 of 2: .*learning_rate=1e\+30"):
        run(Experiment.load(config, ["training.learning_rate=1e30"]), tmp_path / "run", progress=False)
    with pytest.raises(FileNotFoundError, match="has no weights yet"):
        check_run(tmp_path / "run")
    run(Experiment.load(config, ["training.epochs=1"]), tmp_path / "run", progress=False)
    assert Experiment.load(tmp_path / "run" / "experiment.yaml").training.learning_rate == 0.01


# ---- output ----


def test_progress_is_on_standard_error(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(Experiment.load(config), tmp_path / "run")
    output, errors = capsys.readouterr()
    assert output == ""
    lines = errors.splitlines()
    assert [line.split(":")[0] for line in lines] == ["epoch 1/2", "epoch 2/2"]
    assert all("retrieval " in line and "ndcg@10 0." in line for line in lines)


def test_a_terminal_gets_one_bar(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    run(Experiment.load(config), tmp_path / "run")
    output, errors = capsys.readouterr()
    assert output == ""
    assert errors.count("\n") == 1
    last = errors.strip().split("\r")[-1]
    assert "epoch 2/2: 100%" in last
    assert "retrieval=" in last
    assert "ndcg@10=0." in last


def test_a_process_without_standard_streams_trains(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)
    assert run(Experiment.load(config, ["training.epochs=1"]), tmp_path / "run")["users"] == 30


def test_the_report_is_written_as_it_grows(trained: Path, finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = []
    real = run_module.write_text

    def record(path: Path, text: str) -> None:
        written.append(json.loads(text))
        real(path, text)

    monkeypatch.setattr(run_module, "write_text", record)
    monkeypatch.setattr(run_module, "_SECONDS", -1.0)
    report = run(Experiment.load(finished / "grank.yaml"), trained, progress=False)
    assert [entry.get("incomplete", False) for entry in written] == [True, False]  # one batch of users
    assert written[0]["retrieved"] == report["retrieved"] == written[1]["retrieved"]
    assert written[1] == report_of(trained)
