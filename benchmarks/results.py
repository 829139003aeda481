"""The figures of docs/results.md: train every row, several seeds of the headline rows, and write the tables.

python -m benchmarks.results train --data ml-1m=DIR [--only unigrf] [--seeds 0 1 2] [--runs build/runs]
python -m benchmarks.results write [--runs build/runs] [--page docs/results.md] [--picture docs/results.png]

`train` resumes an interrupted run and skips finished ones. It uses one thread: start it twice, with different rows, on
two cores. `write` merges the reports of the runs, and the systems-ml-1m.json and systems-1000000.json of
benchmarks.retrieval_systems, into docs/results.json, which keeps the reports of earlier runs, and writes the tables of
the page from it, with the number of seeds of every figure.
"""

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any, NamedTuple

import torch

from benchmarks.report import markdown_table, write_section
from benchmarks.runs import few_digits
from grank_kernels.recommender.data import read
from grank_kernels.recommender.models.neighbours import ItemKNN, Popularity
from grank_kernels.recommender.training.evaluation import DEPTH, metrics
from grank_kernels.recommender.training.experiment import KS, Experiment
from grank_kernels.recommender.training.run import run

CONFIGS = Path(__file__).parent.parent / "configs"

SYSTEMS = ("systems-ml-1m", "systems-1000000")  # comparisons by benchmarks.retrieval_systems

Reports = dict[str, dict[str, Any]]  # by the name of a run's folder, or of a comparison


class Row(NamedTuple):
    """One line of a table: an experiment under each of its seeds, or a baseline that only counts."""

    name: str
    config: str
    overrides: tuple[str, ...] = ()
    headline: bool = False  # three seeds
    counts: type[Popularity] | type[ItemKNN] | None = None  # instead of the experiment's model

    @property
    def slug(self) -> str:
        parts = [self.config.replace("/", "-"), *(o.split(".", 1)[1].replace("=", "_") for o in self.overrides)]
        return "-".join(parts if self.counts is None else [parts[0], self.counts.__name__.lower()])


def ablated(name: str, *switches: str) -> Row:
    return Row(name, "ml-1m/unigrf-hstu", tuple(f"settings.{switch}=false" for switch in switches))


TABLES: dict[str, list[Row]] = {
    "ml-1m leave-one-out": [
        Row("popularity", "ml-1m/sasrec", counts=Popularity),
        Row("item-kNN", "ml-1m/sasrec", counts=ItemKNN),
        Row("SASRec", "ml-1m/sasrec", headline=True),
        Row("HSTU", "ml-1m/hstu", headline=True),
        Row("UniGRF, HSTU", "ml-1m/unigrf-hstu", headline=True),
        Row("UniGRF, Llama", "ml-1m/unigrf-llama", headline=True),
        ablated("UniGRF, HSTU, no enhancer", "enhancer"),
        ablated("UniGRF, HSTU, no weighter", "weighter"),
        ablated("UniGRF, HSTU, neither", "enhancer", "weighter"),
        ablated("UniGRF, HSTU, retrieval only", "ranking", "enhancer", "weighter"),
        ablated("UniGRF, HSTU, ranking only", "retrieval", "enhancer", "weighter"),
    ],
    "ml-1m half-and-half": [
        Row("popularity", "ml-1m/dssm", counts=Popularity),
        Row("item-kNN", "ml-1m/dssm", counts=ItemKNN),
        Row("DSSM", "ml-1m/dssm"),
        Row("GRank, Generator", "ml-1m/grank-generator", headline=True),
        Row("GRank, Generator + Ranker", "ml-1m/grank-ranker", headline=True),
        Row("GRank, Generator + auxiliary", "ml-1m/grank-auxiliary", headline=True),
        Row("GRank, whole", "ml-1m/grank", headline=True),
    ],
    "beauty leave-one-out": [
        Row("popularity", "beauty/sasrec", counts=Popularity),
        Row("item-kNN", "beauty/sasrec", counts=ItemKNN),
        Row("SASRec", "beauty/sasrec"),
        Row("HSTU", "beauty/hstu"),
    ],
    "nowplaying leave-one-out": [
        Row("popularity", "nowplaying/sasrec", counts=Popularity),
        Row("item-kNN", "nowplaying/sasrec", counts=ItemKNN),
        Row("SASRec", "nowplaying/sasrec"),
        Row("HSTU", "nowplaying/hstu"),
    ],
}


def train(runs: Path, data: dict[str, str], only: str, seeds: Sequence[int]) -> None:
    torch.set_num_threads(1)
    wanted = [(table, row, seed) for seed in seeds for table, rows in TABLES.items() for row in rows]
    for table, row, seed in wanted:
        folder = runs / f"{row.slug}-seed_{seed}"
        if only not in f"{table} {row.slug}" or (seed != seeds[0] and not row.headline):
            continue
        if is_done(folder / "report.json"):
            continue
        overrides = [*row.overrides, f"training.seed={seed}"]
        path = data.get(row.config.split("/")[0])
        if path is not None:
            overrides.append(f"data.path={path}")
        experiment = Experiment.load(CONFIGS / f"{row.config}.yaml", overrides)
        print(f"{folder.name}: {table}, {row.name}", flush=True)
        if row.counts is None:
            run(experiment, folder)
        else:
            count(experiment, row.counts, folder)


def is_done(report: Path) -> bool:
    """Whether a run has been evaluated on all users."""
    return report.exists() and "incomplete" not in json.loads(report.read_text())


def count(experiment: Experiment, counts: type[Popularity] | type[ItemKNN], folder: Path) -> None:
    """Write the report of a baseline that only counts."""
    split = experiment.data.split(read(experiment.data.name, experiment.data.path))
    start = time.perf_counter()
    fitted = counts.fit(split.train, split.num_items)
    seconds = time.perf_counter() - start
    cases = split.test
    found = fitted.recommend(cases.histories, min(DEPTH, split.num_items)).indices
    figures = metrics(found, cases.targets, KS[experiment.data.protocol])
    folder.mkdir(parents=True, exist_ok=True)
    report = {"users": len(cases), "retrieved": figures, "seconds": seconds}
    (folder / "report.json").write_text(json.dumps(report, indent=2) + "\n")


def flat(report: dict[str, Any]) -> dict[str, float]:
    """`{"retrieved": {"hr@10": x}, "auc": y}` to `{"retrieved hr@10": x, "auc": y}`."""
    figures = {}
    for name, value in report.items():
        if isinstance(value, dict):
            figures |= {f"{name} {metric}": figure for metric, figure in value.items() if isinstance(figure, float)}
        elif isinstance(value, float):
            figures[name] = value
    return figures


def known(record: Path, runs: Path) -> Reports:
    """The reports of the record and of the runs; those of the runs replace older ones."""
    reports: Reports = json.loads(record.read_text()) if record.exists() else {}
    paths = {path.parent.name: path for path in runs.glob("*-seed_*/report.json") if is_done(path)}
    paths |= {name: runs / f"{name}.json" for name in SYSTEMS if (runs / f"{name}.json").exists()}
    return reports | {name: json.loads(path.read_text()) for name, path in paths.items()}


def save(record: Path, reports: Reports) -> None:
    """Write one line for each run, with six digits, so that a diff of two records is readable."""
    lines = (f"{json.dumps(name)}: {few_digits(report, 6)}" for name, report in sorted(reports.items()))
    record.write_text("{\n" + ",\n".join(lines) + "\n}\n")


def collect(reports: Reports, row: Row) -> dict[str, list[float]]:
    """The figures of all finished seeds, by name."""
    found: dict[str, list[float]] = {}
    for run_name, report in sorted(reports.items()):
        if run_name.rpartition("-seed_")[0] == row.slug:
            for name, value in flat(report).items():
                found.setdefault(name, []).append(value)
    return found


def cell(values: list[float] | None) -> str:
    if not values:
        return ""
    spread = f" ± {stdev(values):.4f}".replace(" 0.", " .") if len(values) > 1 else ""
    return f"{mean(values):.4f}".replace("0.", ".", 1) + spread


def leave_one_out_table(reports: Reports, rows: list[Row]) -> str:
    header = ["", "n", "HR@10", "NDCG@10", "HR@50", "NDCG@50", "HR@200", "NDCG@200", "MRR", "AUC", "minutes"]
    names = [f"retrieved {metric}@{k}" for k in (10, 50, 200) for metric in ("hr", "ndcg")] + ["retrieved mrr", "auc"]
    return _table(reports, rows, header, names)


def half_and_half_table(reports: Reports, rows: list[Row], first: str) -> str:
    """Table of the first stage ("retrieved"), or of the second stage over k1 candidates ("ranked_<k1>")."""
    ks = (10, 50, 200, 500) if first == "retrieved" else (10, 50, *((200,) if first != "ranked_100" else ()))
    header = ["", "n", *(f"{metric}@{k}" for k in ks for metric in ("Recall", "NDCG")), "minutes"]
    return _table(reports, rows, header, [f"{first} {metric}@{k}" for k in ks for metric in ("recall", "ndcg")])


def _table(reports: Reports, rows: list[Row], header: list[str], names: list[str]) -> str:
    lines = []
    for row in rows:
        found = collect(reports, row)
        seconds = found.get("seconds", [])
        count = max((len(found[name]) for name in names if name in found), default=0)
        if count:
            minutes = f"{min(seconds) / 60:.0f}" if seconds else ""  # of the fastest seed
            lines.append([row.name, str(count), *(cell(found.get(name)) for name in names), minutes])
    return markdown_table(header, lines)


def systems_table(report: dict[str, Any]) -> str:
    """Retrieval systems at equal recall, by batch size."""
    header = ["", "B", "setting", f"recall@{report['k1']}", "p50 ms", "p99 ms", "users/s", "build s"]
    lines = []
    for row in sorted(report["systems"], key=lambda row: row["batch"]):
        missed = "" if row["reached"] else ", not reached"
        times = (f"{x:,.0f}" if x >= 100 else f"{x:.3g}" for x in (row["p50"], row["p99"]))
        numbers = [*times, f"{row['qps']:,.0f}", f"{row['build_s']:.1f}"]
        lines.append([row["system"], str(row["batch"]), row["setting"], f"{row['recall']:.3f}{missed}", *numbers])
    return markdown_table(header, lines)


def draw(path: Path, reports: Reports) -> None:
    """Two panels: HR@10 of leave-one-out; Recall@50 of half-and-half, after the second stage if there is one."""
    from benchmarks.pictures import COLOURS, plt, save

    figure, panels = plt.subplots(1, 2, figsize=(10, 3.2))
    for panel, table, title, choices in (
        (panels[0], "ml-1m leave-one-out", "HR@10, leave-one-out", ["retrieved hr@10"]),
        (panels[1], "ml-1m half-and-half", "Recall@50, half and half", ["ranked_200 recall@50", "retrieved recall@50"]),
    ):
        bars = {}
        for row in reversed(TABLES[table]):
            found = collect(reports, row)
            values = next((found[name] for name in choices if name in found), None)
            if values:
                bars[row.name] = mean(values)
        colours = [COLOURS["ours" if name.startswith(("UniGRF", "GRank")) else "peer"] for name in bars]
        panel.barh(list(bars), list(bars.values()), color=colours, height=0.72)
        for y, value in enumerate(bars.values()):
            panel.text(value, y, f" {value:.3f}", va="center", fontsize=8, color="#404040")
        panel.set_title(title, fontsize=10)
        panel.set_xlim(0, max(bars.values(), default=1) * 1.2)
        panel.spines[["top", "right", "left"]].set_visible(False)
        panel.tick_params(axis="y", length=0)
    figure.suptitle("MovieLens-1M, full corpus: measured", fontsize=10)
    figure.tight_layout()
    save(figure, path)


def write(page: Path, reports: Reports) -> None:
    for table, rows in TABLES.items():
        if table.endswith("leave-one-out"):
            write_section(page, table, leave_one_out_table(reports, rows))
        else:
            for first in ("retrieved", "ranked_100", "ranked_200", "ranked_500"):
                write_section(page, f"{table} {first}", half_and_half_table(reports, rows, first))
    for name in SYSTEMS:
        if name in reports:
            write_section(page, name, systems_table(reports[name]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("train", "write"):
        command = commands.add_parser(name)
        command.add_argument("--runs", type=Path, default=Path("build/runs"))
        if name == "train":
            command.add_argument("--data", nargs="*", default=[], metavar="FOLDER_OF_CONFIGS=PATH")
            command.add_argument("--only", default="", help="part of a table's or a row's name")
            command.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
        else:
            command.add_argument("--record", type=Path, default=Path("docs/results.json"))
            command.add_argument("--page", type=Path, default=Path("docs/results.md"))
            command.add_argument("--picture", type=Path)
    options = parser.parse_args()
    if options.command == "train":
        train(options.runs, dict(entry.split("=", 1) for entry in options.data), options.only, options.seeds)
    else:
        reports = known(options.record, options.runs)
        save(options.record, reports)
        write(options.page, reports)
        if options.picture is not None:
            draw(options.picture, reports)


if __name__ == "__main__":
    main()
