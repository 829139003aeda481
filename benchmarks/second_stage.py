"""Gain of a second stage over the order of the retrieval, for each user, with standard errors and by history length.

python -m benchmarks.second_stage RUN [RUN ...] [--k1 200] [--k 50]

The runs are seeds of one experiment. A user's gain is Recall@k after the second stage minus Recall@k before it,
averaged over the runs. Errors are standard errors over the users. The differences are paired by user, so their errors
are much smaller than those of the two recalls.
"""

import argparse
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.report import markdown_table
from grank_kernels.recommender.data import Split
from grank_kernels.recommender.training.evaluation import metrics_of_users, recommend
from grank_kernels.recommender.training.experiment import Experiment
from grank_kernels.recommender.training.run_folder import load_model

BOUNDS = (0, 32, 64, 128)  # history lengths; GRank's Generator reads the last 64 items


def recalls(folder: Path, split: Split, k1: int, k: int) -> tuple[Tensor, Tensor]:
    """Recall@k of each test user by the model of a run, before and after the second stage over k1 candidates."""
    found = recommend(load_model(folder, split.num_items), split.test, k1)
    if found.ranked is None:
        raise SystemExit(f"{folder} has no second stage")
    before, after = (metrics_of_users(lists, split.test.targets, (k,)) for lists in (found.retrieved, found.ranked))
    return before[f"recall@{k}"], after[f"recall@{k}"]


def table(lengths: Tensor, before: Tensor, after: Tensor, k: int) -> str:
    """Mean gain of the users of each range of history lengths, and of all users. Arguments are (U,)."""
    groups = [(f"{low + 1} to {high}", lengths.gt(low) & lengths.le(high)) for low, high in pairwise(BOUNDS)]
    groups += [(f"more than {BOUNDS[-1]}", lengths > BOUNDS[-1]), ("all", torch.ones_like(lengths, dtype=torch.bool))]
    rows = []
    for name, group in groups:
        gain = (after - before)[group]
        if len(gain) > 1:
            error = gain.std() / len(gain) ** 0.5
            figures = (f"{before[group].mean():.4f}", f"{after[group].mean():.4f}", f"{gain.mean():+.4f} ± {error:.4f}")
            rows.append([name, str(len(gain)), *(figure.replace("0.", ".") for figure in figures)])
    return markdown_table(["items in the history", "users", f"Recall@{k} before", "after", "gain"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--k1", type=int, default=200)
    parser.add_argument("--k", type=int, default=50)
    options = parser.parse_args()
    data = Experiment.load(options.runs[0] / "experiment.yaml").data
    split = data.split(data.read())
    both = torch.stack([torch.stack(recalls(run, split, options.k1, options.k)) for run in options.runs]).mean(0)
    print(table(split.test.histories.lengths, both[0], both[1], options.k))


if __name__ == "__main__":
    main()
