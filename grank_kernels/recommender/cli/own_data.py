"""What `grank inspect` and `grank train FILE` say about a user's own file."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    from grank_kernels.recommender.data.own_file import Understood
    from grank_kernels.recommender.training.experiment import DataConfig, Experiment

YAML = (".yaml", ".yml")


def data_config(path: "Path", columns: Sequence[str | None], titles: "Path | None") -> "DataConfig":
    """Settings of a file of one's own: columns of user, item, time and rating, and a file of titles."""
    from grank_kernels.recommender.training.experiment import DataConfig

    user, item, time, rating = columns
    return DataConfig(
        "own",
        str(path),
        user_column=user,
        item_column=item,
        time_column=time,
        rating_column=rating,
        titles=None if titles is None else str(titles),
    )


def sized(understood: "Understood", data: "DataConfig", overrides: Sequence[str]) -> "Experiment":
    """The experiment for a file, with settings by its size where none are given."""
    from grank_kernels.recommender.training.sizing import experiment_for

    given = dict(each.partition("=")[::2] for each in overrides)
    if "settings.history" in given and "training.targets" not in given:  # a window predicts as many as the model reads
        overrides = [*overrides, f"training.targets={given['settings.history']}"]
    return experiment_for(understood, data).overridden(overrides)


def settings_line(experiment: "Experiment") -> str:
    """The settings that were picked, in one line."""
    flat = experiment.flat()
    names = ("settings.backbone", "settings.dim", "settings.history", "training.epochs", "training.batch_items")
    shown = ", ".join(f"{name}={flat[name]}" for name in names if name in flat)
    return f"settings by size: model={experiment.model}, {shown}, data.positive={experiment.data.positive:g}"
