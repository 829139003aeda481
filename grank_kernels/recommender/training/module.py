"""`TrainingModule`: the steps of training and validation as Lightning calls them."""

from collections.abc import Mapping
from typing import Any

import lightning
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import DataLoader

from grank_kernels.recommender.data import Batch, Split, TrainingWindows
from grank_kernels.recommender.models.recommender import Recommender
from grank_kernels.recommender.models.sharding import shard
from grank_kernels.recommender.training.evaluation import metrics, recommend
from grank_kernels.recommender.training.settings import KS, TrainingConfig

_WARM_UP = 0.1  # share of the training in which the learning rate rises


class TrainingModule(lightning.LightningModule):
    """A model with its data, losses, validation metrics, optimizer and schedule."""

    def __init__(
        self, model: Recommender, split: Split, config: TrainingConfig, facts: Mapping[str, Any] | None = None
    ) -> None:
        """Takes what `fit` takes, and the facts by which it recognises a checkpoint of the same training."""
        super().__init__()
        self.model, self.split, self.config, self._facts = model, split, config, facts

    def train_dataloader(self) -> TrainingWindows:
        """The batches of the current epoch; the trainer asks for them before every epoch."""
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
        """Positions of validation cases in batches; every rank has its share, and as many batches as the others."""
        ranks, cases = self.trainer.world_size, len(self.split.validation)
        own = torch.arange(self.trainer.global_rank, cases, ranks)
        parts = -(-cases // (512 * ranks))  # the same on every rank: the search of a sharded table is collective
        return DataLoader(list(torch.tensor_split(own, parts)), batch_size=None)  # type: ignore[arg-type]  # a list is a dataset

    def configure_model(self) -> None:
        """Shard the weights among the ranks, once."""
        if self.config.shard_items and self.model.group is None:
            mesh = self.device_mesh["data_parallel"]  # type: ignore[index]  # Lightning has set it
            shard(self.model, mesh)  # type: ignore[arg-type]  # `fit` has checked the type

    def on_fit_start(self) -> None:
        """Tell the model about the other ranks."""
        if self.trainer.world_size > 1:
            self.model.group = dist.group.WORLD

    def on_train_epoch_start(self) -> None:
        """Seed dropout and sampling from (seed, epoch, rank) alone: a resumed run repeats the epoch bit for bit."""
        torch.manual_seed((self.trainer.global_rank << 40) + (self.config.seed << 20) + self.current_epoch)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The objective of a batch."""
        losses = self.model.losses(batch)
        self.log_dict(
            dict(losses), prog_bar=True, on_step=False, on_epoch=True, batch_size=len(batch.items), sync_dist=True
        )
        return self.model.objective(losses)

    def on_train_epoch_end(self) -> None:
        """Stop if a loss is not finite: it stays so, and no checkpoint of this epoch has been written yet."""
        for name, value in self.trainer.callback_metrics.items():
            if not bool(torch.isfinite(value)):
                raise FloatingPointError(
                    f"{name} is {float(value)} after epoch {self.current_epoch + 1} of {self.config.epochs}: "
                    f"training.learning_rate={self.config.learning_rate} or training.clip={self.config.clip} is "
                    "too high"
                )

    def validation_step(self, rows: Tensor, batch_idx: int) -> None:
        """Metrics of a batch of validation cases."""
        cases = self.split.validation.select(rows)
        ranked = self.config.monitor.startswith("ranked_")
        found = recommend(self.model, cases, max(KS), rank=ranked)
        values = metrics(found.retrieved, cases.targets, KS)
        if found.ranked is not None:
            second = metrics(found.ranked, cases.targets, KS)
            values |= {f"ranked_{name}": value for name, value in second.items()}
        self.log_dict(values, on_epoch=True, batch_size=len(cases), sync_dist=True)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the facts."""
        checkpoint["training"] = self._facts

    def configure_optimizers(self) -> Any:
        """AdamW with a schedule that is updated after every batch."""
        optimizer = torch.optim.AdamW(
            self.parameters(),
            lr=self.config.learning_rate,
            weight_decay=self.config.weight_decay,
            betas=(0.9, 0.98),
        )
        steps = max(1, self.config.epochs * len(self.train_dataloader()))
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate(step / steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def rate(done: float) -> float:
    """Learning rate as a share of the highest: linear warm-up from 0.01 to 1, then a cosine to 0.

    `LinearLR` and `CosineAnnealingLR` in a `SequentialLR` would change phase at a whole step, and the number of steps
    is an estimate, since epochs differ by a few batches.

    Args:
        done: share of the training that is done; from 1 on the rate is 0.
    """
    if done < _WARM_UP:
        return max(done, 1e-3) / _WARM_UP
    phase = torch.tensor(torch.pi * (min(done, 1.0) - _WARM_UP) / (1 - _WARM_UP))
    return 0.5 * (1 + float(torch.cos(phase)))  # in float32, as in the recorded runs
