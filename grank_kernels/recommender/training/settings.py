"""`TrainingConfig`: settings of the training. Needs no trainer."""

from dataclasses import dataclass

from grank_kernels.recommender.settings import Settings, takes

KS = (10, 50)
"""The cuts k of the validation metrics."""

_METRICS = (*(f"{metric}@{k}" for k in KS for metric in ("hr", "recall", "ndcg")), "mrr")
_MONITORS = (*_METRICS, *(f"ranked_{name}" for name in _METRICS))


@dataclass(frozen=True)
class TrainingConfig(Settings):
    """Settings of the training.

    Attributes:
        epochs: largest number of passes over the training items.
        targets: number of items that a window predicts.
        context: number of items before the targets in a window.
        batch_items: number of items in a batch, padding included.
        learning_rate: highest learning rate, after a warm-up over the first tenth of the steps; a cosine follows.
        weight_decay: weight decay of AdamW.
        clip: largest norm of the gradient; above it the gradient is scaled down.
        precision: precision of Lightning: "32-true", "bf16-mixed" or "16-mixed".
        matmul: "highest", "high" or "medium", as `torch.set_float32_matmul_precision`: below "highest" float32 products
            may be computed from bfloat16 ones, which is faster on processors with AMX.
        validate_every: number of epochs between two validations.
        monitor: validation metric that selects the best epoch and stops early: "hr", "recall" or "ndcg" with "@10" or
            "@50", or "mrr"; with the prefix "ranked_" that of the second stage.
        patience: number of validations without improvement after which the training stops; None never stops early.
        seed: seed of weights, batches and dropout.
        devices: number of processes (DDP), of all hosts under torchrun. Each has batches of its own, and a step is that
            of their joint batch.
        shard_items: shard the item table and the other weights among the processes (FSDP2), for tables larger than one
            device's memory. Needs a model of `softmax="batch"` and a folder.
    """

    epochs: int = takes(20, least=1)
    targets: int = takes(200, least=1)
    context: int = takes(0, least=0)
    batch_items: int = takes(4096, least=1)
    learning_rate: float = takes(2e-3, above=0, most=1e30)  # within float32, with which the optimizer multiplies
    weight_decay: float = takes(0.01, least=0, most=1e6)
    clip: float = takes(10.0, above=0)
    precision: str = takes("32-true", choices=("32-true", "bf16-mixed", "16-mixed"))
    matmul: str = takes("highest", choices=("highest", "high", "medium"))
    validate_every: int = takes(1, least=1)
    monitor: str = takes("ndcg@10", choices=_MONITORS)
    patience: int | None = takes(None, least=0)
    seed: int = takes(0, least=0, below=2**20)
    devices: int = takes(1, least=1)
    shard_items: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.validate_every > self.epochs:
            raise ValueError(f"validate_every must be at most epochs, got {self.validate_every} of {self.epochs}")
