"""Training batches: windows of histories, redrawn every epoch and batched by length."""

from collections.abc import Iterator

import torch

from grank_kernels.recommender.data.histories import Batch, Histories


class TrainingWindows:
    """The batches of an epoch: windows in which every training item except a history's first is a target once.

    A history of n items makes `ceil((n - 1) / targets)` windows of at most `context + targets` items, or `targets + 1`
    without context. The newest `targets` items of a window are predicted, each from the items before it in the window.
    Windows start `targets` items apart, with a random shift as large as their number allows, so that over the epochs an
    item occurs at many positions.

    Batches have about the same number of items, not of windows: from a random pool of 16 batches, windows of similar
    length are batched together, so that 9 % of a batch is padding on MovieLens-1M instead of half.

    An epoch is a pure function of (seed, epoch), so an interrupted run resumes with the same batches.
    """

    def __init__(
        self,
        histories: Histories,
        *,
        targets: int,
        context: int = 0,
        batch_items: int,
        seed: int = 0,
        epoch: int = 0,
        rank: int = 0,
        ranks: int = 1,
    ) -> None:
        """Draw the windows and their order.

        Args:
            histories: training histories.
            targets: number of items that a window predicts.
            context: number of items before them in a window.
            batch_items: number of items in a batch, padding included. Of a window at most `targets + 1` items count, so
                that batches have about the same number of targets whatever the context.
            seed: seed of the windows and their order.
            epoch: number of the epoch.
            rank: rank of this process, which gets every `ranks`-th batch.
            ranks: number of processes; all have the same number of batches.
        """
        self._histories = histories
        self._targets, self._context = targets, context
        self._starts, self._stops = self._cut(torch.Generator().manual_seed(_mix(seed, epoch)))
        batches = self._batches(batch_items, torch.Generator().manual_seed(_mix(seed, epoch) + 1))
        wanted = -(-len(batches) // ranks) * ranks  # the first batches repeat, so that all processes have as many
        self._rows = [batches[i % len(batches)] for i in range(rank, wanted, ranks)]

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[Batch]:
        for rows in self._rows:
            yield self._histories.windows(self._starts[rows], self._stops[rows])

    def _cut(self, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """The first row of each window and the row after its last, (W,) int64 each."""
        offsets, targets = self._histories.offsets, self._targets
        begins, ends = offsets[:-1], offsets[1:]
        to_predict = (self._histories.lengths - 1).clamp(min=0)
        windows = -(-to_predict // targets)
        slack = windows * targets - to_predict  # the largest shift: target positions without an item
        shift = (torch.rand(len(begins), generator=generator) * (slack + 1)).long()
        users = torch.arange(len(begins)).repeat_interleave(windows)
        place = torch.arange(len(users)) - (windows.cumsum(0) - windows)[users]
        stops = (ends + shift)[users] - place * targets
        starts = (stops - targets - max(self._context, 1)).maximum(begins[users])
        return starts, stops.minimum(ends[users])

    def _batches(self, batch_items: int, generator: torch.Generator) -> list[torch.Tensor]:
        """The windows of each batch, in random order."""
        lengths = self._stops - self._starts
        order = torch.randperm(len(lengths), generator=generator)
        sizes = lengths.clamp(max=self._targets + 1)
        width = int(sizes.max()) if len(sizes) else 1
        batches = []
        for pool in torch.split(order, max(1, 16 * batch_items // width)):
            pool = pool[lengths[pool].argsort(stable=True)]
            while len(pool):  # sorted: the longest of a batch decides how many fit
                fitting = int((sizes[pool] * torch.arange(1, len(pool) + 1) <= batch_items).sum())
                batches.append(pool[: max(1, fitting)])
                pool = pool[max(1, fitting) :]
        return [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]


def _mix(seed: int, epoch: int) -> int:
    """A seed for torch's generator, distinct for 2^20 epochs of each seed; the next number is the epoch's second."""
    return (seed << 21) + 2 * epoch
