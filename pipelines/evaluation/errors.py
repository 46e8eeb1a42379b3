"""Means and standard errors."""

from collections.abc import Sequence

import numpy as np


def with_error(accuracies: Sequence[float], tested: int) -> dict[str, float]:
    """Mean over repetitions and its standard error.

    The error is that of drawing `tested` samples (binomial) and that of the repetitions, added as variances.
    """
    mean = float(np.mean(accuracies))
    repeated = float(np.var(accuracies, ddof=1) / len(accuracies)) if len(accuracies) > 1 else 0.0
    return {"mean": round(mean, 4), "stderr": round((mean * (1 - mean) / tested + repeated) ** 0.5, 4)}
