"""The CPU kernels of the working tree beside those of a commit: ratios of times with confidence intervals.

python -m benchmarks.compare COMMIT [--rounds 10] [--only "mips_topk int8"] [--json FILE]

The commit is checked out into a temporary folder and built there. In every round each build runs the same calls
(benchmarks/kernel_cases.py) in its own process, alternating call by call. A round gives one ratio of medians per call,
new over old; the interval is a bootstrap interval of the median over rounds. The exit status is 1 if the interval of a
call lies above 1 + margin, i.e. the call has become slower.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import NamedTuple, Protocol

ROOT = Path(__file__).resolve().parent.parent
MARGIN = 0.05
SECONDS_A_TURN = 0.1
TURNS = 3  # of each build, per call and round
RESAMPLES = 5000
MIN_ROUNDS = 6  # so that the extremes enclose the true median with 95 % probability: 1 - 2 / 2^6
Times = dict[str, list[float]]  # by call, one per round


class Build(Protocol):
    """The process of one build."""

    names: list[str]

    def times(self, name: str) -> list[float]:
        """Durations of a call in seconds, one per run."""
        ...


class Process:
    """A process that imports the package from a folder and times calls on request."""

    def __init__(self, folder: Path) -> None:
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)])}
        command = [sys.executable, "-m", "benchmarks.compare", "--answer"]
        self._process = subprocess.Popen(
            command, cwd=folder, env=environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        package, self.names = json.loads(self._line())
        if Path(package).resolve().parent != (folder / "grank_kernels").resolve():
            raise RuntimeError(f"the package was imported from {package}, not from {folder}")

    def times(self, name: str) -> list[float]:
        assert self._process.stdin is not None
        print(name, file=self._process.stdin, flush=True)
        return list(json.loads(self._line()))

    def _line(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._process.communicate()
            raise RuntimeError(f"the timing process ended with status {self._process.returncode}")
        return line

    def __enter__(self) -> "Process":
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate()  # the process ends at the end of its input


def answer() -> None:
    """Main loop of the process: reads the name of a call per line, writes its times."""
    import grank_kernels as gk
    from benchmarks.kernel_cases import timed_cases

    cases = timed_cases()
    print(json.dumps([gk.__file__, list(cases)]), flush=True)
    for line in sys.stdin:
        call, times = cases[line.rstrip("\n")], []
        call()
        while sum(times) < SECONDS_A_TURN:
            start = time.perf_counter()
            call()
            times.append(time.perf_counter() - start)
        print(json.dumps(times), flush=True)


def one_round(old: Build, new: Build, only: str, first_is_old: bool) -> dict[str, tuple[float, float]]:
    """Medians (old, new) by call, for calls of both commits."""
    found = {}
    for name in (name for name in new.names if only in name and name in old.names):
        times: dict[bool, list[float]] = {True: [], False: []}
        for turn in range(TURNS):
            for is_old in (first_is_old, not first_is_old) if turn % 2 == 0 else (not first_is_old, first_is_old):
                times[is_old] += (old if is_old else new).times(name)
        found[name] = median(times[True]), median(times[False])
    return found


class Comparison(NamedTuple):
    """A call's median times in seconds, their ratio, and the ratio's 95 % interval."""

    old: float
    new: float
    ratio: float
    low: float
    high: float

    @classmethod
    def of(cls, rounds: list[tuple[float, float]]) -> "Comparison":
        olds, news = zip(*rounds, strict=True)
        ratios = [new / old for old, new in rounds]
        return cls(median(olds), median(news), median(ratios), *interval(ratios))

    def slower(self, margin: float) -> bool:
        return self.low > 1 + margin


def interval(ratios: list[float], resamples: int = RESAMPLES) -> tuple[float, float]:
    """2.5 % and 97.5 % of the medians of resamples, drawn with replacement."""
    draw = random.Random(0)
    medians = sorted(median(draw.choices(ratios, k=len(ratios))) for _ in range(resamples))
    return medians[int(0.025 * resamples)], medians[int(0.975 * resamples)]


@contextmanager
def built(commit: str) -> Iterator[Path]:
    """A temporary folder with the compiled package of a commit."""
    with tempfile.TemporaryDirectory() as temporary:
        tree, folder = Path(temporary) / "tree", Path(temporary) / "package"
        subprocess.run(["git", "worktree", "add", "--quiet", "--detach", str(tree), commit], cwd=ROOT, check=True)
        try:
            environment = {
                **os.environ,
                "CMAKE_ARGS": "-DGRANK_CUDA=OFF",
                "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
            }
            command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
            subprocess.run(command, cwd=tree, env=environment, check=True, stdout=subprocess.DEVNULL)
            folder.mkdir()
            (folder / "grank_kernels").symlink_to(tree / "grank_kernels")  # without that commit's benchmarks/
            yield folder
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", str(tree)], cwd=ROOT, check=True)


def compare(commit: str, rounds: int, only: str) -> dict[str, Comparison]:
    found: dict[str, list[tuple[float, float]]] = {}
    with built(commit) as old_folder, tempfile.TemporaryDirectory() as new_folder:
        (Path(new_folder) / "grank_kernels").symlink_to(ROOT / "grank_kernels")
        for number in range(rounds):
            with Process(old_folder) as old, Process(Path(new_folder)) as new:
                for name, times in one_round(old, new, only, number % 2 == 0).items():
                    found.setdefault(name, []).append(times)
            print(f"round {number + 1} of {rounds}", file=sys.stderr, flush=True)
    return {name: Comparison.of(times) for name, times in found.items()}


def report(found: dict[str, Comparison], margin: float) -> str:
    lines = [f"{'ms per call, median, measured':<44}{'old':>9}{'new':>9}{'ratio':>8}   95 % interval"]
    for name, one in found.items():
        verdict = "slower" if one.slower(margin) else "faster" if one.high < 1 - margin else ""
        lines.append(
            f"{name:<44}{one.old * 1e3:>9.3g}{one.new * 1e3:>9.3g}{one.ratio:>8.3f}   {one.low:.3f} to {one.high:.3f}"
            f"  {verdict}".rstrip()
        )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("commit", nargs="?")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--only", default="", help="part of the names of the calls to run")
    parser.add_argument("--margin", type=float, default=MARGIN, help="(default: %(default)s)")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--answer", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.answer:
        answer()
        return 0
    if options.commit is None:
        parser.error("the commit to compare with is missing")
    if options.rounds < MIN_ROUNDS:
        parser.error(f"--rounds must be at least {MIN_ROUNDS}, got {options.rounds}")
    found = compare(options.commit, options.rounds, options.only)
    if not found:
        parser.error(f"both commits have no call with {options.only!r} in its name")
    print(report(found, options.margin))
    if options.json:
        options.json.write_text(json.dumps({name: one._asdict() for name, one in found.items()}, indent=2) + "\n")
    return int(any(one.slower(options.margin) for one in found.values()))


if __name__ == "__main__":
    sys.exit(main())
