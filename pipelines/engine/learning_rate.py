"""Learning-rate schedule of every training run."""

import math

from pipelines.settings.training import Training


def lr_at(step: int, config: Training) -> float:
    """Return the learning rate of a step: linear warm-up, then cosine decay to 1 % of the peak. There is no scheduler state."""
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    done = (step - config.warmup) / max(1, config.steps - config.warmup)
    return config.lr * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * done)))
