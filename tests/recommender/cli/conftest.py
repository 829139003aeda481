"""One small run that all tests of the commands read, trained once however many workers there are."""

from pathlib import Path

import pytest
import torch
from filelock import FileLock  # torch needs it anyway
from test_experiment import write_circle

from grank_kernels.recommender.training.experiment import Experiment
from grank_kernels.recommender.training.run import run

YAML = """
model: grank
settings: {{dim: 16, short_history: 8, long_history: 12, hidden: 16, negatives: 8}}
data: {{name: arrays, path: {path}}}
training: {{epochs: 1, targets: 8, context: 4, batch_items: 256}}
k1: [20]
"""


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    """A folder with the data, circle.npz, the experiment, grank.yaml, and its run, run/. Tests only read it."""
    base = tmp_path_factory.getbasetemp()
    folder = (base if worker_id == "master" else base.parent) / "shared_run"
    with FileLock(f"{folder}.lock"):
        if not (folder / "run" / "report.json").exists():
            folder.mkdir()
            path = folder / "grank.yaml"
            path.write_text(YAML.format(path=write_circle(folder / "circle.npz")))
            threads = torch.get_num_threads()
            torch.set_num_threads(1)
            run(Experiment.load(path), folder / "run", progress=False)
            torch.set_num_threads(threads)
    return folder


@pytest.fixture
def config(shared: Path) -> Path:
    return shared / "grank.yaml"


@pytest.fixture
def trained(shared: Path) -> Path:
    return shared / "run"
