"""`run` trains a model and reports on it; `evaluate` computes the report."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from grank_kernels.common.atomic_files import write_text
from grank_kernels.doctor import show_config
from grank_kernels.recommender.data import Interactions, Split
from grank_kernels.recommender.models.recommender import Recommender
from grank_kernels.recommender.training.comparison import Comparison
from grank_kernels.recommender.training.data_record import checked_data, save_data
from grank_kernels.recommender.training.evaluation import MeanMetrics, evaluate_model, feedback_auc
from grank_kernels.recommender.training.experiment import KS, Experiment
from grank_kernels.recommender.training.fit import check_fit, fit
from grank_kernels.recommender.training.pictures import write_pictures
from grank_kernels.recommender.training.run_folder import (
    BEST,
    EXPERIMENT,
    REPORT,
    check_run,
    has_started,
    load_model,
    locked,
)

_SECONDS = 10.0  # between two versions of the report while the model is evaluated


def run(
    experiment: Experiment,
    folder: str | Path,
    *,
    data_changed: bool = False,
    progress: bool = True,
    compare: bool = False,
) -> dict[str, Any]:
    """Train a model, or resume an interrupted run, and evaluate it on the test part of the split.

    Writes the files that `run_folder` lists. During the evaluation `report.json` has
    `"incomplete": true` and covers the users so far.

    Args:
        experiment: settings of model, data and training.
        folder: folder of the run.
        data_changed: accept data that has changed since the run started; only items of the run are used.
        progress: show the progress on standard error.
        compare: evaluate the baselines too, and write `curves.png` and `report.html`.

    Returns:
        The content of `report.json`: metrics, seconds of training, threads and machine. With several processes the
        first one returns the report and the others an empty dictionary.

    Raises:
        FileNotFoundError: the data does not exist.
        ValueError: the folder holds another experiment, another process trains in it, the data has changed, or there
            is too little of it. A run that has finished no epoch is replaced.
    """
    folder, experiment = Path(folder), experiment.with_absolute_path()
    started = has_started(folder)
    if started:
        _check_same(folder, experiment)
    interactions = experiment.data.read()
    if started:
        interactions = checked_data(folder, interactions, data_changed=data_changed)
    split = experiment.data.split(interactions)
    model = experiment.build(split.num_items)
    check_fit(model, split, experiment.training, folder)
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder):
        if not started:
            if has_started(folder):
                raise ValueError(
                    f"folder must not be in use, got {folder}, where another process has trained meanwhile"
                )
            (folder / BEST).unlink(missing_ok=True)  # of a run that was killed in its first epoch
            save_data(folder, interactions)
        experiment.save(folder / EXPERIMENT)  # after everything was checked; a resumed run may find its data elsewhere
        seconds = fit(
            model, split, experiment.training, folder=folder, progress=progress, data_changed=started and data_changed
        )
        if dist.is_initialized() and dist.get_rank() > 0:
            return {}
        facts = {"seconds": round(seconds, 1), "threads": torch.get_num_threads(), "machine": show_config()}
        written = time.monotonic()

        def write_some(report: dict[str, Any]) -> None:
            nonlocal written
            if time.monotonic() > written + _SECONDS:
                _write(folder, report | facts | {"incomplete": True})
                written = time.monotonic()

        allow = _present(interactions)
        report = evaluate(experiment, model, split, allow=allow, each=write_some) | facts
        if compare:
            compared = Comparison.of(experiment, model, split, allow=allow)
            report = compared.to_dict() | report
            write_pictures(folder, compared, report)
        _write(folder, report)
        return report


def evaluate_run(folder: str | Path, *, data_changed: bool = False, compare: bool = False) -> dict[str, Any]:
    """The report of a run's model on the test part of its data as it is now.

    Args:
        folder: folder of the run.
        data_changed: accept data that has changed since the run started; only items that both have are recommended and
            asked for.
        compare: evaluate the baselines too.

    Raises:
        FileNotFoundError: the run or its data does not exist.
        ValueError: the data has changed.
    """
    folder = Path(folder)
    check_run(folder)
    experiment = Experiment.load(folder / EXPERIMENT)
    interactions = checked_data(folder, experiment.data.read(), data_changed=data_changed)
    split = experiment.data.split(interactions)
    model, allow = load_model(folder, split.num_items), _present(interactions)
    report = evaluate(experiment, model, split, allow=allow)
    return Comparison.of(experiment, model, split, allow=allow).to_dict() | report if compare else report


def evaluate(
    experiment: Experiment,
    model: Recommender,
    split: Split,
    *,
    allow: Tensor | None = None,
    each: Callable[[dict[str, Any]], None] | None = None,
) -> dict[str, Any]:
    """Metrics on the test part of a split: of the retrieval, of the second stage for each k1, and its AUC.

    Also their standard errors over the users, and what the policy for repeated rows did: rows dropped, and targets that
    are in their own history, where they are never hit.

    Args:
        experiment: settings of the model and of the protocol.
        model: in evaluation mode.
        split: data.
        allow: (N,) bool: items that may be recommended; None for all.
        each: called after every batch of users with the report on the users so far.
    """
    cases = split.test

    def report(found: dict[str, MeanMetrics]) -> dict[str, Any]:
        means = {name: sums.means() for name, sums in found.items()}
        errors = {name: sums.standard_errors() for name, sums in found.items()}
        return {"users": found["retrieved"].users, **means, "standard_errors": errors}

    found = evaluate_model(
        model,
        cases,
        KS[experiment.data.protocol],
        k1=experiment.k1,
        allow=allow,
        each=None if each is None else lambda so_far: each(report(so_far)),
    )
    whole = report(found)
    whole["repeats"] = {
        "policy": experiment.data.repeats,
        "dropped_rows": split.dropped_rows,
        "targets_in_history": int(cases.targets_in_history.sum()),
    }
    liked = cases.targets.feedback
    if model.ranks and bool(liked.any()) and not bool(liked.all()):
        whole["auc"] = feedback_auc(model, cases)
    return whole


def _present(interactions: Interactions) -> Tensor | None:
    """(N,) bool: items with rows; None if all have. An item of the run may have left the data."""
    present = torch.bincount(interactions.items, minlength=interactions.num_items) > 0
    return None if bool(present.all()) else present


def _check_same(folder: Path, experiment: Experiment) -> None:
    """Raise an error that names the settings in which the experiment of a folder differs; the data may have moved."""
    before, now = Experiment.load(folder / EXPERIMENT).flat(), experiment.flat()
    differing = [
        f"{name} is {before.get(name)} there, {now.get(name)} here"
        for name in before | now
        if before.get(name) != now.get(name) and name not in ("data.path", "data.titles")
    ]
    if differing:
        got = f"{folder} with another one: {'; '.join(differing)}"
        raise ValueError(f"folder must be new or hold a run of this experiment, got {got}")


def _write(folder: Path, report: dict[str, Any]) -> None:
    write_text(folder / REPORT, json.dumps(report, indent=2) + "\n")
