"""The comparison of retrieval systems: recall, tuning, and one run of every system."""

import json
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import retrieval_systems
from benchmarks.retrieval_systems import System, recall, tune
from grank_kernels import TopK

pytestmark = pytest.mark.usefixtures("one_thread")


class Knob:
    """A system with a recall of 3 % per unit of its setting, at most 90 %."""

    value = 0


def nothing(*_: object) -> TopK:
    raise NotImplementedError


@pytest.mark.parametrize(("target", "low", "high"), [(0.03, 1, 1), (0.5, 17, 19), (0.9, 30, 33)])
def test_tuning_finds_the_least_setting_within_an_eighth(target: float, low: int, high: int) -> None:
    knob = Knob()
    got = tune(System("", nothing, (knob, "value"), 1000), lambda: min(0.9, 0.03 * knob.value), target)
    assert got >= target
    assert low <= knob.value <= high


def test_tuning_ends_at_the_largest_setting() -> None:
    knob = Knob()
    assert tune(System("", nothing, (knob, "value"), 100), lambda: min(0.9, 0.03 * knob.value), 0.95) == 0.9
    assert knob.value == 100


def test_recall_ignores_fillers() -> None:
    truth = torch.tensor([[1, 2, 3, 4], [5, 6, -1, -1]])
    assert recall(truth, truth) == 1.0
    assert recall(torch.tensor([[4, 3, 9, -1], [-1, -1, 6, 7]]), truth) == 0.5


def test_every_system_reaches_the_target_recall(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report = tmp_path / "systems.json"
    numbers = ["--k1", "20", "--k2", "5", "--batch", "3", "--requests", "2", "--recall", "0.8"]
    monkeypatch.setattr(sys, "argv", ["retrieval_systems.py", "--items", "1500", *numbers, "--json", str(report)])
    retrieval_systems.main()
    record = json.loads(report.read_text())
    rows = {row["system"]: row for row in record["systems"]}
    assert len(rows) == 7
    for row in rows.values():
        assert row["reached"]
        assert row["recall"] > 0.7  # on users that it was not tuned on
        assert 0 < row["p50"] <= row["p99"]
    assert rows["GRank, mips_topk float32"]["recall"] == 1.0
