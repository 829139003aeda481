"""Progress of a training on standard error: a bar on a terminal, otherwise one line an epoch."""

import sys
from typing import Any

import lightning
from lightning.pytorch.callbacks import Callback
from tqdm import tqdm  # the usual bar; Lightning's subclass of it writes to standard output

_FORMAT = "{desc}{percentage:3.0f}%|{bar}| [{elapsed}<{remaining}{postfix}]"


class Progress(Callback):
    """Epoch, losses, validation metric and remaining time of the whole training.

    Standard output is left to the result; a process without standard error shows nothing.
    """

    def __init__(self, monitor: str) -> None:
        self._monitor = monitor
        self._bar: Any = None

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Draw the bar, on the first rank."""
        if trainer.is_global_zero and sys.stderr is not None and sys.stderr.isatty():
            self._bar = tqdm(total=trainer.max_epochs, initial=trainer.current_epoch, bar_format=_FORMAT)

    def on_train_epoch_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Show the number of the epoch."""
        if self._bar is not None:
            self._bar.set_description(f"epoch {trainer.current_epoch + 1}/{trainer.max_epochs}")

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Advance by a batch's share of an epoch."""
        if self._bar is not None:
            self._bar.update(trainer.current_epoch + (batch_idx + 1) / trainer.num_training_batches - self._bar.n)

    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Show losses and validation metric."""
        if not trainer.is_global_zero or sys.stderr is None:
            return
        shown = trainer.progress_bar_metrics | {
            name: float(value) for name, value in trainer.callback_metrics.items() if name == self._monitor
        }
        values = {name: f"{value:.4f}" for name, value in shown.items()}
        if self._bar is not None:
            self._bar.set_postfix(values)
        else:
            figures = ", ".join(f"{name} {value}" for name, value in values.items())
            print(f"epoch {trainer.current_epoch + 1}/{trainer.max_epochs}: {figures}", file=sys.stderr, flush=True)

    def on_train_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Leave the bar on the screen."""
        self._close()

    def on_exception(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, exception: BaseException
    ) -> None:
        """Leave the bar on the screen; the error is printed below it."""
        self._close()

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None
