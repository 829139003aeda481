"""`Users`: users of a data set with their histories, in the item numbers of a catalogue."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from grank_kernels.recommender.data.histories import Histories
from grank_kernels.recommender.data.interactions import Interactions
from grank_kernels.recommender.data.splits import all_histories
from grank_kernels.recommender.serving.catalogue import Catalogue


@dataclass(frozen=True)
class Users:
    """Users to recommend to.

    Attributes:
        ids: (U,) external ids, integers or strings, ascending.
        histories: of the U users, in item numbers of the catalogue; these items are not recommended.
        skipped: number of items of the data set that are not in the catalogue and were left out of the histories.
    """

    ids: npt.NDArray[Any]
    histories: Histories
    skipped: int = 0

    @classmethod
    def of(cls, interactions: Interactions, catalogue: Catalogue, positive: float) -> "Users":
        """All users of a data set with their whole histories.

        Args:
            interactions: the data set.
            catalogue: of the model, which may know other items than the data set.
            positive: lowest rating that counts as positive feedback.

        Raises:
            TypeError: integer item ids for a catalogue of strings, or the other way around.
            ValueError: none of the data set's items is in the catalogue.
        """
        histories, skipped = renumbered(all_histories(interactions, positive), interactions.item_ids, catalogue)
        return cls(interactions.user_ids, histories, skipped)


def renumbered(histories: Histories, item_ids: npt.NDArray[Any], catalogue: Catalogue) -> tuple[Histories, int]:
    """Histories in item numbers of a catalogue, without items that it lacks, and the number of these items.

    Args:
        histories: positions in `item_ids`.
        item_ids: (N,) the items of a data set.
        catalogue: of the model.

    Raises:
        TypeError: integer item ids for a catalogue of strings, or the other way around.
        ValueError: none of the items is in the catalogue.
    """
    numbers = catalogue.find(item_ids)
    known = int(np.count_nonzero(numbers >= 0))
    if known == 0 and len(numbers):
        raise ValueError(f"interactions must have items of the catalogue, got none, e.g. {item_ids[0].item()!r}")
    items = torch.from_numpy(numbers)[histories.items]
    kept = items >= 0
    rows_before = torch.cat([torch.zeros(1, dtype=torch.int64), kept.cumsum(0)])
    offsets = rows_before[histories.offsets]
    return Histories(offsets, items[kept], histories.feedback[kept]), len(numbers) - known
