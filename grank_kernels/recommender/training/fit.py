"""`fit`: train a model with Lightning, which runs the loop, distributes it and stops it early."""

import copy
import logging
import os
import signal
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import Callback, EarlyStopping, Timer
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from lightning.pytorch.utilities.exceptions import SIGTERMException

from grank_kernels.recommender.data import Split
from grank_kernels.recommender.models.embedding_model import EmbeddingModel
from grank_kernels.recommender.models.recommender import Recommender
from grank_kernels.recommender.models.trainable import check_trainable
from grank_kernels.recommender.training.checkpoint import read_checkpoint, read_weights
from grank_kernels.recommender.training.data_record import digest_of_split
from grank_kernels.recommender.training.lightning_files import Checkpoints, SafeCheckpointIO, ShardedStrategy
from grank_kernels.recommender.training.module import TrainingModule
from grank_kernels.recommender.training.progress import Progress
from grank_kernels.recommender.training.run_folder import BEST, resumable
from grank_kernels.recommender.training.settings import TrainingConfig

_LOG = logging.getLogger(__name__)


def fit(
    model: Recommender,
    split: Split,
    config: TrainingConfig,
    *,
    folder: str | Path | None = None,
    progress: bool = True,
    tensorboard: bool = False,
    data_changed: bool = False,
    callbacks: Sequence[Callback] = (),
) -> float:
    """Train a model on the training part of a split and select the best epoch by the validation part.

    With a folder, every epoch writes `last.ckpt`, every epoch with the best validation so far writes `best.ckpt`, and a
    CSV log is kept. A run that was stopped at any moment is resumed after its last whole epoch by the same call: all
    random numbers of an epoch follow from (seed, epoch, rank), so the weights equal those of a run that was never
    stopped, bit for bit (with the same number of threads).

    With several devices the process group is left open; `ranks.leave` closes it.

    Args:
        model: changed in place; ends in evaluation mode, on the CPU, with the weights of the best epoch.
        split: training and validation data.
        config: settings of the training.
        folder: folder of the run; None writes nothing and keeps the weights of the last epoch.
        progress: show the progress on standard error.
        tensorboard: write logs for TensorBoard too.
        data_changed: resume a run though its data has changed.
        callbacks: additional callbacks of Lightning.

    Returns:
        Seconds of training, over all resumptions.

    Raises:
        ValueError: the split has nothing to train on or to validate by, see `check_trainable`; the folder holds a run
            with other settings or data; the monitor is a metric of a second stage that
            the model does not have; `shard_items` without a folder, with one device or with a softmax over the corpus.
        FloatingPointError: a loss is NaN or infinite after an epoch.
        SystemExit: the process received SIGTERM; the run can be resumed.
        KeyboardInterrupt: the run can be resumed.
    """
    check_fit(model, split, config, folder)
    folder = None if folder is None else Path(folder)
    resumed = None if folder is None else resumable(folder)
    facts = {"model": type(model).__name__, "data": digest_of_split(split), **config.to_dict()}
    steps = -1 if resumed is None else _steps_of(resumed, facts, data_changed)
    timer = Timer()  # its time is part of the checkpoints
    own = [timer, *callbacks, *_callbacks(config, folder, resumed, progress)]
    trainer = _trainer(config, folder, own, tensorboard)
    trained = copy.deepcopy(model) if config.shard_items else model  # sharding replaces parameters: those of a copy
    trained.observe(split.train)
    with _matmul_precision(config.matmul), _plain_exits(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="lightning")
        try:
            module = TrainingModule(trained, split, config, facts)
            trainer.fit(module, ckpt_path=None if resumed is None else str(resumed), weights_only=True)
        finally:
            model.group = None
    if trainer.global_step == steps and trainer.is_global_zero:
        _tell(f"nothing to train: the run in {folder} is finished", progress)
    if folder is not None:
        model.load_state_dict(read_weights(folder / BEST))
    model.cpu().eval()
    return timer.time_elapsed("train")


def _steps_of(checkpoint: Path, facts: dict[str, Any], data_changed: bool) -> int:
    """Optimizer steps in a checkpoint, which must be one of the same training."""
    state = read_checkpoint(checkpoint)
    before, now = dict(state.get("training") or {}), dict(facts)
    if data_changed:
        before.pop("data", None), now.pop("data")
    differing = [
        f"{name} {before.get(name)} there, {value} here" for name, value in now.items() if before.get(name) != value
    ]
    if differing:
        got = f"{checkpoint.parent} with {', '.join(differing)}"
        raise ValueError(f"folder must be new or hold a run of the same training, got {got}")
    return int(state["global_step"])


def _tell(text: str, progress: bool) -> None:
    if progress and sys.stderr is not None:
        print(text, file=sys.stderr)
    else:
        _LOG.info(text)


class _Stopping(EarlyStopping):
    """Early stopping that stays stopped when the run is resumed."""

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        trainer.should_stop = trainer.should_stop or self.stopped_epoch > 0


def _callbacks(config: TrainingConfig, folder: Path | None, resumed: Path | None, progress: bool) -> list[Callback]:
    chosen: list[Callback] = []
    if progress:
        chosen.append(Progress(config.monitor))
    if config.patience is not None:
        chosen.append(_Stopping(config.monitor, mode="max", patience=config.patience))
    if folder is not None:
        chosen.append(Checkpoints(folder, config.monitor, resumed))
    return chosen


def _trainer(
    config: TrainingConfig, folder: Path | None, callbacks: list[Callback], tensorboard: bool
) -> lightning.Trainer:
    nodes = int(os.environ.get("GROUP_WORLD_SIZE", "1"))  # of torchrun; without it Lightning starts the processes
    loggers: list[Logger] = []
    if folder is not None:
        loggers.append(CSVLogger(folder, name="log"))
        if tensorboard:
            loggers.append(TensorBoardLogger(folder, name="tensorboard"))
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="lightning")
        return lightning.Trainer(
            max_epochs=config.epochs,
            devices=config.devices // nodes,
            num_nodes=nodes,
            strategy=ShardedStrategy(config.devices) if config.shard_items else "ddp" if config.devices > 1 else "auto",
            plugins=None if config.shard_items else SafeCheckpointIO(),
            precision=config.precision,  # type: ignore[arg-type]
            gradient_clip_val=config.clip,
            reload_dataloaders_every_n_epochs=1,
            use_distributed_sampler=False,
            check_val_every_n_epoch=config.validate_every,
            num_sanity_val_steps=0,
            limit_val_batches=None if _validates(config, folder) else 0,
            logger=loggers or False,
            enable_checkpointing=folder is not None,
            enable_model_summary=False,
            enable_progress_bar=False,
            inference_mode=False,  # FSDP2 gathers weights for a validation and uses them in training again
            callbacks=callbacks,
        )


@contextmanager
def _matmul_precision(precision: str) -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@contextmanager
def _plain_exits() -> Iterator[None]:
    """SIGTERM as exit status 143, and Ctrl-C as KeyboardInterrupt: Lightning makes exit statuses 0 and 1 of them."""
    try:
        yield
    except SIGTERMException:
        raise SystemExit(128 + signal.SIGTERM) from None
    except SystemExit as stop:
        if isinstance(stop.__context__, KeyboardInterrupt):
            raise KeyboardInterrupt from None
        raise


def _validates(config: TrainingConfig, folder: str | Path | None) -> bool:
    return folder is not None or config.patience is not None


def check_fit(model: Recommender, split: Split, config: TrainingConfig, folder: str | Path | None) -> None:
    """Check the arguments of `fit`, which it does itself, before anything is written.

    Raises:
        ValueError: as `fit`.
    """
    if config.monitor.startswith("ranked_") and not model.ranks:
        raise ValueError(
            f"monitor must be a metric of the retrieval, for a model that does not rank, got {config.monitor!r}"
        )
    if config.shard_items:
        _check_shardable(model, config, folder)
    check_trainable(
        model,
        split,
        targets=config.targets,
        context=config.context,
        validate=_validates(config, folder),
        ranks=config.devices,
    )


def _check_shardable(model: Recommender, config: TrainingConfig, folder: str | Path | None) -> None:
    if config.devices < 2:
        raise ValueError(f"shard_items takes devices of 2 or more, got {config.devices}")
    if folder is None:
        raise ValueError("shard_items takes a folder, from which the whole weights are read at the end, got None")
    if not isinstance(model, EmbeddingModel) or model.softmax != "batch":
        raise ValueError(
            'shard_items takes a model of softmax="batch", got one that needs the whole table at every step'
        )
