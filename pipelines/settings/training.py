"""Settings shared by all training runs."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pipelines.settings import check_at_least_1

Precision = Literal["auto", "fp32", "bf16"]


@dataclass(kw_only=True)
class Training:
    """Settings of every training run. Raises ValueError if a number is out of range."""

    steps: int = 500
    """Number of optimizer steps."""
    batch_size: int = 16
    """Clips per optimizer step, over all processes."""
    accumulate: int = 1
    """Gradient accumulation: number of parts that each batch is split into, to save memory. Results stay the same, except that
    losses that compare the clips of a batch (VIMPAC; the FSQ spread loss and LFQ entropy of a tokenizer) and the batch norm of a
    discriminator use one part only."""
    lr: float = 3e-3
    """Peak learning rate."""
    warmup: int = 50
    """Steps of linear learning-rate warm-up, followed by the decay."""
    decay: Literal["cosine", "linear"] = "cosine"
    """Shape of the learning-rate decay from the peak to the floor."""
    lr_floor: float = 0.01
    """Learning rate at the end, as a share of the peak."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay rates of the two moments of AdamW."""
    weight_decay: float = 0.05
    """Weight decay of AdamW, on matrices only."""
    clip_gradient: float = 1.0
    """Maximum norm of the gradient; larger gradients are scaled down."""
    precision: Precision = "auto"
    """fp32, bf16 (autocast), or auto: bf16 if the hardware supports it natively."""
    seed: int = 0
    """Random seed for initialisation, batch order and masking."""
    workers: int = 0
    """Processes that load batches; 0 loads them in the training process."""
    validate_every: int = 250
    """Steps between validations. Validation also runs after the last step."""
    save_every: int = 250
    """Steps between checkpoints; the last two checkpoints are kept."""
    tracker: Literal["none", "tensorboard"] = "none"
    """Experiment tracker that receives the metrics, in addition to metrics.jsonl."""
    out: Path | None = None
    """Run folder; by default runs/<command>-<hash of the settings>."""

    def __post_init__(self) -> None:
        check_at_least_1(self, "steps", "batch_size", "accumulate", "validate_every", "save_every")
        for name in ("warmup", "weight_decay", "workers"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be finite and at least 0, got {getattr(self, name)}")
        if not 0 < self.lr < math.inf:
            raise ValueError(f"lr must be finite and above 0, got {self.lr}")
        if not 0 <= self.lr_floor <= 1:
            raise ValueError(f"lr_floor must be from 0 to 1, got {self.lr_floor}")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas must be at least 0 and below 1, got {list(self.betas)}")
        if not self.clip_gradient > 0:
            raise ValueError(f"clip_gradient must be above 0, got {self.clip_gradient}")
        if not 0 <= self.seed < 2**31:
            raise ValueError(f"seed must be from 0 to {2**31 - 1}, got {self.seed}")
        if self.batch_size % self.accumulate:
            raise ValueError(f"batch_size {self.batch_size} must be a multiple of accumulate, got {self.accumulate}")
