"""The commands: what they print, and the status that they end with."""

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from oracle import run_python
from tiny_runs import write_circle
from typer.testing import CliRunner

from grank_kernels import __version__
from grank_kernels.recommender.cli import commands
from grank_kernels.recommender.cli import main as cli
from grank_kernels.recommender.cli.commands import app
from grank_kernels.recommender.data.histories import Histories
from grank_kernels.recommender.models.sequential import SequentialConfig
from grank_kernels.recommender.serving.catalogue import Catalogue
from grank_kernels.recommender.serving.retriever import Retriever
from grank_kernels.recommender.training.experiment import Experiment

pytestmark = pytest.mark.usefixtures("one_thread", "signals")


@pytest.fixture
def signals() -> Iterator[None]:
    """The console command sets its own handler of Ctrl-C."""
    handler = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, handler)


@pytest.fixture
def config(finished: Path) -> Path:
    return finished / "grank.yaml"


@pytest.fixture
def trained(finished: Path) -> Path:
    return finished / "run"


def call(*arguments: object) -> str:
    done = CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.stdout


def fails(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: object) -> tuple[int, str]:
    """Status and standard error of the console command."""
    monkeypatch.setattr(sys, "argv", ["grank", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert isinstance(stop.value.code, int)
    return stop.value.code, capsys.readouterr().err


def test_train_evaluate_export_retrieve(config: Path, trained: Path, tmp_path: Path) -> None:
    out = call("train", config, tmp_path / "run", "training.seed=1", "--json", "-q")
    report = json.loads(out)
    assert report["users"] == 30
    assert json.loads(call("evaluate", tmp_path / "run", "--json"))["retrieved"] == report["retrieved"]

    by_user = call("retrieve", trained, "--user", 103, "--k1", 20, "--k2", 5).splitlines()
    history = ",".join(str((7 * 3 + t) % 40 + 1) for t in range(16))
    assert len(by_user) == 6
    assert by_user[0] == "16 items seen, last: 35; 36; 37"
    call("export", trained, tmp_path / "saved", "--dtype", "bfloat16")
    by_history = call("retrieve", tmp_path / "saved", "--history", history, "--k1", 20, "--k2", 5).splitlines()
    assert by_history[0] == by_user[0]
    assert not {line.split()[2] for line in by_user[1:] + by_history[1:]} & set(history.split(","))
    assert len(call("retrieve", tmp_path / "saved", "--user", 103).splitlines()) == 11
    assert call("retrieve", trained, "--history", "").startswith("0 items seen, last: none\n")


def changed(finished: Path, folder: Path, item: int) -> tuple[Path, Path]:
    """A copy of the run whose data file has another item in the place of item 1, and the copy of the data."""
    shutil.copytree(finished / "run", folder / "run")
    write_circle(folder / "circle.npz", renamed={1: item})
    experiment = Experiment.load(finished / "run" / "experiment.yaml")
    replace(experiment, data=replace(experiment.data, path=str(folder / "circle.npz"))).save(
        folder / "run" / "experiment.yaml"
    )
    return folder / "run", folder / "circle.npz"


def test_a_run_recommends_its_own_items_whatever_the_data_holds_now(finished: Path, tmp_path: Path) -> None:
    run, data = changed(finished, tmp_path, 0)  # an item before all others: every number is another item's
    before, after = (call("retrieve", folder, "--history", "10,13") for folder in (finished / "run", run))
    assert after == before
    done = CliRunner().invoke(app, ["retrieve", str(run), "--user", "105"], catch_exceptions=False)
    assert "1 of 40 items of the data set are not in the catalogue" in done.stderr
    assert done.stdout.startswith("15 items seen, last: 9; 10; 11\n")  # of 16
    data.unlink()
    assert call("retrieve", run, "--history", "10,13") == before


def test_changed_data_is_evaluated_and_trained_on_only_if_asked_for(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run, _ = changed(finished, tmp_path, 99)
    for arguments in (("evaluate", run), ("train", run / "experiment.yaml", run)):
        status, error = fails(capsys, monkeypatch, *arguments)
        assert status == 1
        assert "1 items are gone (1), 1 items are new (99)" in error
        assert "--data-changed" in error
    assert json.loads(call("evaluate", run, "--json", "--data-changed"))["users"] <= 30


@pytest.mark.parametrize(
    ("ids", "history", "seen"),
    [
        ([-5, 7, -1, 2**62], "-5,-1", "-5; -1"),
        ([-5, 7, -1, 2**62], "[-5, 4611686018427387904]", "-5; 4611686018427387904"),
        (["a,b", "c", "[d", "é"], '["a,b", "[d"]', "a,b; [d"),
        (["a,b", "c", "[d", "é"], " c , é", "c; é"),
        ([2**63 + 1, 1, 2, 3], "9223372036854775809", "9223372036854775809"),
    ],
)
def test_histories_of_ids_of_every_kind(ids: list[object], history: str, seen: str, tmp_path: Path) -> None:
    experiment = Experiment("sequential", SequentialConfig(dim=4, history=3))
    Retriever(experiment.build(4), Catalogue(ids), experiment=experiment).save(tmp_path / "saved")
    lines = call("retrieve", tmp_path / "saved", "--history", history).splitlines()
    assert lines[0].endswith(f"items seen, last: {seen}")
    assert sorted([*seen.split("; "), *(line.split()[2] for line in lines[1:])]) == sorted(map(str, ids))


def test_titles_cannot_control_the_terminal(tmp_path: Path) -> None:
    experiment = Experiment("sequential", SequentialConfig(dim=4, history=3))
    catalogue = Catalogue(["a", "b\x1b]0;owned\x07"], ["Amélie", "Heat\x1b[2J\nCasino"])
    Retriever(experiment.build(2), catalogue, experiment=experiment).save(tmp_path / "saved")
    first, second = call("retrieve", tmp_path / "saved", "--history", "a").splitlines()
    assert first == "1 items seen, last: Amélie"
    assert second.endswith(r"b\x1b]0;owned\x07  Heat\x1b[2J\nCasino")


def test_without_a_history_popular_items_are_marked(tmp_path: Path) -> None:
    experiment = Experiment("sequential", SequentialConfig(dim=4, history=3))
    model = experiment.build(4)
    model.observe(Histories.from_lists([[2, 3], [2], [1, 2]]))
    Retriever(model, Catalogue([10, 11, 12, 13], ["A", "B", "C", "D"]), experiment=experiment).save(tmp_path / "saved")
    lines = call("retrieve", tmp_path / "saved", "--history", "", "--k2", 3).splitlines()
    assert lines[1] == "no history: the most popular items, with their number of interactions as score"
    assert [line.split() for line in lines[2:]] == [
        ["1", "3.0000", "12", "C"],
        ["2", "1.0000", "11", "B"],
        ["3", "1.0000", "13", "D"],
    ]
    assert "no history" not in call("retrieve", tmp_path / "saved", "--history", "10")


@pytest.mark.parametrize("source", ["run", "synthetic"])
def test_bench_retriever(source: str, trained: Path, tmp_path: Path) -> None:
    subject = [trained] if source == "run" else ["--items", 500, "--dim", 16, "--dtype", "int8"]
    numbers = ("--k1", 20, "--k2", 10, "--requests", 4, "--warm-up", 1, "--batch", 1, "--batch", 3)
    out = call("bench-retriever", *subject, *numbers, "--json", tmp_path / "report.json")
    record = json.loads((tmp_path / "report.json").read_text())
    assert record["items"] == (40 if source == "run" else 500)
    assert record["dtype"] == ("torch.float32" if source == "run" else "torch.int8")
    rows = [(row["batch"], row["stage"]) for row in record["report"]]
    assert rows == [(batch, stage) for batch in (1, 3) for stage in ("encode", "search", "rank", "retrieve")]
    for row, line in zip(record["report"], out.splitlines()[1:], strict=True):
        assert 0 < row["p50"] <= row["p99"]
        assert line.split()[:2] == [str(row["batch"]), row["stage"]]


def test_doctor_help_and_version() -> None:
    assert "backend cpu: can run" in call("doctor")
    out = call("--help")
    for command in ("inspect", "train", "evaluate", "export", "recommend", "retrieve", "bench-retriever", "doctor"):
        assert command in out
    assert call("-h") == out
    assert "Number of torch threads" in call("train", "-h")
    assert call("--version") == f"grank {__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("train", "nothing.yaml", "run"), "nothing.yaml"),
        (("train", "CONFIG", "run", "--data", "20241129_0101"), "20241129_0101 does not exist: data.path (--data)"),
        (("train", "CONFIG", "run", "--data", "007"), "007 does not exist"),
        (("train", "CONFIG", "run", "--data", "${oc.env:HOME}"), "${oc.env:HOME} does not exist"),
        (("train", "EMPTY", "run"), "empty"),
        (("evaluate", "nothing"), "folder must be the folder of a run, got nothing, which does not exist"),
        (("evaluate", "EMPTY"), "empty without experiment.yaml"),
        (("export", "nothing", "to"), "folder must be the folder of a run, got nothing, which does not exist"),
        (("export", "RUN", "EMPTY/../grank.yaml"), "grank.yaml: path must be new or an empty folder"),
        (("retrieve", "EMPTY", "--history", "1"), "folder must be the folder of a run, got"),
        (("retrieve", "BEGUN", "--history", "1"), "has no weights yet: best"),
        (("retrieve", "RUN", "--all-users", "--out", "CONFIG"), "grank.yaml must be a folder, got a file"),
        (
            ("retrieve", "RUN", "--history", "1,999"),
            "histories: item 999 is not in the catalogue; the nearest are ",
        ),
        (
            ("retrieve", "RUN", "--history", "one"),
            "--history must be an integer, as the ids of the data set, got 'one'",
        ),
        (
            ("retrieve", "RUN", "--history", "1_0"),
            "--history must be an integer, as the ids of the data set, got '1_0'",
        ),
        (("retrieve", "RUN", "--user", "-7"), "--user must be a user of arrays, got -7; the nearest are"),
        (("train", "CONFIG", "RUN", "training.epochs=9"), "with another one: training.epochs is 2 there, 9 here"),
        (("train", "CONFIG", "RUN", "training.epoch=9"), "training.epoch is unknown, did you mean training.epochs?"),
    ],
)
def test_errors_are_one_line_and_status_1(
    arguments: tuple[str, ...],
    message: str,
    finished: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    places = {"RUN": finished / "run", "CONFIG": finished / "grank.yaml"}
    for name in ("EMPTY", "BEGUN"):
        places[name] = tmp_path / name.lower()
        places[name].mkdir()
    (tmp_path / "grank.yaml").touch()
    shutil.copy(finished / "run" / "experiment.yaml", places["BEGUN"])
    given = [re.sub("EMPTY|BEGUN|RUN|CONFIG", lambda found: str(places[found[0]]), argument) for argument in arguments]
    status, error = fails(capsys, monkeypatch, *given)
    assert status == 1
    assert error.startswith("grank: ")
    assert error.count("\n") == 1
    assert "Errno" not in error
    assert message in error


@pytest.mark.parametrize(
    "arguments",
    [
        ("retrieve", "RUN"),
        ("retrieve", "RUN", "--user", "1", "--history", "1"),
        ("retrieve", "RUN", "--user", "1", "--all-users", "--out", "nowhere"),
        ("retrieve", "RUN", "--all-users"),
        ("retrieve", "RUN", "--user", "1", "--out", "nowhere"),
        ("retrieve", "RUN", "--all-users", "--out", "nowhere", "--only-file", "x"),
        ("train", "CONFIG", "nowhere", "--items", "x"),
        ("train", "walks.csv", "nowhere", "--data", "x"),
        ("retrieve", "RUN", "--user", "1", "--k1", "0"),
        ("retrieve", "RUN", "--user", "1", "--k1", "5", "--k2", "6"),
        ("retrieve", "RUN", "--user", "103", "--dtype", "int4"),
        ("retrieve", "RUN", "--history", "[1, 2"),
        ("bench-retriever",),
        ("bench-retriever", "--items", "9", "--k1", "5", "--k2", "6"),
        ("reprieve",),
    ],
)
def test_wrong_usage_is_status_2(
    arguments: tuple[str, ...], trained: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    places = {"RUN": trained, "CONFIG": trained.parent / "grank.yaml"}
    given = [places.get(argument, argument) for argument in arguments]
    status, error = fails(capsys, monkeypatch, *given)
    assert status == 2
    assert "Usage: grank" in error


EARLY = """
import sys
from grank_kernels.recommender.cli.main import main
for arguments in {commands!r}:
    sys.argv = ["grank", *arguments]
    try:
        main()
    except SystemExit as stop:
        print(stop.code, file=sys.stderr)
print("imported:", *({modules!r} & set(sys.modules)), file=sys.stderr)
"""


def test_help_and_errors_import_no_trainer(finished: Path) -> None:
    """In one process: a later command would have imported it for good."""
    commands = [("--help",), ("retrieve", "--help"), ("--version",), ("nosuch",), ("retrieve", "x", "--k1", "0")]
    commands += [("train", "nosuch.yaml", "run"), ("evaluate", "nothing"), ("export", "nothing", "to")]
    commands += [("retrieve", "nothing", "--history", "1"), ("bench-retriever", "nothing")]
    modules = {"lightning", "torchmetrics", "rich", "pyarrow", "pandas", "scipy", "sympy", "torch.distributed.tensor"}
    done = run_python(EARLY.format(commands=commands, modules=modules))
    lines = done.stderr.splitlines()
    assert [line for line in lines if line.isdecimal()] == [*"00022", *"11111"]
    assert lines[-1] == "imported:"


def test_the_package_is_the_same_program() -> None:
    done = run_python(
        "import runpy, sys; sys.argv[1:] = ['--version']; runpy.run_module('grank_kernels', run_name='__main__')"
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, f"grank {__version__}\n", "")


def run_main(monkeypatch: pytest.MonkeyPatch, command: Callable[[], None]) -> int:
    """Exit status of the console command whose work is `command`."""

    def app(prog_name: str) -> None:
        command()
        sys.exit(0)

    monkeypatch.setattr(commands, "app", app)
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert isinstance(stop.value.code, int)
    return stop.value.code


def test_a_terminal_without_unicode_shows_escapes(monkeypatch: pytest.MonkeyPatch) -> None:
    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", out)
    assert run_main(monkeypatch, lambda: print("Amélie")) == 0
    out.seek(0)
    assert out.read() == "Am\\xe9lie\n"


def test_a_reader_that_goes_early_is_no_message(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    read, write = os.pipe()
    os.close(read)
    with open(write, "w") as out:
        monkeypatch.setattr(sys, "stdout", out)
        assert run_main(monkeypatch, lambda: print("a line")) == 1
        monkeypatch.undo()
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (FileNotFoundError(2, "No such file or directory", "data/x"), "data/x: No such file or directory"),
        (OSError(28, "No space left on device"), "No space left on device"),
        (ValueError("k must be 1 or more,\n  got 0"), "k must be 1 or more, got 0"),
        (MemoryError(), "MemoryError"),
        (
            ModuleNotFoundError("No module named 'typer'", name="typer"),
            "typer is not installed: pip install 'grank-kernels[train]'",
        ),
    ],
)
def test_messages_are_words(
    error: Exception, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def command() -> None:
        raise error

    assert run_main(monkeypatch, command) == 1
    assert capsys.readouterr().err == f"grank: {message}\n"
    if not isinstance(error, ModuleNotFoundError):
        monkeypatch.setenv("GRANK_TRACEBACK", "1")
        with pytest.raises(type(error)):
            cli.main()


# ---- Ctrl-C ----


def test_an_interrupted_command_is_status_130(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted() -> str:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(60)
        return "not interrupted"

    monkeypatch.setattr("grank_kernels.doctor.show_config", interrupted)
    assert fails(capsys, monkeypatch, "doctor") == (130, "grank: interrupted\n")


IMPORTS = """
import os, signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)
class Interrupt:
    def find_spec(self, name, path=None, target=None):
        if name == {name!r}:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(60)
sys.meta_path.insert(0, Interrupt())
sys.argv = ["grank", *{arguments!r}]
import grank_command
grank_command.main()
"""


@pytest.mark.parametrize("name", ["torch", "lightning"])
def test_interrupted_imports_are_one_line_and_status_130(name: str, config: Path, tmp_path: Path) -> None:
    done = run_python(IMPORTS.format(name=name, arguments=["train", str(config), str(tmp_path / "run")]))
    assert (done.returncode, done.stderr) == (130, "grank: interrupted\n")


@pytest.mark.slow
def test_interrupted_training_is_status_130_and_goes_on_later(config: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "grank_kernels.recommender.cli.main", "train", str(config), str(tmp_path / "run")]
    process = subprocess.Popen(
        [*command, "training.epochs=1000000"],
        stdout=subprocess.DEVNULL,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
    )
    try:
        deadline = time.monotonic() + 600
        while not (tmp_path / "run" / "last.ckpt").exists():
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.1)
        os.kill(process.pid, signal.SIGINT)
        assert process.wait(300) == 130
    finally:
        process.kill()
