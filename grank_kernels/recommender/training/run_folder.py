"""The folder of a run: the files in it and the model they hold. Needs no trainer."""

from pathlib import Path

import torch

from grank_kernels.recommender.models.recommender import Recommender
from grank_kernels.recommender.training.experiment import Experiment

EXPERIMENT, BEST, LAST, REPORT = "experiment.yaml", "best.ckpt", "last.ckpt", "report.json"
"""File names: settings, checkpoint of the best epoch, checkpoint of the last epoch, metrics."""


def check_run(folder: str | Path) -> None:
    """Check that a folder holds a run with weights.

    Raises:
        FileNotFoundError: the folder, the settings or the weights do not exist; the message says which.
    """
    folder = Path(folder)
    if not (folder / EXPERIMENT).is_file():
        got = f"{folder} without {EXPERIMENT}" if folder.is_dir() else f"{folder}, which does not exist"
        raise FileNotFoundError(f"folder must be the folder of a run, got {got}")
    if not (folder / BEST).is_file():
        raise FileNotFoundError(
            f"the run in {folder} has no weights yet: {BEST} is written after the first validation, and `grank train` "
            "resumes the run"
        )


def load_weights(model: Recommender, folder: str | Path) -> None:
    """Load the weights of the best epoch of a run into a model."""
    state = torch.load(Path(folder) / BEST, weights_only=True, map_location="cpu")["state_dict"]
    model.load_state_dict({name.removeprefix("model."): value for name, value in state.items()})


def load_model(folder: str | Path, num_items: int) -> Recommender:
    """The model of a run with the weights of its best epoch, in evaluation mode."""
    model = Experiment.load(Path(folder) / EXPERIMENT).build(num_items)
    load_weights(model, folder)
    return model.eval()
