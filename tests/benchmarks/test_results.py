"""The record of the results page: added runs keep earlier ones, and rows stay separate."""

import json
from pathlib import Path
from typing import Any

import torch

from benchmarks.results import TABLES, collect, known, leave_one_out_table, save, systems_table, write
from benchmarks.second_stage import table as gains_table

ROWS = {row.name: row for row in TABLES["ml-1m leave-one-out"]}


def report(hr: float, **more: Any) -> dict[str, Any]:
    return {"users": 10, "retrieved": {"hr@10": hr}, "seconds": 120.0} | more


def leave(runs: Path, reports: dict[str, dict[str, Any]]) -> None:
    """Writes the files of a run as `train` does."""
    for name, figures in reports.items():
        folder = runs / name
        folder.mkdir(parents=True)
        (folder / "report.json").write_text(json.dumps(figures))


def test_added_runs_keep_earlier_ones(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    save(path, {"ml-1m-hstu-seed_0": report(0.25), "ml-1m-hstu-seed_1": report(0.27)})
    leave(tmp_path / "runs", {"ml-1m-hstu-seed_1": report(1 / 3), "ml-1m-sasrec-seed_0": report(0.5)})
    save(path, known(path, tmp_path / "runs"))
    assert known(path, tmp_path / "no runs") == {
        "ml-1m-hstu-seed_0": report(0.25),
        "ml-1m-hstu-seed_1": report(0.333333),
        "ml-1m-sasrec-seed_0": report(0.5),
    }
    assert len(path.read_text().splitlines()) == 5, "one line a run"


def test_a_row_takes_its_own_seeds() -> None:
    reports = {
        "ml-1m-unigrf-hstu-seed_0": report(0.2, auc=0.75),
        "ml-1m-unigrf-hstu-seed_1": report(0.4, auc=0.85),
        "ml-1m-unigrf-hstu-enhancer_false-seed_0": report(0.1),
        "ml-1m-unigrf-hstu-enhancer_false-weighter_false-seed_0": report(0.9),
    }
    whole = collect(reports, ROWS["UniGRF, HSTU"])
    assert whole == {"retrieved hr@10": [0.2, 0.4], "auc": [0.75, 0.85], "seconds": [120.0, 120.0]}
    assert collect(reports, ROWS["UniGRF, HSTU, no enhancer"])["retrieved hr@10"] == [0.1]
    assert collect(reports, ROWS["SASRec"]) == {}


def test_the_table_has_the_number_of_seeds() -> None:
    reports = {"ml-1m-hstu-seed_0": report(0.2), "ml-1m-hstu-seed_1": report(0.4), "ml-1m-sasrec-seed_0": report(0.5)}
    lines = leave_one_out_table(reports, TABLES["ml-1m leave-one-out"]).splitlines()[2:]
    assert [line.split(" | ")[:3] for line in lines] == [["| SASRec", "1", ".5000"], ["| HSTU", "2", ".3000 ± .1414"]]


def test_a_comparison_of_systems_marks_missed_recall() -> None:
    row = {"system": "HNSW", "batch": 16, "setting": "ef_search 40", "recall": 0.9512, "reached": True}
    row |= {"p50": 1.234, "p99": 12.34, "qps": 12_345.6, "build_s": 0.05}
    systems = [row, row | {"system": "tree", "batch": 1, "recall": 0.5, "reached": False}]
    assert systems_table({"k1": 500, "systems": systems}).splitlines()[2:] == [
        "| tree | 1 | ef_search 40 | 0.500, not reached | 1.23 | 12.3 | 12,346 | 0.1 |",
        "| HNSW | 16 | ef_search 40 | 0.951 | 1.23 | 12.3 | 12,346 | 0.1 |",
    ]


def test_the_page_matches_its_record(tmp_path: Path) -> None:
    docs = Path(__file__).parents[2] / "docs"
    page = tmp_path / "results.md"
    page.write_text((docs / "results.md").read_text())
    write(page, known(docs / "results.json", tmp_path / "no runs"))
    assert page.read_text() == (docs / "results.md").read_text()


def test_the_gain_of_a_second_stage_is_paired_by_user() -> None:
    lengths = torch.tensor([10, 32, 33, 64, 200, 300, 400])
    before = torch.tensor([0.1, 0.3, 0.5, 0.5, 0.2, 0.4, 0.6])
    gain = torch.tensor([0.0, 0.0, 0.01, 0.03, -0.1, 0.0, 0.1])
    lines = gains_table(lengths, before, before + gain, 50).splitlines()[2:]
    assert lines == [
        "| 1 to 32 | 2 | .2000 | .2000 | +.0000 ± .0000 |",
        "| 33 to 64 | 2 | .5000 | .5200 | +.0200 ± .0100 |",
        "| more than 128 | 3 | .4000 | .4000 | +.0000 ± .0577 |",
        "| all | 7 | .3714 | .3771 | +.0057 ± .0222 |",
    ]
