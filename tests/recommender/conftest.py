"""One finished run of a tiny corpus, trained once a session however many workers there are."""

from pathlib import Path

import pytest
import torch
from filelock import FileLock  # torch needs it anyway
from tiny_runs import SETTINGS, write_circle

from grank_kernels.recommender.training.experiment import Experiment
from grank_kernels.recommender.training.run import run


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    """A folder with `circle.npz`, `grank.yaml` and the finished `run`. Tests only read it."""
    base = tmp_path_factory.getbasetemp()
    folder = (base if worker_id == "master" else base.parent) / "finished"
    with FileLock(f"{folder}.lock"):
        if not (folder / "run" / "report.json").exists():
            folder.mkdir()
            (folder / "grank.yaml").write_text(SETTINGS.format(data=write_circle(folder / "circle.npz")))
            threads = torch.get_num_threads()
            torch.set_num_threads(1)
            run(Experiment.load(folder / "grank.yaml"), folder / "run", progress=False)
            torch.set_num_threads(threads)
    return folder
