"""`run` trains a model and reports on it; `evaluate` computes the report."""

import json
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from grank_kernels.common.atomic_files import write_text
from grank_kernels.doctor import show_config
from grank_kernels.recommender.data import Split
from grank_kernels.recommender.models.recommender import Recommender
from grank_kernels.recommender.training.evaluation import DEPTH, feedback_auc, metrics, recommend
from grank_kernels.recommender.training.experiment import KS, Experiment
from grank_kernels.recommender.training.fit import fit
from grank_kernels.recommender.training.run_folder import EXPERIMENT, REPORT


def run(experiment: Experiment, folder: str | Path, *, progress: bool = True) -> dict[str, Any]:
    """Train a model, or resume an interrupted run, and evaluate it on the test part of the split.

    Writes `experiment.yaml`, the checkpoints, a CSV log and `report.json` into the folder.

    Args:
        experiment: settings of model, data and training.
        folder: folder of the run.
        progress: draw a progress bar.

    Returns:
        The content of `report.json`: metrics, seconds of training, threads and machine. With several processes the
        first one returns the report and the others an empty dictionary.

    Raises:
        ValueError: the folder holds a run of another experiment.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    record = folder / EXPERIMENT
    if not record.exists():
        experiment.save(record)
    elif Experiment.load(record) != experiment:
        raise ValueError(f"{folder} holds another experiment; take another folder or remove it")
    split = experiment.data.split(experiment.data.read())
    model = experiment.build(split.num_items)
    seconds = fit(model, split, experiment.training, folder=folder, progress=progress)
    if dist.is_initialized() and dist.get_rank() > 0:
        return {}
    report = evaluate(experiment, model, split) | {
        "seconds": round(seconds, 1),
        "threads": torch.get_num_threads(),
        "machine": show_config(),
    }
    write_text(folder / REPORT, json.dumps(report, indent=2) + "\n")
    return report


def evaluate(experiment: Experiment, model: Recommender, split: Split) -> dict[str, Any]:
    """Metrics on the test part of a split: of the retrieval, of the second stage for each k1, and its AUC."""
    cases, ks = split.test, [k for k in KS[experiment.data.protocol] if k <= split.num_items]
    found = recommend(model, cases, min(DEPTH, split.num_items), rank=False)
    report: dict[str, Any] = {"users": len(cases), "retrieved": metrics(found.retrieved, cases.targets, ks)}
    for k1 in experiment.k1 if model.ranks else ():
        second = recommend(model, cases, k1).ranked
        if second is None:
            raise RuntimeError("a model that ranks returned no ranking")
        report[f"ranked_{k1}"] = metrics(second, cases.targets, [k for k in ks if k <= k1])
    liked = cases.targets.feedback
    if model.ranks and bool(liked.any()) and not bool(liked.all()):
        report["auc"] = feedback_auc(model, cases)
    return report
