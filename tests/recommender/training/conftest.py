"""A tiny corpus, and one finished run of it that tests copy."""

import shutil
from pathlib import Path

import pytest
import torch
from tiny_runs import SETTINGS, write_circle

from grank_kernels.recommender.training.experiment import Experiment
from grank_kernels.recommender.training.run import run


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "grank.yaml"
    path.write_text(SETTINGS.format(data=write_circle(tmp_path / "circle.npz")))
    return path


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `circle.npz`, `grank.yaml` and the finished `run`; tests work on the copy of `trained`."""
    folder = tmp_path_factory.mktemp("finished")
    (folder / "grank.yaml").write_text(SETTINGS.format(data=write_circle(folder / "circle.npz")))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    run(Experiment.load(folder / "grank.yaml"), folder / "run", progress=False)
    torch.set_num_threads(threads)
    return folder


@pytest.fixture
def trained(finished: Path, tmp_path: Path) -> Path:
    """A copy of the finished run; its data stays where it was."""
    return Path(shutil.copytree(finished / "run", tmp_path / "run"))
