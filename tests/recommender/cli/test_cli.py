"""The commands: what they print, and the status that they end with."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from oracle import run_python
from test_experiment import write_circle
from typer.testing import CliRunner

from grank_kernels.recommender.cli import main as cli
from grank_kernels.recommender.cli.commands import app
from grank_kernels.recommender.serving.latency import Latency, measure, synthetic
from grank_kernels.recommender.training.experiment import Experiment
from grank_kernels.recommender.training.run import run

pytestmark = pytest.mark.usefixtures("one_thread")

YAML = """
model: grank
settings: {{dim: 16, short_history: 8, long_history: 12, hidden: 16, negatives: 8}}
data: {{name: arrays, path: {path}}}
training: {{epochs: 1, targets: 8, context: 4, batch_items: 256}}
k1: [20]
"""


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("experiment")
    path = folder / "grank.yaml"
    path.write_text(YAML.format(path=write_circle(folder / "circle.npz")))
    return path


@pytest.fixture(scope="module")
def trained(config: Path) -> Path:
    run(Experiment.load(config), config.parent / "run", progress=False)
    return config.parent / "run"


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
    out = call("train", config, tmp_path / "run", "training.seed=1")
    report = json.loads(out[out.index("{\n") :])
    assert report["users"] == 30
    assert json.loads(call("evaluate", tmp_path / "run"))["retrieved"] == report["retrieved"]

    by_user = call("retrieve", trained, "--user", 103, "--k1", 20, "--k2", 5).splitlines()
    history = ",".join(str((7 * 3 + t) % 40 + 1) for t in range(16))
    assert len(by_user) == 6
    assert by_user[0] == "16 items seen, last: item 35; item 36; item 37"
    call("export", trained, tmp_path / "saved", "--dtype", "bfloat16")
    by_history = call("retrieve", tmp_path / "saved", "--history", history, "--k1", 20, "--k2", 5).splitlines()
    assert by_history[0] == by_user[0]
    assert not {line.split()[2] for line in by_user[1:] + by_history[1:]} & set(history.split(","))
    assert len(call("retrieve", tmp_path / "saved", "--user", 103).splitlines()) == 11
    assert call("retrieve", trained, "--history", "").startswith("0 items seen, last: none\n")


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


def test_latency_by_hand() -> None:
    got = Latency.of("search", 4, [number / 1000 for number in range(100, 0, -1)])
    assert (got.p50, got.p99) == pytest.approx((50.0, 99.0))
    assert got.qps == pytest.approx(400 / 5.05)


def test_latency_refuses_what_has_no_answer() -> None:
    retriever, histories = synthetic(50, dim=16, history=4, users=3)
    numbers = {"k1": 5, "k2": 5, "batches": [1], "requests": 1, "warm_up": 0}
    for name, value in (("requests", 0), ("warm_up", -1), ("batches", [2, 0]), ("batches", [])):
        with pytest.raises(ValueError, match=f"{name} must be"):
            measure(retriever, histories, **(numbers | {name: value}))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="histories must be of one user at least, got none"):
        measure(retriever, histories.select(torch.arange(0)), **numbers)  # type: ignore[arg-type]


def test_doctor_and_help() -> None:
    assert "backend cpu: can run" in call("doctor")
    out = call("--help")
    for command in ("train", "evaluate", "export", "retrieve", "bench-retriever", "doctor"):
        assert command in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("train", "nothing.yaml", "run"), "nothing.yaml"),
        (("evaluate", "nothing"), "nothing"),
        (("retrieve", "RUN", "--history", "1,999"), "histories: item 999 is not in the catalogue"),
        (("retrieve", "RUN", "--history", "one"), "--history takes integers here, got 'one'"),
        (("retrieve", "RUN", "--user", "7"), "--user: there is no user 7 in arrays"),
        (("train", "CONFIG", "RUN", "training.epochs=9"), "holds another experiment"),
        (("train", "CONFIG", "RUN", "training.epoch=9"), "Key 'epoch' not in 'TrainingConfig'"),
    ],
)
def test_errors_are_one_line_and_status_1(
    arguments: tuple[str, ...],
    message: str,
    config: Path,
    trained: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given = [{"RUN": trained, "CONFIG": config}.get(argument, argument) for argument in arguments]
    status, error = fails(capsys, monkeypatch, *given)
    assert status == 1
    assert error.startswith("grank: ")
    assert error.count("\n") == 1
    assert message in error


@pytest.mark.parametrize(
    "arguments",
    [
        ("retrieve", "RUN"),
        ("retrieve", "RUN", "--user", "1", "--history", "1"),
        ("retrieve", "RUN", "--user", "1", "--all-users", "--out", "nowhere"),
        ("retrieve", "RUN", "--all-users"),
        ("retrieve", "RUN", "--user", "1", "--out", "nowhere"),
        ("retrieve", "RUN", "--user", "1", "--k1", "0"),
        ("retrieve", "RUN", "--user", "1", "--k1", "5", "--k2", "6"),
        ("retrieve", "RUN", "--user", "103", "--dtype", "int4"),
        ("bench-retriever",),
        ("bench-retriever", "--items", "9", "--k1", "5", "--k2", "6"),
        ("reprieve",),
    ],
)
def test_wrong_usage_is_status_2(
    arguments: tuple[str, ...], trained: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    given = [trained if argument == "RUN" else argument for argument in arguments]
    status, error = fails(capsys, monkeypatch, *given)
    assert status == 2
    assert "Usage: grank" in error


WITHOUT = """
import sys
sys.modules[{name!r}] = None  # importing it fails
sys.argv = ["grank", "doctor"] if {name!r} == "typer" else ["grank", "evaluate", "nothing"]
from grank_kernels.recommender.cli.main import main
main()
"""


@pytest.mark.parametrize("name", ["typer", "lightning"])
def test_without_the_extra_it_says_what_to_install(name: str) -> None:
    done = run_python(WITHOUT.format(name=name))
    assert done.returncode == 1
    assert done.stderr == f"grank: {name} is not installed: pip install 'grank-kernels[train]'\n"


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
