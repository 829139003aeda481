"""`curves.png` and `report.html` of a run: the training, the metric over k, by history length and by popularity."""

import base64
import csv
import html
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from grank_kernels.common.atomic_files import replace_file, write_text
from grank_kernels.recommender.training.comparison import CURVE, LABELS, Comparison, table

CURVES, PAGE = "curves.png", "report.html"
_COLOURS = {"model": "#0072b2", "popularity": "#999999", "item_knn": "#d55e00"}  # told apart by the colour-blind too
_LENGTHS = (1, 6, 11, 21, 51, 101)
_COUNTS = (0, 1, 5, 20, 100, 1000)
_STYLE = """body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem}
table{border-collapse:collapse}td,th{padding:.3rem .8rem;text-align:right;border-bottom:1px solid #8884}
td:first-child,th:first-child{text-align:left}img{max-width:100%}
@media(prefers-color-scheme:dark){body{background:#111;color:#ddd}img{background:#fff}}"""


def write_pictures(folder: Path, compared: Comparison, report: dict[str, Any]) -> None:
    """Write both files into the folder of a run.

    Args:
        folder: of the run, whose log of the training is drawn.
        compared: metrics of the test users.
        report: the content of `report.json`.

    Raises:
        ImportError: matplotlib is not installed.
    """
    picture = _picture(folder, compared)
    with replace_file(folder / CURVES) as file:
        file.write(picture)
    metric = f"ndcg@{compared.ks[0]}"
    parts = [
        _html_table(table(report)),
        f'<img alt="curves" src="data:image/png;base64,{base64.b64encode(picture).decode()}">',
    ]
    for name, values, edges in (
        ("History length", compared.lengths, _LENGTHS),
        ("Rows of the target", compared.popularity, _COUNTS),
    ):
        labels, groups = _groups(values, edges)
        rows = [[name, "users", *(LABELS[each] for each in compared.contenders)]]
        for label, group in zip(labels, groups, strict=True):
            means = (f"{float(each.values[metric][group].mean()):.4f}" for each in compared.contenders.values())
            rows.append([label, f"{len(group):,}", *means])
        parts.append(f"<h2>{metric.upper()} by {name.lower()}</h2>{_html_table(rows)}")
    body = "\n".join(parts)
    title = html.escape(folder.resolve().name)
    write_text(
        folder / PAGE,
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title><style>{_STYLE}</style>'
        f"<h1>{title}</h1><p>{report['users']:,} test users; means and standard errors.</p>{body}</html>\n",
    )


def _picture(folder: Path, compared: Comparison) -> bytes:
    """Four panels as PNG."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg  # no global state, no display
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError("pictures need matplotlib: pip install 'grank-kernels[train]'") from None
    figure = Figure((11, 8), layout="constrained")
    FigureCanvasAgg(figure)
    (training, curve), (lengths, popularity) = figure.subplots(2, 2)
    _draw_training(training, folder)
    for name, each in compared.contenders.items():
        ks = [k for k in CURVE if f"recall@{k}" in each.values]
        means = [float(each.values[f"recall@{k}"].mean()) for k in ks]
        curve.plot(ks, means, marker="o", color=_COLOURS[name], label=LABELS[name])
    curve.set(xscale="log", xlabel="k", title="Recall@k on the test users", ylim=(0, None))
    curve.set_xticks(CURVE, list(map(str, CURVE)))
    curve.minorticks_off()
    curve.legend()
    metric = f"ndcg@{compared.ks[0]}"
    for axes, values, edges, label in (
        (lengths, compared.lengths, _LENGTHS, "items in the history"),
        (popularity, compared.popularity, _COUNTS, "training rows of the target"),
    ):
        labels, groups = _groups(values, edges)
        width = 0.8 / len(compared.contenders)
        for place, (name, each) in enumerate(compared.contenders.items()):
            means = [float(each.values[metric][group].mean()) for group in groups]
            axes.bar([x + width * place for x in range(len(groups))], means, width, color=_COLOURS[name])
        axes.set_xticks([x + 0.4 - width / 2 for x in range(len(groups))], labels)
        axes.set(xlabel=label, title=f"{metric.upper()} by {label}")
    raw = io.BytesIO()
    figure.savefig(raw, format="png", dpi=110)
    return raw.getvalue()


def _draw_training(axes: Any, folder: Path) -> None:
    """Loss and validation metrics by epoch, from the log of all resumptions."""
    points: dict[str, dict[int, float]] = {}
    for path in sorted(folder.glob("log/version_*/metrics.csv"), key=lambda path: path.stat().st_mtime):
        with path.open(newline="") as file:
            for row in csv.DictReader(file):
                epoch = int(float(row["epoch"])) + 1
                for name, value in row.items():
                    if value and name not in ("epoch", "step"):
                        points.setdefault(name, {})[epoch] = float(value)
    validation = axes.twinx()
    for name in ("retrieval", "ndcg@10"):
        if name in points:
            own = validation if "@" in name else axes
            colour = "#0072b2" if "@" in name else "#999999"
            own.plot(*zip(*sorted(points[name].items()), strict=True), color=colour)
            own.set_ylabel(f"validation {name.upper()}" if "@" in name else "training loss", color=colour)
    axes.set(xlabel="epoch", title="Training")


def _groups(values: Tensor, edges: Sequence[int]) -> tuple[list[str], list[Tensor]]:
    """Labels and user numbers of the groups between edges that have a user."""
    labels, groups = [], []
    for low, high in zip(edges, [*edges[1:], None], strict=True):
        mask = (values >= low) if high is None else (values >= low) & (values < high)
        group = mask.nonzero().squeeze(1)
        if len(group):
            labels.append(f"{low}+" if high is None else str(low) if high == low + 1 else f"{low}-{high - 1}")
            groups.append(group)
    if not groups:
        return ["all"], [torch.arange(len(values))]
    return labels, groups


def _html_table(rows: Sequence[Sequence[str]]) -> str:
    head, *body = rows

    def cells(row: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in row) + "</tr>"

    return f"<table>{cells(head, 'th')}{''.join(cells(row, 'td') for row in body)}</table>"
