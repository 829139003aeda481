"""The comparison of two builds: intervals, verdict, and the timing processes."""

import random
from pathlib import Path

import pytest

from benchmarks.compare import ROOT, Comparison, Process, interval, one_round, report
from grank_kernels.backends import cpu


class Pretended:
    """A simulated build: calls take the given times, with noise."""

    def __init__(self, draw: random.Random, **seconds: float) -> None:
        self.draw, self.seconds, self.names = draw, seconds, list(seconds)
        self.asked: list[str] = []

    def times(self, name: str) -> list[float]:
        self.asked.append(name)
        return [self.seconds[name] * self.draw.uniform(0.9, 1.3) for _ in range(9)]


def compared(**ratios: float) -> dict[str, Comparison]:
    """Ten rounds of two builds with the given ratios of times, on a machine with drift."""
    draw, rounds = random.Random(7), dict[str, list[tuple[float, float]]]()
    for number in range(10):
        speed = draw.uniform(0.5, 2)
        old = Pretended(draw, **dict.fromkeys(ratios, speed))
        new = Pretended(draw, **{name: speed * ratio for name, ratio in ratios.items()})
        for name, times in one_round(old, new, "", number % 2 == 0).items():
            rounds.setdefault(name, []).append(times)
    return {name: Comparison.of(times) for name, times in rounds.items()}


def test_a_slower_kernel_is_found_and_an_equal_one_is_not() -> None:
    found = compared(same=1.0, slower=1.2, faster=0.8)
    assert [name for name, one in found.items() if one.slower(0.05)] == ["slower"]
    assert found["same"].low < 1 < found["same"].high
    assert found["faster"].high < 0.95
    lines = report(found, 0.05).splitlines()
    assert [line.endswith("slower") for line in lines[1:]] == [False, True, False]
    assert lines[3].endswith("faster")


def test_builds_take_turns_and_calls_of_one_build_alone_are_left_out() -> None:
    draw = random.Random(0)
    old, new = Pretended(draw, a=1.0, gone=1.0), Pretended(draw, a=1.0, added=1.0)
    assert list(one_round(old, new, "", True)) == ["a"]
    assert old.asked == new.asked == ["a"] * 3
    assert one_round(old, new, "b", True) == {}


def test_an_interval_of_equal_ratios_is_a_point() -> None:
    assert interval([1.25] * 5) == (1.25, 1.25)


def test_an_interval_has_its_nominal_coverage() -> None:
    draw = random.Random(3)
    inside = 0
    for _ in range(100):
        low, high = interval([draw.gauss(1.0, 0.1) for _ in range(10)], resamples=200)
        inside += low <= 1.0 <= high
    assert 88 <= inside <= 100


@pytest.mark.skipif(cpu.unavailable() is not None, reason=str(cpu.unavailable()))
def test_a_process_times_the_package_of_its_folder(tmp_path: Path) -> None:
    (tmp_path / "grank_kernels").symlink_to(ROOT / "grank_kernels")
    with Process(tmp_path) as build:
        assert {"mips_topk int8 B=16", "score_candidates float32"} <= set(build.names)
        times = build.times("score_candidates float32")
    assert times
    assert all(0 < seconds < 60 for seconds in times)


def test_a_process_that_cannot_start_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "grank_kernels").mkdir()
    (tmp_path / "grank_kernels" / "__init__.py").write_text("raise SystemExit(3)\n")
    with pytest.raises(RuntimeError, match="ended with status 3"):
        Process(tmp_path)
