"""Turns a benchmark run into tables, pictures and a small file of results.

python -m benchmarks.report RUN                      # prints the tables
python -m benchmarks.report RUN --out docs           # docs/benchmarks.json, docs/benchmarks.md and its pictures
python -m benchmarks.report RUN --readme README.md   # the table of the README

RUN is the JSON that pytest-benchmark wrote, or an earlier benchmarks.json. Tables replace the text between the
`figures` comments of a page; if `--out` has no page yet, docs/benchmarks.md is the template.
"""

import argparse
import re
import shutil
from pathlib import Path
from typing import NamedTuple

from benchmarks.runs import OPS, ROW_GROUPS, Case, Run, middle, ours, read, save

PAGE = Path(__file__).parent.parent / "docs" / "benchmarks.md"


def by_method(cases: list[Case]) -> dict[str, dict[tuple[int, int], Case]]:
    """Cases by method and then (B, k), methods grouped by the width of their rows."""
    methods: dict[str, dict[tuple[int, int], Case]] = {}
    for dtypes in ROW_GROUPS.values():
        for case in cases:
            if case["dtype"] in dtypes:
                methods.setdefault(case["method"], {})[case["B"], case["k"]] = case
    return methods


def markdown_table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def milliseconds(case: Case | None) -> str:
    return (
        "" if case is None else f"{case['median'] * 1e3:.3g}" if case["median"] < 1 else f"{case['median'] * 1e3:.0f}"
    )


def shown(name: str) -> str:
    return f"**{name}**" if ours({"method": name}) else name


def measured_on(run: Run, case: Case) -> str:
    """Device, threads, instruction set and versions, for the caption of a table."""
    place = case["device"]
    if place == "cpu":
        place = f"{run.machine['threads']} threads of {run.machine['processor']}, instruction set {case['isa']}"
    return f"{place}; " + ", ".join(f"{name} {version}" for name, version in run.machine["versions"].items() if version)


def in_the_middle(run: Run, device: str) -> list[Case]:
    """Searches on a device over the table size for which B and k were varied."""
    cases = [case for case in run.of("mips_topk") if case["device"] == device]
    return [case for case in cases if (case["N"], case["d"]) == middle(cases)]


def search_tables(run: Run) -> str:
    """Two tables per device: over B and over k."""
    devices = dict.fromkeys(case["device"] for case in run.of("mips_topk"))
    return "\n\n".join(_search_tables(run, in_the_middle(run, device)) for device in devices)


def _search_tables(run: Run, cases: list[Case]) -> str:
    methods = by_method(cases)
    some = cases[0]
    batches = sorted({(c["B"], c["k"]) for c in cases if c["k"] == 100})
    lists = sorted({(c["B"], c["k"]) for c in cases if c["B"] == 16})
    read_limit: dict[int, float] = {}
    for case in cases:
        fastest = max(case["probe GB/s"], case["bytes"] / case["median"] / 1e9)
        read_limit[case["bytes"]] = max(read_limit.get(case["bytes"], 0), fastest)
    by_batch, by_k = [], []
    for name, found in methods.items():
        one, many = found.get((1, 100)), found.get(batches[-1])
        limits = [
            "" if one is None else f"{one['bytes'] / one['median'] / 1e9:.1f} of {read_limit[one['bytes']]:.1f}",
            "" if many is None else f"{many['operations'] / many['median'] / 1e9:.0f}",
            f"{min(case['recall'] for case in found.values()):.3f}",
        ]
        by_batch.append([shown(name), *(milliseconds(found.get(case)) for case in batches), *limits])
        by_k.append([shown(name), *(milliseconds(found.get(case)) for case in lists)])
    return "\n\n".join(
        [
            f"Milliseconds per call (median, measured): {some['N']:_} x {some['d']}, k = 100; "
            f"{measured_on(run, some)}.",
            markdown_table(
                ["", *(f"B = {B}" for B, _ in batches), "GB/s at B = 1", f"Gop/s at B = {batches[-1][0]}", "recall"],
                by_batch,
            ),
            "GB/s: bytes of the rows per second, of the highest rate of any method or memory probe over as many "
            "bytes in the same run. Gop/s: `2 B N d` operations per second. Recall: lowest of all cases, against "
            "float32 scores.",
            "The same over k, B = 16:",
            markdown_table(["", *(f"k = {k}" for _, k in lists)], by_k),
        ]
    )


def axis_tables(run: Run) -> str:
    """Two tables, over N and over d, of the methods measured there."""
    cases = [case for case in run.of("mips_topk") if case["device"] == "cpu"]
    N, d = middle(cases)
    tables = []
    for axis, others in (("N", {"d": d, "B": 16, "k": 100}), ("d", {"N": N, "B": 16, "k": 100})):
        some = [case for case in cases if all(case[name] == value for name, value in others.items())]
        values = sorted({case[axis] for case in some})
        found = {(case["method"], case[axis]): case for case in some}
        names = [name for name in dict.fromkeys(name for name, _ in found) if (name, values[-1]) in found]
        rows = [[shown(name), *(milliseconds(found.get((name, value))) for value in values)] for name in names]
        fixed = ", ".join(f"{name} = {value:_}" for name, value in others.items())
        tables += [f"Over {axis}, {fixed}:", markdown_table(["", *(f"{axis} = {value:_}" for value in values)], rows)]
    return "\n\n".join(tables)


def recall_tables(run: Run) -> str:
    """One table per set of vectors: recall, and queries per second for each batch size."""
    tables = []
    for vectors in dict.fromkeys(case["vectors"] for case in run.of("recall")):
        cases = [case for case in run.of("recall") if case["vectors"] == vectors]
        batches = sorted({case["B"] for case in cases})
        found = {(case["method"], case["setting"], case["B"]): case for case in cases}
        rows = []
        for name, setting in dict.fromkeys((name, setting) for name, setting, _ in found):
            some = [found.get((name, setting, B)) for B in batches]
            speeds = ["" if case is None else f"{case['queries'] / case['median']:,.0f}" for case in some]
            recall = next(case["recall"] for case in some if case)
            rows.append([f"{shown(name)} {setting or ''}".strip(), f"{recall:.3f}", *speeds])
        header = [vectors, "recall", *(f"queries/s, B = {B}" for B in batches)]
        tables.append(markdown_table(header, rows))
    return "\n\n".join(tables)


def ranker_tables(run: Run) -> str:
    """One table per op: milliseconds per call and peak memory of every method."""
    cases = run.of("score_candidates", "candidate_cross_attention")
    tables = [
        f"Milliseconds per call (median) and MB of memory beyond the inputs, measured: {measured_on(run, cases[0])}."
    ]
    for op in dict.fromkeys(case["op"] for case in cases):
        found = {(case["method"], case["case"]): case for case in cases if case["op"] == op}
        names, columns = (list(dict.fromkeys(key[i] for key in found)) for i in (0, 1))
        rows = [[shown(name), *(_time_and_memory(found.get((name, c))) for c in columns)] for name in names]
        tables.append(markdown_table([op, *columns], rows))
    return "\n\n".join(tables)


def _time_and_memory(case: Case | None) -> str:
    return "" if case is None else f"{milliseconds(case)} ({case['extra bytes'] / 1e6:.1f} MB)"


class Ratio(NamedTuple):
    """Our fastest method and the fastest peer of one case, both with rows of the same width."""

    rows: str
    ours: Case
    peer: Case

    @property
    def value(self) -> float:
        return float(self.ours["median"] / self.peer["median"])


def ratios(run: Run) -> list[Ratio]:
    """Every case of every op for which both sides were measured."""
    found = []
    for op in OPS:
        for name in dict.fromkeys(case["case"] for case in run.of(op)):
            for group, dtypes in ROW_GROUPS.items():
                some = [case for case in run.of(op) if case["case"] == name and case["dtype"] in dtypes]
                mine, peers = ([c for c in some if ours(c) == side] for side in (True, False))
                if mine and peers:
                    found.append(Ratio(group, *(min(side, key=lambda c: c["median"]) for side in (mine, peers))))
    return found


def ratio_table(run: Run) -> str:
    """Our time divided by that of the fastest peer with rows of the same width, for every case."""
    rows = []
    for ratio in ratios(run):
        times = [f"{case['method']}, {milliseconds(case)} ms" for case in (ratio.ours, ratio.peer)]
        rows.append([f"{ratio.ours['op']} {ratio.ours['case']}", ratio.rows, *times, f"{ratio.value:.2f}"])
    return markdown_table(["case", "rows", "ours", "fastest peer", "ratio"], rows)


def family(case: Case) -> str:
    """Cases whose ratios are summarised in one line: one table size, one kind of history, one direction."""
    if case["op"] == "mips_topk":
        return f"`mips_topk`, {case['N']:_} rows"
    if case["op"] == "score_candidates":
        return f"`score_candidates`, {'ragged' if 'L=1..' in case['case'] else 'equal'} histories"
    return f"`{case['op']}`, forward{case['case'].partition('forward')[2]}"


def range_table(run: Run) -> str:
    """Smallest and largest ratio of every family of cases."""
    found: dict[tuple[str, str], list[float]] = {}
    for ratio in ratios(run):
        found.setdefault((family(ratio.ours), ratio.rows), []).append(ratio.value)
    rows = [[*key, " to ".join(dict.fromkeys(f"{f(values):.2f}" for f in (min, max)))] for key, values in found.items()]
    return markdown_table(["cases", "rows", "ratio"], rows)


def machine_table(run: Run) -> str:
    """The machine, and the read and multiply rates measured in the same run."""
    machine = run.machine
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items() if version)
    lines = [
        f"{machine['processor']}, {machine['threads']} threads of {machine['cores']} cores, {machine['system']} "
        f"{machine['release']}, Python {machine['python']}; {versions}."
    ]
    for device, kinds in run.limits.items():
        for kind, rates in kinds.items():
            header = [f"{device}, {kind}", *rates]
            lines.append(markdown_table(header, [["measured", *(f"{rate:.0f}" for rate in rates.values())]]))
    return "\n\n".join(lines)


def summary_table(run: Run) -> str:
    """The README's table: exact searches over float32 rows, with an int8 copy and by peers."""
    cases = in_the_middle(run, "cpu")
    found = by_method([case for case in cases if case["k"] == 100])
    batches = sorted({case["B"] for case in cases if case["k"] == 100})
    rows = [[shown(name), *(milliseconds(found[name].get((B, 100))) for B in batches)] for name in SUMMARY]
    return markdown_table(["ms per call", *(f"B = {B}" for B in batches)], rows)


def write_section(path: Path, stem: str, text: str) -> None:
    """Replaces the text between the two comments of a section."""
    marks = [f"<!-- {stem} figures: {end} -->" for end in ("begin", "end")]
    begin, end = map(re.escape, marks)
    old = path.read_text()
    new, count = re.subn(f"(?s){begin}.*{end}", lambda _: f"{marks[0]}\n{text}\n{marks[1]}", old)
    if count != 1:
        raise SystemExit(f"{path} must hold {marks[0]} ... {marks[1]} once")
    path.write_text(new)


SUMMARY = ("mips_topk float32, int8 copy", "ScaNN brute force", "torch matmul+topk float32", "FAISS IndexFlatIP")
SECTIONS = {
    "machine": (machine_table, ()),
    "range": (range_table, OPS),
    "ratio": (ratio_table, OPS),
    "mips_topk": (search_tables, ("mips_topk",)),
    "axis": (axis_tables, ("mips_topk",)),
    "recall": (recall_tables, ("recall",)),
    "ranker": (ranker_tables, ("score_candidates", "candidate_cross_attention")),
}


def write_page(folder: Path, run: Run) -> None:
    """Writes results, page and pictures to a folder; keeps sections whose benchmarks were not run."""
    from benchmarks import pictures

    folder.mkdir(parents=True, exist_ok=True)
    page = folder / PAGE.name
    if not page.exists():
        shutil.copy(PAGE, page)
    save(folder / "benchmarks.json", run)
    for stem, (section, ops) in SECTIONS.items():
        if not ops or run.of(*ops):
            write_section(page, stem, section(run))
    if run.of("mips_topk"):
        cases = in_the_middle(run, run.of("mips_topk")[0]["device"])
        batches = sorted({case["B"] for case in cases if case["k"] == 100})
        pictures.bars(folder / "mips_topk.png", run, cases, list(reversed(by_method(cases))), batches)
        pictures.roofline(folder / "roofline.png", run)
        pictures.axes(folder / "axes.png", run)
    if run.of("recall"):
        pictures.recall_curves(folder / "recall.png", run)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="JSON file of pytest-benchmark, or benchmarks.json")
    parser.add_argument("--out", type=Path, help="folder to write the page, its pictures and the results to")
    parser.add_argument("--readme", type=Path, help="page whose summary table to replace")
    options = parser.parse_args()
    run = read(options.run)
    if options.out:
        write_page(options.out, run)
    if options.readme:
        write_section(options.readme, "summary", summary_table(run))
    if not options.out and not options.readme:
        print("\n\n".join(section(run) for section, ops in SECTIONS.values() if not ops or run.of(*ops)))


if __name__ == "__main__":
    main()
