"""Training batches: windows of histories, cut anew each epoch, of like length side by side."""

from collections.abc import Iterator

import torch

from grank_kernels.recommender.data.histories import Batch, Histories


class TrainingWindows:
    """Batches of windows that hold every training item once as something to predict, cut anew each epoch.

    A history of n items makes `ceil((n - 1) / targets)` windows of at most `context + targets` items, of which the
    newest `targets` are there to be predicted, each from what stands before it in the window. They lie `targets` apart,
    and shift at random as far as their number allows, so that an item meets many places in a window over the epochs.

    Batches hold about as many items each rather than as many windows: within a few batches' worth of windows at random,
    windows of like length are put together, so that little of a batch is padding (9 % on MovieLens-1M, against half).

    An epoch is a pure function of (seed, epoch): a run that was stopped goes on with the batches it would have had.
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
        """Takes the histories.

        Args:
            histories: what training may see.
            targets: items that a window is to predict.
            context: items before them that a window may hold in addition.
            batch_items: items in a batch, padding included. Of each window no more than `targets + 1` count: batches
                are to ask for about as much, whatever context stands before it.
            seed: of the cuts and the order.
            epoch: which epoch to give.
            rank: this process among `ranks`, which share out every epoch; all have as many batches.
            ranks: number of processes.
        """
        self._histories = histories
        self._targets, self._context = targets, context
        self._starts, self._stops = self._cut(torch.Generator().manual_seed(_mix(seed, epoch)))
        batches = self._batches(batch_items, torch.Generator().manual_seed(_mix(seed, epoch) + 1))
        wanted = -(-len(batches) // ranks) * ranks  # some come twice, so that all processes have as many
        self._rows = [batches[i % len(batches)] for i in range(rank, wanted, ranks)]

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[Batch]:
        for rows in self._rows:
            yield self._histories.windows(self._starts[rows], self._stops[rows])

    def _cut(self, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        offsets, targets = self._histories.offsets, self._targets
        begins, ends = offsets[:-1], offsets[1:]
        to_predict = (self._histories.lengths - 1).clamp(min=0)
        windows = -(-to_predict // targets)
        slack = windows * targets - to_predict  # by how much they overlap, or reach past the user's first item
        shift = (torch.rand(len(begins), generator=generator) * (slack + 1)).long()
        users = torch.arange(len(begins)).repeat_interleave(windows)
        place = torch.arange(len(users)) - (windows.cumsum(0) - windows)[users]
        stops = (ends + shift)[users] - place * targets
        starts = (stops - targets - max(self._context, 1)).maximum(begins[users])
        return starts, stops.minimum(ends[users])

    def _batches(self, batch_items: int, generator: torch.Generator) -> list[torch.Tensor]:
        lengths = self._stops - self._starts
        order = torch.randperm(len(lengths), generator=generator)
        sizes = lengths.clamp(max=self._targets + 1)
        width = int(sizes.max()) if len(sizes) else 1
        batches = []
        for pool in torch.split(order, max(1, 16 * batch_items // width)):
            pool = pool[lengths[pool].argsort(stable=True)]
            while len(pool):  # the longest of a batch decides how many fit
                fitting = int((sizes[pool] * torch.arange(1, len(pool) + 1) <= batch_items).sum())
                batches.append(pool[: max(1, fitting)])
                pool = pool[max(1, fitting) :]
        return [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]


def _mix(seed: int, epoch: int) -> int:
    """One number from two, of which neighbours do not meet: 2^20 epochs a seed, two streams an epoch."""
    return (seed << 21) + 2 * epoch
