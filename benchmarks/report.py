"""Turns a benchmark run into tables, pictures and a small file of results.

python -m benchmarks.report RUN                      # the tables, printed
python -m benchmarks.report RUN --out docs           # docs/benchmarks.json, docs/benchmarks.md and its pictures
python -m benchmarks.report RUN --readme README.md --svg docs/mips_topk.svg

RUN is the JSON that pytest-benchmark wrote, or a benchmarks.json of before. Tables go between the `figures` comments of
a page; where `--out` has no page yet, it starts from the one of docs/.
"""

import argparse
import os
import re
import shutil
from pathlib import Path

from benchmarks.runs import OPS, ROW_GROUPS, Case, Run, middle, ours, read, save

PAGE = Path(__file__).parent.parent / "docs" / "benchmarks.md"


def by_contender(cases: list[Case]) -> dict[str, dict[tuple[int, int], Case]]:
    """Cases by contender and then (B, k), contenders grouped by the width of their rows."""
    contenders: dict[str, dict[tuple[int, int], Case]] = {}
    for dtypes in ROW_GROUPS.values():
        for case in cases:
            if case["dtype"] in dtypes:
                contenders.setdefault(case["contender"], {})[case["B"], case["k"]] = case
    return contenders


def markdown_table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def milliseconds(case: Case | None) -> str:
    return (
        "" if case is None else f"{case['median'] * 1e3:.3g}" if case["median"] < 1 else f"{case['median'] * 1e3:.0f}"
    )


def shown(name: str) -> str:
    return f"**{name}**" if ours({"contender": name}) else name


def measured_on(run: Run, case: Case) -> str:
    """Where, with what: the line under which figures stand."""
    place = case["device"]
    if place == "cpu":
        place = f"{run.machine['threads']} threads of {run.machine['processor']}, instruction set {case['isa']}"
    return f"{place}; " + ", ".join(f"{name} {version}" for name, version in run.machine["versions"].items() if version)


def in_the_middle(run: Run, device: str) -> list[Case]:
    """Searches on a device over the one table for which B and k were varied."""
    cases = [case for case in run.of("mips_topk") if case["device"] == device]
    return [case for case in cases if (case["N"], case["d"]) == middle(cases)]


def search_tables(run: Run) -> str:
    """Two tables a device, over batches and over k."""
    devices = dict.fromkeys(case["device"] for case in run.of("mips_topk"))
    return "\n\n".join(_search_tables(run, in_the_middle(run, device)) for device in devices)


def _search_tables(run: Run, cases: list[Case]) -> str:
    contenders = by_contender(cases)
    some = cases[0]
    batches = sorted({(c["B"], c["k"]) for c in cases if c["k"] == 100})
    lists = sorted({(c["B"], c["k"]) for c in cases if c["B"] == 16})
    read_limit: dict[int, float] = {}
    for case in cases:
        fastest = max(case["probe GB/s"], case["bytes"] / case["median"] / 1e9)
        read_limit[case["bytes"]] = max(read_limit.get(case["bytes"], 0), fastest)
    by_batch, by_k = [], []
    for name, found in contenders.items():
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
            f"Milliseconds a call, median, measured: {some['N']:_} x {some['d']}, k = 100; {measured_on(run, some)}.",
            markdown_table(
                ["", *(f"B = {B}" for B, _ in batches), "GB/s at B = 1", f"Gop/s at B = {batches[-1][0]}", "recall"],
                by_batch,
            ),
            "GB/s: bytes of the rows over the time, and the fastest that anything, a probe of the memory included, "
            "read as many bytes in the same run. Gop/s: `2 B N d` over the time. Recall: lowest of all cases, against "
            "float32 scores.",
            "The same over k, B = 16:",
            markdown_table(["", *(f"k = {k}" for _, k in lists)], by_k),
        ]
    )


def axis_tables(run: Run) -> str:
    """Over N and over d, for the contenders that were run there."""
    cases = [case for case in run.of("mips_topk") if case["device"] == "cpu"]
    N, d = middle(cases)
    tables = []
    for axis, others in (("N", {"d": d, "B": 16, "k": 100}), ("d", {"N": N, "B": 16, "k": 100})):
        some = [case for case in cases if all(case[name] == value for name, value in others.items())]
        values = sorted({case[axis] for case in some})
        found = {(case["contender"], case[axis]): case for case in some}
        names = [name for name in dict.fromkeys(name for name, _ in found) if (name, values[-1]) in found]
        rows = [[shown(name), *(milliseconds(found.get((name, value))) for value in values)] for name in names]
        fixed = ", ".join(f"{name} = {value:_}" for name, value in others.items())
        tables += [f"Over {axis}, {fixed}:", markdown_table(["", *(f"{axis} = {value:_}" for value in values)], rows)]
    return "\n\n".join(tables)


def recall_tables(run: Run) -> str:
    """One a set of vectors: recall and queries a second, a column a batch size."""
    tables = []
    for vectors in dict.fromkeys(case["vectors"] for case in run.of("recall")):
        cases = [case for case in run.of("recall") if case["vectors"] == vectors]
        batches = sorted({case["B"] for case in cases})
        found = {(case["contender"], case["setting"], case["B"]): case for case in cases}
        rows = []
        for name, setting in dict.fromkeys((name, setting) for name, setting, _ in found):
            some = [found.get((name, setting, B)) for B in batches]
            speeds = ["" if case is None else f"{case['queries'] / case['median']:,.0f}" for case in some]
            recall = next(case["recall"] for case in some if case)
            rows.append([f"{shown(name)} {setting or ''}".strip(), f"{recall:.3f}", *speeds])
        header = [vectors, "recall", *(f"queries/s, {B} a call" for B in batches)]
        tables.append(markdown_table(header, rows))
    return "\n\n".join(tables)


def ranker_tables(run: Run) -> str:
    """A table an op: milliseconds a call and the memory it took, contender by contender."""
    cases = run.of("score_candidates", "candidate_cross_attention")
    tables = [
        f"Milliseconds a call, median, and MB of memory beyond the inputs, both measured: {measured_on(run, cases[0])}."
    ]
    for op in dict.fromkeys(case["op"] for case in cases):
        found = {(case["contender"], case["case"]): case for case in cases if case["op"] == op}
        names, columns = (list(dict.fromkeys(key[i] for key in found)) for i in (0, 1))
        rows = [[shown(name), *(_time_and_memory(found.get((name, c))) for c in columns)] for name in names]
        tables.append(markdown_table([op, *columns], rows))
    return "\n\n".join(tables)


def _time_and_memory(case: Case | None) -> str:
    return "" if case is None else f"{milliseconds(case)} ({case['extra bytes'] / 1e6:.1f} MB)"


def ratio_table(run: Run) -> str:
    """Our time over that of the fastest peer with rows of the same width, case by case."""
    rows = []
    for op in OPS:
        for name in dict.fromkeys(case["case"] for case in run.of(op)):
            for group, dtypes in ROW_GROUPS.items():
                some = [case for case in run.of(op) if case["case"] == name and case["dtype"] in dtypes]
                mine, peers = ([c for c in some if ours(c) == side] for side in (True, False))
                if mine and peers:
                    a, b = (min(side, key=lambda case: case["median"]) for side in (mine, peers))
                    times = [f"{c['contender']}, {milliseconds(c)} ms" for c in (a, b)]
                    rows.append([f"{op} {name}", group, *times, f"{a['median'] / b['median']:.2f}"])
    return markdown_table(["case", "rows", "ours", "fastest peer", "ratio"], rows)


def machine_table(run: Run) -> str:
    """The machine, and what a probe of it reached in the same run."""
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


def write_readme(path: Path, stem: str, text: str) -> None:
    """Puts a text between the two comments of that stem."""
    marks = [f"<!-- {stem} figures: {end} -->" for end in ("begin", "end")]
    begin, end = map(re.escape, marks)
    old = path.read_text()
    new, count = re.subn(f"(?s){begin}.*{end}", lambda _: f"{marks[0]}\n{text}\n{marks[1]}", old)
    if count != 1:
        raise SystemExit(f"{path} must hold {marks[0]} ... {marks[1]} once")
    path.write_text(new)


SECTIONS = {
    "machine": (machine_table, ()),
    "ratio": (ratio_table, OPS),
    "mips_topk": (search_tables, ("mips_topk",)),
    "axis": (axis_tables, ("mips_topk",)),
    "recall": (recall_tables, ("recall",)),
    "ranker": (ranker_tables, ("score_candidates", "candidate_cross_attention")),
}


def write_page(folder: Path, run: Run) -> None:
    """Results, page and pictures into a folder; sections whose benchmarks were left out stay as they are."""
    from benchmarks import pictures

    folder.mkdir(parents=True, exist_ok=True)
    page = folder / PAGE.name
    if not page.exists():
        shutil.copy(PAGE, page)
    save(folder / "benchmarks.json", run)
    for stem, (section, ops) in SECTIONS.items():
        if not ops or run.of(*ops):
            write_readme(page, stem, section(run))
    if run.of("mips_topk"):
        pictures.roofline(folder / "roofline.svg", run)
        pictures.axes(folder / "axes.svg", run)
    if run.of("recall"):
        pictures.recall_curves(folder / "recall.svg", run)


def write_search_picture(svg: Path, run: Run) -> str:
    """The bars of README, on the first device of the run, and the line that shows them."""
    from benchmarks import pictures

    cases = in_the_middle(run, run.of("mips_topk")[0]["device"])
    batches = sorted({case["B"] for case in cases if case["k"] == 100})
    pictures.bars(svg, run, cases, list(reversed(by_contender(cases))), batches)
    return "![Time of a search, every contender, three batch sizes]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--out", type=Path, help="folder of the page, its pictures and the results")
    parser.add_argument("--readme", type=Path)
    parser.add_argument("--svg", type=Path)
    options = parser.parse_args()
    run = read(options.run)
    if options.out:
        write_page(options.out, run)
    if options.readme:
        for stem in ("mips_topk", "ranker"):
            section, ops = SECTIONS[stem]
            if not run.of(*ops):
                continue
            text = section(run)
            if stem == "mips_topk" and options.svg:
                link = os.path.relpath(options.svg, options.readme.parent)
                text = f"{write_search_picture(options.svg, run)}({link})\n\n{text}"
            write_readme(options.readme, stem, text)
    if not options.out and not options.readme:
        print("\n\n".join(section(run) for section, ops in SECTIONS.values() if not ops or run.of(*ops)))


if __name__ == "__main__":
    main()
