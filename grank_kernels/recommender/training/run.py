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
from grank_kernels.recommender.training.evaluation import evaluate_model, feedback_auc
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
    """Metrics on the test part of a split: of the retrieval, of the second stage for each k1, and its AUC.

    Also their standard errors over the users, and what the policy for repeated rows did: rows dropped, and targets that
    are in their own history, where they are never hit.
    """
    cases = split.test
    found = evaluate_model(model, cases, KS[experiment.data.protocol], k1=experiment.k1)
    report: dict[str, Any] = {"users": len(cases), **{name: sums.means() for name, sums in found.items()}}
    report["standard_errors"] = {name: sums.standard_errors() for name, sums in found.items()}
    report["repeats"] = {
        "policy": experiment.data.repeats,
        "dropped_rows": split.dropped_rows,
        "targets_in_history": int(cases.targets_in_history.sum()),
    }
    liked = cases.targets.feedback
    if model.ranks and bool(liked.any()) and not bool(liked.all()):
        report["auc"] = feedback_auc(model, cases)
    return report
