"""Turns the JSON of a benchmark run into README's tables and one picture.

python benchmarks/report.py build/benchmark.json [--readme README.md] [--svg docs/mips_topk.svg]

Without `--readme` the tables are printed; with it they, and the picture where `--svg` draws one, go between the two
`figures` comments of that file: those of mips_topk, and those of the ranker.
"""

import argparse
import json
import os
import re
from pathlib import Path
from typing import Any

Case = dict[str, Any]  # extra_info of one benchmark and its median, in seconds
GROUPS = {"float32": "float32 rows", "float16": "16-bit rows", "bfloat16": "16-bit rows", "int8": "8-bit rows"}
COLOURS = {"ours": "#1f5fa8", "peer": "#b8bec6"}


def read(path: Path) -> tuple[dict[str, Any], list[Case]]:
    run = json.loads(path.read_text())
    cases = [b["extra_info"] | {"median": b["stats"]["median"]} for b in run["benchmarks"] if "median" in b["stats"]]
    return run["machine_info"], [case for case in cases if "contender" in case]


def by_contender(cases: list[Case]) -> dict[str, dict[tuple[int, int], Case]]:
    """Cases by contender and then (B, k), contenders grouped by the width of their rows."""
    contenders: dict[str, dict[tuple[int, int], Case]] = {}
    for group in dict.fromkeys(GROUPS.values()):
        for case in cases:
            if GROUPS[case["dtype"]] == group:
                contenders.setdefault(case["contender"], {})[case["B"], case["k"]] = case
    return contenders


def markdown_table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def milliseconds(case: Case | None) -> str:
    return (
        "" if case is None else f"{case['median'] * 1e3:.3g}" if case["median"] < 1 else f"{case['median'] * 1e3:.0f}"
    )


def markdown(machine: dict[str, Any], cases: list[Case]) -> str:
    """The tables of every device that was measured."""
    devices = dict.fromkeys(case["device"] for case in cases)
    return "\n\n".join(device_tables(machine, [c for c in cases if c["device"] == device]) for device in devices)


def device_tables(machine: dict[str, Any], cases: list[Case]) -> str:
    """Two tables, over batches and over k, and a line that says where they were measured."""
    contenders = by_contender(cases)
    some = cases[0]
    batches = sorted({(c["B"], c["k"]) for c in cases if c["k"] == 100})
    lists = sorted({(c["B"], c["k"]) for c in cases if c["B"] == 16})
    read_limit: dict[int, float] = {}
    for case in cases:
        read_limit[case["bytes"]] = max(read_limit.get(case["bytes"], 0), case["probe GB/s"], case["GB/s"])
    by_batch, by_k = [], []
    for name, found in contenders.items():
        shown = f"**{name}**" if name.startswith("mips_topk") else name
        one, many = found.get((1, 100)), found.get(batches[-1])
        limits = [
            "" if one is None else f"{one['GB/s']:.1f} of {read_limit[one['bytes']]:.1f}",
            "" if many is None else f"{many['Gop/s']:.0f}",
            f"{min(case['recall'] for case in found.values()):.3f}",
        ]
        by_batch.append([shown, *(milliseconds(found.get(case)) for case in batches), *limits])
        by_k.append([shown, *(milliseconds(found.get(case)) for case in lists)])
    where = some["device"]
    if where == "cpu":
        processor = machine["cpu"].get("brand_raw", machine["machine"])
        where = f"{some['threads']} threads of {processor}, instruction set {some['isa']}"
    versions = ", ".join(f"{package} {version}" for package, version in machine["versions"].items() if version)
    return "\n\n".join(
        [
            f"Milliseconds a call, median, measured: {some['N']:_} x {some['d']}, k = 100; {where}; {versions}.",
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


def ranker_markdown(machine: dict[str, Any], cases: list[Case]) -> str:
    """A table an op: milliseconds a call and the memory it took, contender by contender."""
    some = cases[0]
    tables = []
    for op in dict.fromkeys(case["op"] for case in cases):
        found = {(case["contender"], case["case"]): case for case in cases if case["op"] == op}
        names, columns = (list(dict.fromkeys(key[i] for key in found)) for i in (0, 1))
        rows = [
            [f"**{name}**" if name.startswith(op) else name, *(_time_and_memory(found.get((name, c))) for c in columns)]
            for name in names
        ]
        tables.append(markdown_table([op, *columns], rows))
    versions = ", ".join(f"{package} {version}" for package, version in machine["versions"].items() if version)
    where = f"{some['threads']} threads of {machine['cpu'].get('brand_raw', machine['machine'])}, {some['device']}"
    head = f"Milliseconds a call, median, and MB of memory beyond the inputs, both measured: {where}; {versions}."
    return "\n\n".join([head, *tables])


def _time_and_memory(case: Case | None) -> str:
    return "" if case is None else f"{milliseconds(case)} ({case['extra bytes'] / 1e6:.1f} MB)"


def write_readme(path: Path, stem: str, text: str) -> None:
    """Puts a text between the two comments of that stem."""
    marks = [f"<!-- {stem} figures: {end} -->" for end in ("begin", "end")]
    begin, end = map(re.escape, marks)
    old = path.read_text()
    new, count = re.subn(f"(?s){begin}.*{end}", lambda _: f"{marks[0]}\n{text}\n{marks[1]}", old)
    if count != 1:
        raise SystemExit(f"{path} must hold {marks[0]} ... {marks[1]} once")
    path.write_text(new)


def draw(path: Path, machine: dict[str, Any], cases: list[Case]) -> None:
    """One panel a batch size, one bar a contender, on the first device of the run."""
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams |= {"svg.hashsalt": "grank", "font.size": 9, "font.family": "DejaVu Sans", "svg.fonttype": "none"}
    from matplotlib import pyplot as plt

    cases = [case for case in cases if case["device"] == cases[0]["device"]]
    contenders = by_contender(cases)
    names = list(reversed(contenders))
    batches = sorted({case["B"] for case in cases if case["k"] == 100})
    figure, panels = plt.subplots(1, len(batches), figsize=(10, 0.3 * len(names) + 1.2), sharey=True)
    for panel, B in zip(panels, batches, strict=True):
        found = {name: contenders[name].get((B, 100)) for name in names}
        times = [case["median"] * 1e3 if case else 0 for case in found.values()]
        colours = [COLOURS["ours" if name.startswith("mips_topk") else "peer"] for name in names]
        panel.barh(names, times, color=colours, height=0.72)
        for y, time in enumerate(times):
            label = f"{time:,.0f}" if time >= 1000 else f"{time:.3g}" if time else "not run"
            panel.text(time, y, f" {label}", va="center", fontsize=8, color="#404040")
        panel.set_title(f"B = {B}", fontsize=10)
        panel.set_xlim(0, max(times) * 1.22)
        panel.set_xlabel("ms a call")
        panel.spines[["top", "right", "left"]].set_visible(False)
        panel.tick_params(axis="y", length=0)
    some = cases[0]
    on = f"{some['threads']} threads, {some['isa']}" if some["device"] == "cpu" else some["device"]
    figure.suptitle(f"Top 100 of {some['N']:_} x {some['d']}, {on}: measured", fontsize=10)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None}, facecolor="white")
    # matplotlib leaves blanks at line ends
    path.write_text("\n".join(line.rstrip() for line in path.read_text().splitlines()) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("json", type=Path)
    parser.add_argument("--readme", type=Path)
    parser.add_argument("--svg", type=Path)
    arguments = parser.parse_args()
    machine, cases = read(arguments.json)
    searches, ranker = [case for case in cases if "op" not in case], [case for case in cases if "op" in case]
    texts = {}
    if searches:
        texts["mips_topk"] = markdown(machine, searches)
    if ranker:
        texts["ranker"] = ranker_markdown(machine, ranker)
    if arguments.svg and searches:
        draw(arguments.svg, machine, searches)
        if arguments.readme:
            link = os.path.relpath(arguments.svg, arguments.readme.parent)
            picture = f"![Time of a search, every contender, three batch sizes]({link})"
            texts["mips_topk"] = f"{picture}\n\n{texts['mips_topk']}"
    for stem, text in texts.items():
        if arguments.readme:
            write_readme(arguments.readme, stem, text)
        else:
            print(text)


if __name__ == "__main__":
    main()
