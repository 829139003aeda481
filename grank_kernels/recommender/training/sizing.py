"""Settings of a training picked by the size of the data. Needs no trainer."""

import torch

from grank_kernels.recommender.data.own_file import Understood
from grank_kernels.recommender.models.sequential import SequentialConfig
from grank_kernels.recommender.training.experiment import DataConfig, Experiment
from grank_kernels.recommender.training.settings import TrainingConfig

_EVENTS = 600_000  # that a training of a small file reads in all its epochs


def experiment_for(understood: Understood, data: DataConfig) -> Experiment:
    """An HSTU model with the softmax over all items, or over a sample of many, of a size that fits the data.

    Args:
        understood: the file.
        data: its settings; `positive` is replaced: 4 on a scale of five stars, the median of other ratings.
    """
    interactions = understood.interactions
    events, items = len(interactions), interactions.num_items
    lengths = interactions.offsets.diff().double()
    longest = int(torch.quantile(lengths[: 1 << 20], 0.9)) if len(lengths) else 1
    history = next(size for size in (16, 32, 64, 128, 200) if size >= longest or size == 200)
    epochs = min(max(_EVENTS // max(events, 1), 8), 40)
    settings = SequentialConfig(
        backbone="hstu",
        dim=32 if items < 1_000 else 64 if items < 200_000 else 128,
        history=history,
        softmax="corpus" if items <= 50_000 else "batch",
    )
    training = TrainingConfig(
        epochs=epochs, targets=history, batch_items=2048 if events < 1_000_000 else 4096, patience=4
    )
    values = {name: getattr(data, name) for name in data.to_dict()} | {"positive": _positive(understood)}
    return Experiment("sequential", settings, DataConfig(**values), training)


def _positive(understood: Understood) -> float:
    ratings = understood.interactions.ratings
    if understood.interactions.implicit or 4 < float(ratings.max()) <= 5:
        return 4.0
    return float(ratings.median())
