"""Pictures of a benchmark run, as PNG. The same run and the same matplotlib give the same bytes."""

import io
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import matplotlib as mpl
from PIL import Image

from benchmarks.runs import ROW_GROUPS, Case, Run, middle, ours

mpl.use("agg")
mpl.rcParams |= {"font.size": 9, "font.family": "DejaVu Sans", "savefig.dpi": 110}
from matplotlib import pyplot as plt  # noqa: E402 - the renderer must be chosen first

COLOURS = {"ours": "#1f5fa8", "peer": "#b8bec6"}
BLUES = ("#0b3c78", "#1f77c4", "#2ca8c2", "#7a5fd0", "#5f8fd8")
WARM = ("#b5432a", "#d98c21", "#5d7a1f", "#8c564b", "#c2588f", "#6b6b6b", "#a08a4a", "#e07a5f", "#444444")
MARKS = "os^Dv<>PX*hd"
Styles = dict[str, dict[str, Any]]


def save(figure: Any, path: Path) -> None:
    """Writes a PNG of at most 256 colours: a third of the bytes of full colour."""
    path.parent.mkdir(parents=True, exist_ok=True)
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", facecolor="white")
    plt.close(figure)
    with Image.open(drawn) as picture:
        reduced = picture.convert("RGB").quantize(256, method=Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE)
    reduced.save(path, optimize=True)


def bars(path: Path, run: Run, cases: list[Case], names: list[str], batches: list[int]) -> None:
    """Times of the searches of one table, k = 100: one panel per batch size, one bar per method."""
    figure, panels = plt.subplots(1, len(batches), figsize=(10, 0.3 * len(names) + 1.2), sharey=True)
    found = {(case["method"], case["B"]): case["median"] * 1e3 for case in cases if case["k"] == 100}
    for panel, B in zip(panels, batches, strict=True):
        times = [found.get((name, B), 0) for name in names]
        colours = [COLOURS["ours" if name.startswith("mips_topk") else "peer"] for name in names]
        panel.barh(names, times, color=colours, height=0.72)
        for y, time in enumerate(times):
            label = f"{time:,.0f}" if time >= 1000 else f"{time:.3g}" if time else "not run"
            panel.text(time, y, f" {label}", va="center", fontsize=8, color="#404040")
        panel.set_title(f"B = {B}", fontsize=10)
        panel.set_xlim(0, max(times) * 1.22)
        panel.set_xlabel("ms per call")
        panel.spines[["top", "right", "left"]].set_visible(False)
        panel.tick_params(axis="y", length=0)
    some = cases[0]
    figure.suptitle(f"Top 100 of {some['N']:_} x {some['d']}, {where(run, some)}: measured", fontsize=10)
    figure.tight_layout()
    save(figure, path)


def where(run: Run, case: Case) -> str:
    on_cpu = f"{run.machine['threads']} threads, {case['isa']}"
    return on_cpu if case["device"] == "cpu" else str(case["device"])


def roofline(path: Path, run: Run) -> None:
    """Roofline: operations per second over operations per byte of every method and op, with the machine's limits."""
    cases = [case for case in run.of("mips_topk") if (case["N"], case["d"]) == middle(run.of("mips_topk"))]
    cases = [case for case in cases if case["k"] == 100] + run.of("score_candidates", "candidate_cross_attention")
    cases = [case for case in cases if "compiled" not in case["method"] and case["device"] == "cpu"]
    names, read, multiply = styles(cases), *(run.limits["cpu"][kind] for kind in ("read GB/s", "matmul Gop/s"))
    figure, panels = plt.subplots(1, len(ROW_GROUPS), figsize=(11, 4.6), sharey=True, layout="constrained")
    for panel, (group, dtypes) in zip(panels, ROW_GROUPS.items(), strict=True):
        some = [case for case in cases if case["dtype"] in dtypes]
        _roofs(panel, read, {t: multiply[t] for t in multiply if t in ("float32", *dtypes)})
        for name, points in _by_method(some).items():
            x = [case["operations"] / case["bytes"] for case in points]
            y = [case["operations"] / case["median"] / 1e9 for case in points]
            line = "-" if points[0]["op"] == "mips_topk" else ""
            panel.plot(x, y, linestyle=line, linewidth=0.7, label=name, **names[name])
        panel.set_title(group, fontsize=10)
        panel.set_xlabel("operations a byte")
    panels[0].set_ylabel("Gop/s")
    _finish(figure, panels, f"Roofline, {where(run, cases[0])}: measured")
    save(figure, path)


def _roofs(panel: Any, read: dict[str, float], multiply: dict[str, float]) -> None:
    """Slopes: read bandwidth of memory and of the fastest cache. Levels: rates of torch's matrix product."""
    panel.set(xscale="log", yscale="log", xlim=(0.3, 3000), ylim=(0.5, 10_000))
    for name in (min(read, key=read.__getitem__), max(read, key=read.__getitem__)):
        panel.plot([0.3, 3000], [0.3 * read[name], 3000 * read[name]], color="#9aa3ad", linewidth=0.8)
        edge = 9000 / read[name]  # x where the slope reaches the top of the panel
        text = f"read {name}: {read[name]:.0f} GB/s "
        panel.text(edge, 9000, text, fontsize=6, rotation=90, ha="right", va="top", color="#606870")
    for name, rate in multiply.items():
        panel.axhline(rate, color="#9aa3ad", linewidth=0.8, linestyle="--")
        panel.text(0.33, rate * 1.06, f"matmul {name}: {rate:.0f} Gop/s", fontsize=6, color="#606870")


def recall_curves(path: Path, run: Run) -> None:
    """Queries per second over recall: one row of panels per set of vectors, one column per batch size."""
    cases = run.of("recall")
    sets, batches = (list(dict.fromkeys(case[name] for case in cases)) for name in ("vectors", "B"))
    names = styles(cases)
    figure, panels = plt.subplots(
        len(sets), len(batches), figsize=(11, 3.6 * len(sets) + 1), squeeze=False, layout="constrained"
    )
    for row, vectors in zip(panels, sets, strict=True):
        for panel, B in zip(row, batches, strict=True):
            some = [case for case in cases if case["vectors"] == vectors and case["B"] == B]
            for name, points in _by_method(some).items():
                x, y = [case["recall"] for case in points], [case["queries"] / case["median"] for case in points]
                panel.plot(x, y, linestyle="-", linewidth=1, label=name, **names[name])
            panel.set(yscale="log", xlim=(min(0.5, *(c["recall"] for c in some)) - 0.02, 1.02))
            panel.set_title(f"{vectors}, {B} {'query' if B == 1 else 'queries'} per call", fontsize=10)
            panel.set_xlabel("recall of the true 100")
            panel.set_ylabel("queries per second")
    _finish(figure, panels.flat, f"Exact searches and indexes, {where(run, cases[0])}: measured")
    save(figure, path)


def axes(path: Path, run: Run) -> None:
    """Time of a search over each of N, d, B and k, the other three fixed."""
    cases = [case for case in run.of("mips_topk") if case["device"] == "cpu"]
    N, d = middle(cases)
    fixed = {"N": N, "d": d, "B": 16, "k": 100}
    names = styles(cases)
    figure, panels = plt.subplots(1, len(fixed), figsize=(11, 4.6), layout="constrained")
    for panel, axis in zip(panels, fixed, strict=True):
        others = {name: value for name, value in fixed.items() if name != axis}
        some = [case for case in cases if all(case[name] == value for name, value in others.items())]
        for name, points in _by_method(some).items():
            points.sort(key=lambda case: case[axis])
            x, y = [case[axis] for case in points], [case["median"] * 1e3 for case in points]
            if len(x) > 1:
                panel.plot(x, y, linestyle="-", linewidth=1, label=name, **names[name])
        panel.set(xscale="log", yscale="log", xlabel=axis)
        panel.set_xticks(ticks := sorted({case[axis] for case in some}), [f"{tick:_}" for tick in ticks], fontsize=7)
        panel.minorticks_off()
        panel.set_title(", ".join(f"{name} = {value:_}" for name, value in others.items()), fontsize=8)
    panels[0].set_ylabel("ms per call")
    _finish(figure, panels, f"Time of a search, {where(run, cases[0])}: measured")
    save(figure, path)


def _by_method(cases: list[Case]) -> dict[str, list[Case]]:
    found: dict[str, list[Case]] = {}
    for case in cases:
        found.setdefault(case["method"], []).append(case)
    return found


def styles(cases: Iterable[Case]) -> Styles:
    """Colour and mark of every method, in the order of the run; ours are blue."""
    names = list(dict.fromkeys(case["method"] for case in cases))
    mine = [name for name in names if ours({"method": name})]
    found = {}
    for group, colours in ((mine, BLUES), ([name for name in names if name not in mine], WARM)):
        for i, name in enumerate(group):
            found[name] = {"color": colours[i % len(colours)], "marker": MARKS[i % len(MARKS)], "markersize": 4.5}
    return found


def _finish(figure: Any, panels: Iterable[Any], title: str) -> None:
    """Adds grids, a title, and one legend below all panels."""
    handles: dict[str, Any] = {}
    for panel in panels:
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(color="#e8ebee", linewidth=0.6)
        panel.set_axisbelow(True)
        handles |= {label: handle for handle, label in zip(*panel.get_legend_handles_labels(), strict=True)}
    figure.suptitle(title, fontsize=10)
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=5, frameon=False, fontsize=7)
