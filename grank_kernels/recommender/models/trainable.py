"""Whether a model can be trained on a split, checked before the first epoch."""

from grank_kernels.recommender.data.splits import Split
from grank_kernels.recommender.models.recommender import Recommender


def check_trainable(
    model: Recommender, split: Split, *, targets: int, context: int = 0, validate: bool = True, ranks: int = 1
) -> None:
    """Refuse what would fail, or train nothing, after a training has begun.

    Args:
        model: model to train.
        split: its `train` and `validation` are looked at.
        targets: number of items that a window predicts, as for `TrainingWindows`.
        context: number of items before them in a window.
        validate: whether the training validates.
        ranks: number of processes, which share the validation cases.

    Raises:
        ValueError: no history has an item to predict, there are fewer validation cases than processes, the model
            has another corpus, or a window is longer than the model reads.
    """
    lengths = split.train.lengths
    longest = int(lengths.max()) if len(lengths) else 0
    if longest < 2:
        raise ValueError(
            f"train must have a history of 2 items or more, since every item but the first is predicted, got "
            f"{len(lengths)} histories of at most {longest} (leave_one_out holds out 2 rows of users with 3 or more)"
        )
    if validate and len(split.validation) < ranks:
        raise ValueError(
            f"validation must have {'a case' if ranks == 1 else f'{ranks} cases, one for each process'}, got "
            f"{len(split.validation)} (leave_one_out makes one of each user with 3 rows or more)"
        )
    corpus = split.num_items if model.popularity is None else len(model.popularity)
    if split.num_items != corpus:
        raise ValueError(f"model must have the {split.num_items} items of the split, got one of {corpus}")
    window, most = min(longest, targets + max(context, 1)), model.longest_window
    if most is not None and window > most:
        raise ValueError(
            f"targets + context must be at most {most}, a history of {model.history} and the item after it, got "
            f"{targets} + {max(context, 1)} and histories of up to {longest} items"
        )
