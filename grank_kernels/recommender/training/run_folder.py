"""The folder of a run: the files in it and the model they hold. Needs no trainer.

| file | content |
|---|---|
| `experiment.yaml` | all settings |
| `items.parquet` | item ids and titles by item number |
| `data.json` | facts about the data, and its digest |
| `last.ckpt`, `previous.ckpt` | state of the training after its last two epochs |
| `best.ckpt` | weights of the epoch with the best validation |
| `report.json` | test metrics |
| `curves.png`, `report.html` | pictures and tables of the training and the test (`grank train`) |
"""

import contextlib
import fcntl
import os
import shutil
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from grank_kernels.common.atomic_files import NO_FLOCK
from grank_kernels.recommender.models.recommender import Recommender
from grank_kernels.recommender.training.checkpoint import read_checkpoint, read_weights
from grank_kernels.recommender.training.experiment import Experiment

EXPERIMENT, ITEMS, DATA, REPORT = "experiment.yaml", "items.parquet", "data.json", "report.json"
BEST, LAST, PREVIOUS = "best.ckpt", "last.ckpt", "previous.ckpt"


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


def load_model(folder: str | Path, num_items: int) -> Recommender:
    """The model of a run with the weights of its best epoch, in evaluation mode.

    Raises:
        FileNotFoundError: the folder holds no run, or the run has no weights yet.
        ValueError: a file is damaged, or settings, weights and number of items do not fit each other.
    """
    folder = Path(folder)
    check_run(folder)
    experiment = Experiment.load(folder / EXPERIMENT)
    return model_with_weights(experiment, num_items, read_weights(folder / BEST), folder / BEST).eval()


def model_with_weights(
    experiment: Experiment, num_items: int, weights: Mapping[str, Tensor], path: Path
) -> Recommender:
    """The model of an experiment with given weights, which it keeps without a copy.

    It is built on the meta device: settings in a file cannot make it allocate more memory than the weights have.

    Args:
        experiment: settings of the model.
        num_items: number of items.
        weights: weights by name.
        path: their file, for the messages.

    Raises:
        ValueError: the weights are not those of the model.
    """
    settings = path.with_name(EXPERIMENT)
    if getattr(experiment.settings, "blocks", 0) > len(weights):
        raise ValueError(f"{settings}: settings.blocks must be at most the {len(weights)} tensors in {path.name}")
    try:
        with torch.device("meta"):
            model = experiment.build(num_items)
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"{settings}: no model can have these settings: {error}") from None
    for name, wanted in model.state_dict().items():
        if name in weights and weights[name].dtype != wanted.dtype:
            raise ValueError(f"{path}: {name} must be {wanted.dtype}, got {weights[name].dtype}")
    try:
        model.load_state_dict(weights, assign=True)
    except RuntimeError as error:
        first, *others = str(error).splitlines()[1:]  # after a line that says no more
        more = f" (and {len(others)} more)" if others else ""
        raise ValueError(
            f"{path} must hold the weights of the model of {EXPERIMENT}, got {first.strip()}{more}"
        ) from None
    return model


def has_started(folder: Path) -> bool:
    """Whether a run has finished its first epoch."""
    return (folder / LAST).exists() or (folder / PREVIOUS).exists()


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other processes from training in a folder, as far as its file system has locks (flock).

    Other ranks of the same run do not take the lock, which their first rank holds.

    Raises:
        ValueError: another process trains there.
    """
    if int(os.environ.get("RANK", os.environ.get("LOCAL_RANK", "0"))) > 0:
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"folder must not be in use, got {folder}, where another process trains") from None
        except OSError as error:
            if error.errno not in NO_FLOCK:
                raise
        yield
    finally:
        os.close(descriptor)


def keep_previous(folder: Path) -> None:
    """Give the last checkpoint a second name, which stays when the checkpoint is replaced."""
    last, previous = folder / LAST, folder / PREVIOUS
    if not last.exists():
        return
    previous.unlink(missing_ok=True)
    try:
        os.link(last, previous)
    except OSError:  # a file system without hard links
        shutil.copyfile(last, previous)


def resumable(folder: Path) -> Path | None:
    """The newest intact checkpoint of a run, or None for a run that has not finished its first epoch.

    Raises:
        ValueError: there are checkpoints, and all are damaged or of another kind.
    """
    damage = ""
    for path in (folder / LAST, folder / PREVIOUS):
        with contextlib.suppress(FileNotFoundError):
            try:
                read_checkpoint(path)
            except ValueError as error:
                damage = damage or str(error)
                continue
            if damage:
                warnings.warn(f"{damage}; the run goes on from {path}", RuntimeWarning, stacklevel=2)
            return path
    if damage:
        raise ValueError(f"{damage}; there is no other checkpoint to resume from: take another folder or remove it")
    return None
