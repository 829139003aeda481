"""Checkpoint files of a run as Lightning writes and reads them: ours, never its own pickles."""

import math
import os
from pathlib import Path
from typing import Any

import lightning
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.plugins.io import CheckpointIO
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict, set_optimizer_state_dict
from torch.distributed.fsdp import FullyShardedDataParallel, OptimStateKeyType

from grank_kernels.recommender.training.checkpoint import read_checkpoint, write_checkpoint
from grank_kernels.recommender.training.run_folder import BEST, LAST, PREVIOUS, keep_previous


class SafeCheckpointIO(CheckpointIO):
    """Lightning's interface to `write_checkpoint` and `read_checkpoint`."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write a file."""
        write_checkpoint(path, checkpoint)

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        """Read a file; its tensors are on the CPU."""
        return read_checkpoint(path)

    def remove_checkpoint(self, path: Any) -> None:
        """Delete a file."""
        Path(path).unlink()


class ShardedStrategy(ModelParallelStrategy):
    """FSDP2 with whole weights in the checkpoints; Lightning's own loading would bypass `SafeCheckpointIO`."""

    def __init__(self, devices: int) -> None:
        super().__init__(devices, 1, save_distributed_checkpoint=False)
        self.checkpoint_io = SafeCheckpointIO()

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Every rank reads the file and takes its shard of weights and optimizer states."""
        checkpoint = self.checkpoint_io.load_checkpoint(self.broadcast(checkpoint_path))
        options = StateDictOptions(full_state_dict=True)
        model = self.model
        assert model is not None
        set_model_state_dict(model, checkpoint["state_dict"], options=options)
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            by_name = FullyShardedDataParallel.rekey_optim_state_dict(state, OptimStateKeyType.PARAM_NAME, model)
            set_optimizer_state_dict(model, optimizer, by_name, options=options)
        return checkpoint


class Checkpoints(Checkpoint):
    """Writes `last.ckpt` after every epoch, and `best.ckpt` if the epoch's validation was better than all before.

    Lightning calls it at the end of an epoch after all other callbacks. Its own `ModelCheckpoint` keeps absolute paths
    in the checkpoint, deletes the files that they name, and loses the best score if the folder was moved.
    """

    def __init__(self, folder: Path, monitor: str, resumed: Path | None) -> None:
        """Takes the folder of the run, the validation metric, and the checkpoint that the run is resumed from."""
        self._folder, self._monitor, self._resumed = folder, monitor, resumed
        self._best = -math.inf
        self._validated = False

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Replace a damaged last checkpoint by the one that the run is resumed from."""
        if trainer.is_global_zero and self._resumed == self._folder / PREVIOUS:
            os.replace(self._folder / PREVIOUS, self._folder / LAST)

    def on_validation_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Note that this epoch has a validation metric."""
        self._validated = True

    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Write the files; the best first, so that an epoch that is repeated after a kill writes the same two again."""
        if self._validated:
            self._validated = False
            score = float(trainer.callback_metrics[self._monitor])
            if score > self._best:
                self._best = score
                trainer.save_checkpoint(self._folder / BEST, weights_only=True)
        if trainer.is_global_zero:
            keep_previous(self._folder)
        trainer.save_checkpoint(self._folder / LAST)

    def state_dict(self) -> dict[str, Any]:
        """The best score so far."""
        return {"best": self._best}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The best score of the epochs before."""
        self._best = float(state_dict["best"])
