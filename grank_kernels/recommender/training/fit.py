"""Fitting a model; Lightning runs the loop, keeps checkpoints and stops early."""

import copy
import logging
import os
import signal
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint, Timer, TQDMProgressBar
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from lightning.pytorch.strategies import ModelParallelStrategy, Strategy
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import Tensor
from torch.utils.data import DataLoader

from grank_kernels.recommender.data import Batch, Split, TrainingWindows
from grank_kernels.recommender.models.embedding_model import EmbeddingModel
from grank_kernels.recommender.models.recommender import Recommender
from grank_kernels.recommender.models.sharding import shard
from grank_kernels.recommender.models.trainable import check_trainable
from grank_kernels.recommender.training.evaluation import metrics, recommend
from grank_kernels.recommender.training.run_folder import load_weights
from grank_kernels.recommender.training.settings import KS, TrainingConfig


class _Module(lightning.LightningModule):
    def __init__(self, model: Recommender, split: Split, config: TrainingConfig) -> None:
        super().__init__()
        self.model, self.split, self.config = model, split, config

    def train_dataloader(self) -> TrainingWindows:
        """The batches of this epoch; the trainer asks anew every epoch."""
        return TrainingWindows(
            self.split.train,
            targets=self.config.targets,
            context=self.config.context,
            batch_items=self.config.batch_items,
            seed=self.config.seed,
            epoch=self.trainer.current_epoch,
            rank=self.trainer.global_rank,
            ranks=self.trainer.world_size,
        )

    def val_dataloader(self) -> DataLoader[Tensor]:
        """Cases of the validation by number, shared out among the processes."""
        ranks, cases = self.trainer.world_size, len(self.split.validation)
        own = torch.arange(self.trainer.global_rank, cases, ranks)
        parts = -(-cases // (512 * ranks))  # on every rank as many, since a search in a split table takes all of them
        return DataLoader(list(torch.tensor_split(own, parts)), batch_size=None)  # type: ignore[arg-type]  # a list is a dataset

    def configure_model(self) -> None:
        """Weights become those of this rank; once, of a model that nobody else has."""
        if self.config.shard_items and self.model.group is None:
            mesh = self.device_mesh["data_parallel"]  # type: ignore[index]  # Lightning has set it
            shard(self.model, mesh)  # type: ignore[arg-type]  # `fit` has checked

    def on_fit_start(self) -> None:
        if self.trainer.world_size > 1:
            self.model.group = dist.group.WORLD

    def on_train_epoch_start(self) -> None:
        """Dropout and draws depend on seed, epoch and rank alone, so that a resumed run repeats what it lost."""
        torch.manual_seed((self.trainer.global_rank << 40) + (self.config.seed << 20) + self.current_epoch)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        losses = self.model.losses(batch)
        self.log_dict(
            dict(losses), prog_bar=True, on_step=False, on_epoch=True, batch_size=len(batch.items), sync_dist=True
        )
        return self.model.objective(losses)

    def on_train_epoch_end(self) -> None:
        """A loss that is lost stays lost: better to stop here, with the last good epoch on disk."""
        for name, value in self.trainer.callback_metrics.items():
            if not bool(torch.isfinite(value)):
                raise RuntimeError(
                    f"{name} is {float(value)} after epoch {self.current_epoch}, with learning_rate="
                    f"{self.config.learning_rate}; a smaller one, or a smaller clip, may keep it finite"
                )

    def validation_step(self, rows: Tensor, batch_idx: int) -> None:
        cases = self.split.validation.select(rows)
        ranked = self.config.monitor.startswith("ranked_")
        found = recommend(self.model, cases, max(KS), rank=ranked)
        values = metrics(found.retrieved, cases.targets, KS)
        if found.ranked is not None:
            second = metrics(found.ranked, cases.targets, KS)
            values |= {f"ranked_{name}": value for name, value in second.items()}
        self.log_dict(values, on_epoch=True, batch_size=len(cases), sync_dist=True)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(
            self.parameters(),
            lr=self.config.learning_rate,
            weight_decay=self.config.weight_decay,
            betas=(0.9, 0.98),
        )
        # The number of batches differs a little from epoch to epoch, so the schedule runs over the share of an epoch.
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, self._rate)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def _rate(self, step: int) -> float:
        done = min(1.0, step / max(1, self.config.epochs * self._steps_an_epoch))
        warm = 0.1
        if done < warm:
            return max(done, 1e-3) / warm
        return 0.5 * (1 + float(torch.cos(torch.tensor(torch.pi * (done - warm) / (1 - warm)))))

    @property
    def _steps_an_epoch(self) -> int:
        if not hasattr(self, "_steps"):
            self._steps = len(self.train_dataloader())
        return self._steps


class _Stopping(EarlyStopping):
    """Stops a run early, and one that had stopped before it is taken up again too."""

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        trainer.should_stop = trainer.should_stop or self.stopped_epoch > 0


def fit(
    model: Recommender,
    split: Split,
    config: TrainingConfig,
    *,
    folder: str | Path | None = None,
    progress: bool = True,
    tensorboard: bool = False,
    callbacks: Sequence[Callback] = (),
) -> float:
    """Fit a model to the training part of a split and choose its epoch by the validation part.

    With a folder the run writes `last.ckpt` after every epoch, `best.ckpt` after a validation that is better than those
    before it, and a CSV log. One that was stopped at any moment goes on from its last whole epoch when it is called
    again: everything random in an epoch follows from (seed, epoch), so it ends with the same weights, bit for bit, as
    one that was never stopped (with one number of threads).

    Several devices are left in a process group, for `ranks.leave`.

    Args:
        model: changed in place; ends in evaluation mode, on the CPU, with the weights of its best epoch.
        split: what to train on and to choose by.
        config: how.
        folder: of the run; None writes nothing and keeps the last epoch.
        progress: draw a progress bar.
        tensorboard: log for TensorBoard too.
        callbacks: further ones of Lightning's.

    Returns:
        Seconds spent in training, over all resumptions.

    Raises:
        ValueError: the split has nothing to train on or to validate by, see `check_trainable`; or the table is to be
            split, but there is no folder, one process alone, or a softmax over the corpus; or the monitor is of
            the second stage, which the model does not have.
        RuntimeError: the loss is no longer finite after an epoch.
        SystemExit: the process was asked to stop (SIGTERM); the run can be resumed.
        KeyboardInterrupt: it was interrupted; the run can be resumed.
    """
    if config.monitor.startswith("ranked_") and not model.ranks:
        raise ValueError(f"monitor must be of the retrieval for a model that does not rank, got {config.monitor!r}")
    if config.shard_items:
        _check_shardable(model, config, folder)
    validate = folder is not None or config.patience is not None
    check_trainable(
        model, split, targets=config.targets, context=config.context, validate=validate, ranks=config.devices
    )
    timer = Timer()  # its time is part of the checkpoints
    own: list[Callback] = [timer, *callbacks]
    if progress:  # without a terminal, one line an epoch
        own.append(TQDMProgressBar(refresh_rate=1 if sys.stdout.isatty() else 10**9))
    if config.patience is not None:
        own.append(_Stopping(config.monitor, mode="max", patience=config.patience))
    loggers: list[Logger] = []
    last = None
    if folder is not None:
        folder = Path(folder)
        own.append(ModelCheckpoint(folder, "best", config.monitor, mode="max", enable_version_counter=False))
        own.append(ModelCheckpoint(folder, "last", save_on_train_epoch_end=True, enable_version_counter=False))
        loggers.append(CSVLogger(folder, name="log"))
        if tensorboard:
            loggers.append(TensorBoardLogger(folder, name="tensorboard"))
        last = folder / "last.ckpt"
    nodes = int(os.environ.get("GROUP_WORLD_SIZE", "1"))  # torchrun's; alone, Lightning starts the processes itself
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="lightning")
        trainer = lightning.Trainer(
            max_epochs=config.epochs,
            devices=config.devices // nodes,
            num_nodes=nodes,
            strategy=_strategy(config),
            precision=config.precision,  # type: ignore[arg-type]
            gradient_clip_val=config.clip,
            reload_dataloaders_every_n_epochs=1,
            use_distributed_sampler=False,
            check_val_every_n_epoch=config.validate_every,
            num_sanity_val_steps=0,
            limit_val_batches=None if validate else 0,
            logger=loggers or False,
            enable_checkpointing=folder is not None,
            enable_model_summary=False,
            enable_progress_bar=progress,
            inference_mode=False,  # what FSDP2 brings together for a validation is used in training again
            callbacks=own,
        )
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision(config.matmul)
        try:
            resume = str(last) if last is not None and last.is_file() else None
            # Splitting replaces weights: of a copy, which ends with the fit.
            trained = copy.deepcopy(model) if config.shard_items else model
            trained.observe(split.train)
            trainer.fit(_Module(trained, split, config), ckpt_path=resume, weights_only=False)
        except SIGTERMException:  # Lightning ends the process with status 0, as if all had gone well
            raise SystemExit(128 + signal.SIGTERM) from None
        except SystemExit as stop:  # and with status 1 when it is interrupted
            if isinstance(stop.__context__, KeyboardInterrupt):
                raise KeyboardInterrupt from None
            raise
        finally:
            torch.set_float32_matmul_precision(before)
            model.group = None
    if folder is not None:
        load_weights(model, folder)
    model.cpu().eval()
    return timer.time_elapsed("train")


def _strategy(config: TrainingConfig) -> Strategy | str:
    if config.shard_items:
        # Checkpoints hold whole weights, as those of every other run: they are gathered on the first rank's host.
        return ModelParallelStrategy(config.devices, 1, save_distributed_checkpoint=False)
    return "ddp" if config.devices > 1 else "auto"


def _check_shardable(model: Recommender, config: TrainingConfig, folder: str | Path | None) -> None:
    if config.devices < 2:
        raise ValueError(f"shard_items takes devices of 2 or more, got {config.devices}")
    if folder is None:
        raise ValueError("shard_items takes a folder, through which the weights come together again, got None")
    if not isinstance(model, EmbeddingModel) or model.softmax != "batch":
        raise ValueError(
            'shard_items takes a model of softmax="batch", got one that needs the whole table at every step'
        )
