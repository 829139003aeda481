"""A benchmark run: machine, limits and cases, read from pytest-benchmark's JSON or from benchmarks.json."""

import json
from collections import Counter
from pathlib import Path
from statistics import median, quantiles
from typing import Any, NamedTuple

Case = dict[str, Any]  # parameters of the case; `median`, quartiles `q1` and `q3` in seconds; `rounds`
ROW_GROUPS = {"float32 rows": ("float32",), "16-bit rows": ("float16", "bfloat16"), "8-bit rows": ("int8",)}
OPS = ("mips_topk", "score_candidates", "candidate_cross_attention")


class Run(NamedTuple):
    machine: dict[str, Any]
    limits: dict[str, Any]
    cases: list[Case]

    def of(self, *ops: str) -> list[Case]:
        return [case for case in self.cases if case["op"] in ops]


def read(path: Path) -> Run:
    run = json.loads(path.read_text())
    if "benchmarks" not in run:
        return Run(**run)
    return Run(_described(run["machine_info"]), run["limits"], together(run["benchmarks"]))


def together(benchmarks: list[dict[str, Any]]) -> list[Case]:
    """Pools the turns of each method and case: one case with the statistics of all rounds."""
    found: dict[tuple[Any, ...], tuple[Case, list[float]]] = {}
    for each in benchmarks:
        case = each["extra_info"]
        if "method" in case:
            key = tuple(case.get(name) for name in ("op", "case", "method", "setting"))
            found.setdefault(key, (case, []))[1].extend(each["stats"]["data"])
    return [case | statistics(times) for case, times in found.values()]


def statistics(times: list[float]) -> dict[str, float | int]:
    low, _, high = quantiles(times, n=4, method="inclusive") if len(times) > 1 else times * 3
    return {"median": median(times), "q1": low, "q3": high, "rounds": len(times)}


def _described(machine: dict[str, Any]) -> dict[str, Any]:
    """The relevant part of pytest-benchmark's description of the machine, and ours."""
    processor = machine["cpu"].get("brand_raw", machine["machine"])
    kept = {name: machine[name] for name in ("threads", "versions", "grank_kernels", "system", "release")}
    return {"processor": processor, "cores": machine["cpu"].get("count"), "python": machine["python_version"], **kept}


def save(path: Path, run: Run) -> None:
    """Writes one line per case with four digits, so that two runs can be compared by diff."""
    cases = ",\n  ".join(few_digits(case) for case in run.cases)
    machine = json.dumps(run.machine)
    path.write_text(f'{{"machine": {machine},\n "limits": {few_digits(run.limits)},\n "cases": [\n  {cases}\n]}}\n')


def few_digits(value: Any, digits: int = 4) -> str:
    """JSON on one line with rounded floats."""
    return json.dumps(json.loads(json.dumps(value), parse_float=lambda x: float(f"{float(x):.{digits}g}")))


def ours(case: Case) -> bool:
    return case["method"].startswith(OPS)


def middle(cases: list[Case]) -> tuple[int, int]:
    """N and d of the table size with most cases."""
    return Counter((case["N"], case["d"]) for case in cases).most_common(1)[0][0]
