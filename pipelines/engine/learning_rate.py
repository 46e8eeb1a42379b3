"""Learning-rate schedule of every training run."""

import math

from pipelines.settings.training import Training


def lr_at(step: int, config: Training) -> float:
    """Return the learning rate of a step: linear warm-up, then decay to the floor. There is no scheduler state."""
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    done = (step - config.warmup) / max(1, config.steps - config.warmup)
    left = 1 - done if config.decay == "linear" else 0.5 * (1 + math.cos(math.pi * done))
    return config.lr * (config.lr_floor + (1 - config.lr_floor) * left)
