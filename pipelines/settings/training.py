"""Settings that all trainings share."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Precision = Literal["auto", "fp32", "bf16"]


@dataclass(kw_only=True)
class Training:
    """Settings of every training run.

    Raises:
        ValueError: for a number that makes no sense.
    """

    steps: int = 500
    """Optimizer steps."""
    batch_size: int = 32
    """Samples of one step, of all processes together."""
    accumulate: int = 1
    """Parts that a step's batch is cut into, one after another, to save memory; the numbers stay the same, but for what a loss
    takes over a batch (FSQ's spread, LFQ's entropy, a discriminator's batch norm, VIMPAC's contrast): it is taken over a part."""
    lr: float = 1e-3
    """Highest learning rate."""
    warmup: int = 50
    """Steps until it is reached; then it falls along a cosine to a hundredth."""
    weight_decay: float = 0.05
    """Of AdamW, on matrices only."""
    clip_gradient: float = 1.0
    """Highest norm of the gradient."""
    precision: Precision = "auto"
    """fp32, bf16 (autocast), or auto: bf16 where the hardware multiplies in it."""
    seed: int = 0
    """Of initial weights, batches and everything drawn."""
    workers: int = 0
    """Processes that prepare batches; 0: the training process itself."""
    validate_every: int = 250
    """Steps between two validations; the last step always has one."""
    save_every: int = 250
    """Steps between two checkpoints; the last two are kept."""
    tracker: Literal["none", "tensorboard"] = "none"
    """Where numbers go besides metrics.jsonl."""
    out: Path | None = None
    """Run folder; by default runs/<pipeline>-<hash of the settings>."""

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "accumulate", "validate_every", "save_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, but must be at least 1")
        for name in ("warmup", "weight_decay", "workers"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} is {getattr(self, name)}, but must be finite and not negative")
        if not 0 < self.lr < math.inf:
            raise ValueError(f"lr is {self.lr}, but must be finite and above 0")
        if not self.clip_gradient > 0:
            raise ValueError(f"clip_gradient is {self.clip_gradient}, but must be above 0")
        if not 0 <= self.seed < 2**31:
            raise ValueError(f"seed is {self.seed}, but must be from 0 to {2**31 - 1}")
        if self.batch_size % self.accumulate:
            raise ValueError(
                f"batch_size {self.batch_size} cannot be cut into accumulate {self.accumulate} equal parts"
            )
