"""Means and standard errors."""

from collections.abc import Sequence

import numpy as np
from torch import Tensor


def accuracy_with_error(accuracies: Sequence[float], tested: int) -> dict[str, float]:
    """Return the mean accuracy over repetitions and its standard error, rounded to four digits.

    The squared standard error is the sum of two variances: the binomial variance of an accuracy on `tested` samples,
    and the variance of the mean over the repetitions.
    """
    mean = float(np.mean(accuracies))
    binomial = mean * (1 - mean) / tested
    repeated = float(np.var(accuracies, ddof=1) / len(accuracies)) if len(accuracies) > 1 else 0.0
    return {"mean": round(mean, 4), "stderr": round((binomial + repeated) ** 0.5, 4)}


def mean_over_seeds(values: Sequence[float]) -> dict[str, float | None]:
    """Return the mean over training runs and its standard error (None for one run), rounded to four digits.

    The standard error excludes the sampling error of the tested clips, because all entries of a comparison use the same clips.
    """
    error = round(float(np.std(values, ddof=1) / len(values) ** 0.5), 4) if len(values) > 1 else None
    return {"mean": round(float(np.mean(values)), 4), "stderr": error}


def mean_over_clips(value_B: Tensor) -> dict[str, float | None]:
    """Return the mean over clips and its standard error (None for one clip), not rounded."""
    error = value_B.double().std().item() / len(value_B) ** 0.5 if len(value_B) > 1 else None
    return {"mean": value_B.double().mean().item(), "stderr": error}
