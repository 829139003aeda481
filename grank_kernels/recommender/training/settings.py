"""`TrainingConfig`: how a model is fitted. Needs no trainer."""

from dataclasses import dataclass

from grank_kernels.recommender.settings import Settings, takes

KS = (10, 50)
_METRICS = (*(f"{metric}@{k}" for k in KS for metric in ("hr", "recall", "ndcg")), "mrr")
_MONITORS = (*_METRICS, *(f"ranked_{name}" for name in _METRICS))


@dataclass(frozen=True)
class TrainingConfig(Settings):
    """How a model is fitted.

    Attributes:
        epochs: passes over the training items, at most.
        targets: items that each window is to predict.
        context: items before them that a window may hold in addition.
        batch_items: items in a batch, padding included.
        learning_rate: the highest; it warms up over the first tenth of the steps and falls along a cosine.
        weight_decay: of AdamW.
        clip: gradients are clipped to this norm.
        precision: of Lightning: "32-true", "bf16-mixed" or "16-mixed".
        matmul: "highest", "high" or "medium": whether float32 products may be made of bfloat16 ones
            (`torch.set_float32_matmul_precision`), which is what processors with AMX are fast at.
        validate_every: epochs between two validations.
        monitor: the validation metric that chooses the checkpoint and stops early: "hr", "recall" or "ndcg" "@10" or
            "@50", or "mrr", of the retrieval; with "ranked_" before it, after the second stage.
        patience: validations without a better one before the run stops; None never stops early.
        seed: of weights, batches and dropout.
        devices: processes that train together, each on batches of its own (DDP); with torchrun, those of all hosts. A
            step is that of their joint batch.
        shard_items: split the item table among them, for tables beyond one device's memory, and the other weights too
            (FSDP2). It needs a model of `softmax="batch"` and a folder.
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
