"""Fitting a model; Lightning runs the loop."""

import logging
import signal
import sys
import warnings
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import Callback, TQDMProgressBar
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import Tensor

from grank_kernels.data import LeaveOneOut, TrainingWindows
from grank_kernels.models import GRank


class GRankTraining(lightning.LightningModule):
    """How a GRank is fitted: AdamW, a linear warm-up and a cosine decay, both losses with equal weight.

    Weight decay and gradient clipping are the paper's (0.01 and 10); its loss weights are not published.
    """

    def __init__(self, model: GRank, *, learning_rate: float, steps: int) -> None:
        super().__init__()
        self.model = model
        self.learning_rate = learning_rate
        self.steps = steps

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        """One batch of windows (B, W)."""
        retrieval, ranking = self.model.losses(batch)
        self.log_dict({"retrieval": retrieval, "ranking": ranking}, prog_bar=True, batch_size=len(batch))
        return retrieval + ranking

    def configure_optimizers(self) -> Any:
        """AdamW and its schedule, stepped after every batch."""
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.learning_rate, weight_decay=0.01)
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, self.learning_rate, total_steps=self.steps, pct_start=0.1, cycle_momentum=False
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def train_grank(
    split: LeaveOneOut,
    *,
    epochs: int,
    seed: int = 0,
    learning_rate: float = 3e-3,
    batch_size: int = 32,
    progress: bool = False,
    **model: Any,
) -> GRank:
    """Build a GRank and fit it to the training part of a split. Nothing is written to disk.

    Args:
        split: what to train on.
        epochs: passes over the training items.
        seed: fixes initial weights, batches and dropout; with one number of threads, the result.
        learning_rate: the highest of the schedule.
        batch_size: windows a step.
        progress: draw a progress bar.
        **model: arguments of `GRank`.

    Returns:
        The model in evaluation mode, on the CPU.
    """
    torch.manual_seed(seed)
    grank = GRank(split.num_items, **model)
    windows = TrainingWindows(
        split.train_offsets,
        split.train_items,
        history=max(grank.generator.history, grank.ranker.history),
        targets=grank.generator.history,
        batch_size=batch_size,
        seed=seed,
    )
    callbacks: list[Callback] = []
    if progress:  # without a terminal, one line an epoch
        callbacks.append(TQDMProgressBar(refresh_rate=1 if sys.stdout.isatty() else len(windows)))
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="lightning")
        trainer = lightning.Trainer(
            max_epochs=epochs,
            accelerator="auto",
            devices=1,
            gradient_clip_val=10.0,
            logger=False,
            enable_checkpointing=False,
            enable_model_summary=False,
            enable_progress_bar=progress,
            callbacks=callbacks,
        )
        try:
            trainer.fit(GRankTraining(grank, learning_rate=learning_rate, steps=epochs * len(windows)), windows)
        except SIGTERMException:  # Lightning ends the process with status 0, as if all had gone well
            raise SystemExit(128 + signal.SIGTERM) from None
    return grank.cpu().eval()
