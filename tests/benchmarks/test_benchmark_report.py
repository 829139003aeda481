"""From a benchmark run to its page: merged turns, tables, reproducible pictures."""

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.report import PAGE, ratio_table, search_tables, write_page
from benchmarks.runs import Run, middle, ours, read, save, statistics, together

MACHINE = {
    "cpu": {"brand_raw": "A Processor", "count": 2},
    "machine": "x86_64",
    "python_version": "3.11.7",
    "threads": 2,
    "versions": {"torch": "2.13.0", "cuvs": None},
    "grank_kernels": "...",
    "system": "Linux",
    "release": "6",
    "node": "a name that stays here",
}
LIMITS = {
    "cpu": {"read GB/s": {"1 MB": 140.123456, "256 MB": 30.0}, "matmul Gop/s": {"float32": 400.0, "int8": 4000.0}}
}


def benchmark(times: list[float], **facts: Any) -> dict[str, Any]:
    common = {"label": "measured", "device": "cpu", "isa": "amx", "threads": 2, "bytes": 10**6, "operations": 10**9}
    return {"extra_info": common | facts, "stats": {"data": times}}


def searched(name: str, times: list[float], N: int = 1000, d: int = 64, B: int = 16, k: int = 100) -> dict[str, Any]:
    dtype = "int8" if name.endswith("int8") else "float32"
    facts = {"op": "mips_topk", "case": f"{N} x {d} B={B} k={k}", "method": name, "dtype": dtype, "N": N, "d": d}
    return benchmark(times, **facts, B=B, k=k, recall=1.0, **{"probe GB/s": 30.0})


def pytest_run() -> dict[str, Any]:
    """The output of pytest-benchmark for two turns of each method."""
    benchmarks = []
    for turn in (0.0, 0.001):
        for name, time in (("mips_topk float32", 0.001), ("A peer", 0.004), ("mips_topk int8", 0.0005)):
            for case in ({"B": 1}, {"B": 16}, {"k": 10}, {"N": 100}, {"d": 16}):
                benchmarks.append(searched(name, [time + turn] * 2, **case))
        for name, time, setting in (
            ("mips_topk int8", 0.01, None),
            ("HNSW", 0.02, "efSearch 8"),
            ("HNSW", 0.04, "efSearch 16"),
        ):
            facts = {"op": "recall", "case": "words B=1", "vectors": "words", "B": 1, "k": 100, "queries": 32}
            recall = 0.99 if setting is None else time * 20
            facts |= {"method": name, "dtype": "float32", "recall": recall, "setting": setting}
            benchmarks.append(benchmark([time + turn], **facts))
        for name, time in (("score_candidates float32", 0.003), ("torch eager float32", 0.004)):
            facts = {"op": "score_candidates", "case": "B=1", "method": name, "dtype": "float32", "error": 1e-6}
            benchmarks.append(benchmark([time + turn], **facts, **{"extra bytes": 2_000_000}))
    return {"machine_info": MACHINE, "limits": LIMITS, "benchmarks": [*benchmarks, {"extra_info": {}, "stats": {}}]}


@pytest.fixture
def run(tmp_path: Path) -> Run:
    (tmp_path / "run.json").write_text(json.dumps(pytest_run()))
    return read(tmp_path / "run.json")


def approximately(value: Any) -> Any:
    return pytest.approx(value, rel=1e-3) if isinstance(value, float) else value


def test_turns_are_merged() -> None:
    found = together([searched("a", [1.0, 5.0]), searched("b", [9.0]), searched("a", [2.0, 3.0, 4.0])])
    assert [(case["method"], case["median"], case["rounds"]) for case in found] == [("a", 3.0, 5), ("b", 9.0, 1)]
    assert (found[0]["q1"], found[0]["q3"]) == (2.0, 4.0)


def test_statistics_of_one_round() -> None:
    assert statistics([2.0]) == {"median": 2.0, "q1": 2.0, "q3": 2.0, "rounds": 1}


def test_each_setting_is_one_case(run: Run) -> None:
    assert [case["setting"] for case in run.of("recall")] == [None, "efSearch 8", "efSearch 16"]


def test_results_are_read_as_they_were_saved(run: Run, tmp_path: Path) -> None:
    save(tmp_path / "benchmarks.json", run)
    again = read(tmp_path / "benchmarks.json")
    rounded = [{name: approximately(value) for name, value in case.items()} for case in run.cases]
    assert again.cases == rounded
    assert again.limits["cpu"]["read GB/s"]["1 MB"] == 140.1
    assert "a name that stays here" not in (tmp_path / "benchmarks.json").read_text()
    save(tmp_path / "again.json", read(tmp_path / "benchmarks.json"))
    assert (tmp_path / "again.json").read_bytes() == (tmp_path / "benchmarks.json").read_bytes()


def test_the_middle_size_is_the_most_frequent(run: Run) -> None:
    assert middle(run.of("mips_topk")) == (1000, 64)


def test_ours_is_recognised_by_name() -> None:
    assert ours({"method": "mips_topk float32, int8 copy"})
    assert not ours({"method": "torch matmul+topk float32"})


def test_tables_show_medians_over_all_turns(run: Run) -> None:
    text = search_tables(run)
    assert "| **mips_topk float32** | 1.5 | 1.5 | 0.7 of 30.0 | 667 | 1.000 |" in text
    assert "| A peer | 4.5 | 4.5 |" in text
    assert "2 threads of A Processor, instruction set amx; torch 2.13.0" in text
    assert "cuvs" not in text


def test_ratios_are_to_the_fastest_peer_of_equal_precision(run: Run) -> None:
    lines = ratio_table(run).splitlines()[2:]
    assert (
        "| mips_topk 1000 x 64 B=16 k=100 | float32 rows | mips_topk float32, 1.5 ms | A peer, 4.5 ms | 0.33 |" in lines
    )
    assert lines[-1].endswith("| score_candidates float32, 3.5 ms | torch eager float32, 4.5 ms | 0.78 |")
    assert not any("8-bit" in line for line in lines)  # no peer has such rows


def test_the_page_has_every_figure_and_the_same_bytes_twice(run: Run, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    first, second = tmp_path / "first", tmp_path / "second"
    for folder in (first, second):
        write_page(folder, run)
    names = {path.name for path in first.iterdir()}
    assert names == {"benchmarks.json", "benchmarks.md", "mips_topk.png", "roofline.png", "axes.png", "recall.png"}
    for name in names:
        assert (first / name).read_bytes() == (second / name).read_bytes()
    page = (first / "benchmarks.md").read_text()
    assert "| HNSW efSearch 16 | 0.800 |" in page
    assert page.count("figures: begin") == PAGE.read_text().count("figures: begin") == 7
    assert "begin -->\n<!--" not in page  # no section is empty


def test_sections_without_a_run_are_kept(run: Run, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    write_page(tmp_path / "page", run)
    before = (tmp_path / "page" / "benchmarks.md").read_text()
    write_page(tmp_path / "page", run._replace(cases=run.of("mips_topk")))
    after = (tmp_path / "page" / "benchmarks.md").read_text()
    section = "<!-- ranker figures: begin -->"
    assert after.split(section)[1] == before.split(section)[1]
