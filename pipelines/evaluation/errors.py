"""Means, standard errors and differences between accuracies.

Legend: R repetitions, M tested clips.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy import stats
from torch import Tensor

_LEVEL = 0.04
"""Nominal probability that any of several equal entries is called better than another. With estimated errors it is up to 5 %."""


def accuracy_with_error(right_RM: Sequence[Sequence[bool]], groups_M: np.ndarray) -> dict[str, float]:
    """Return the mean accuracy and its standard error, rounded to four digits.

    The squared standard error is the sum of two variances: the one of `sampling_error`, and the variance of the mean over the
    repetitions.

    Args:
        right_RM: whether the prediction for a clip is right, in each repetition.
        groups_M: group of each clip.
    """
    accuracy_R = np.mean(right_RM, axis=1)
    repeated = float(np.var(accuracy_R, ddof=1) / len(accuracy_R)) if len(accuracy_R) > 1 else 0.0
    error = (sampling_error(np.mean(right_RM, axis=0), groups_M) ** 2 + repeated) ** 0.5
    return {"mean": round(float(accuracy_R.mean()), 4), "stderr": round(error, 4)}


def sampling_error(value_M: np.ndarray, groups_M: np.ndarray) -> float:
    """Return the standard error of the mean of values over tested clips, which are a sample of groups of clips.

    This is the standard deviation over bootstrap samples of whole groups, to first order in closed form, times the square root of
    G / (G - 1) for G groups. If there is only one group, clips are treated as independent.
    """
    group_M = np.unique(groups_M, return_inverse=True)[1]
    if group_M.max() == 0:
        group_M = np.arange(len(value_M))
    groups = int(group_M.max()) + 1
    if groups == 1:
        return 0.0
    deviation_G = np.bincount(group_M, value_M - np.mean(value_M))
    return float(np.sqrt(groups / (groups - 1) * np.square(deviation_G).sum()) / len(value_M))


def difference(
    one_RM: Sequence[Sequence[bool]], other_RM: Sequence[Sequence[bool]], groups_M: np.ndarray, comparisons: int
) -> dict[str, Any]:
    """Compare two entries whose repetitions with the same number share seed, folds and clips.

    Args:
        one_RM: whether a prediction of the first entry is right, in each repetition.
        groups_M: group of each clip.
        comparisons: number of comparisons of which this one may be the most favourable. The first entry is called ahead by
            chance in at most 5 % of all such sets of comparisons (Bonferroni).

    Returns:
        `mean`: difference in accuracy. `stderr`: its standard error over repetitions, from paired differences; None for one.
        `sampling`: its `sampling_error`. `tied`: whether the accuracies are equal. `ahead`: whether the difference exceeds
        each error, and the root of their summed squares, times a quantile of Student's t (with the degrees of freedom of Welch
        and Satterthwaite for the latter); None for one repetition or one group, where an error is unknown.
    """
    difference_RM = np.asarray(one_RM, float) - np.asarray(other_RM, float)
    tied = int(np.sum(one_RM)) == int(np.sum(other_RM))
    mean = 0.0 if tied else float(difference_RM.mean())
    repetitions, groups = len(difference_RM), len(np.unique(groups_M))
    sampling = sampling_error(difference_RM.mean(0), groups_M)
    error = ahead = None
    if repetitions > 1:
        error = float(difference_RM.mean(1).std(ddof=1) / repetitions**0.5)
    if error is not None and groups > 1:
        both = math.hypot(error, sampling)
        welch = both**4 / max(error**4 / (repetitions - 1) + sampling**4 / (groups - 1), 1e-300)
        # The combined bound alone is too low if one of the errors is estimated from few values.
        bounds = ((error, repetitions - 1), (sampling, groups - 1), (both, max(1.0, welch)))
        confidence = 1 - _LEVEL / comparisons
        ahead = mean > max(0.0, *(float(stats.t.ppf(confidence, freedom)) * size for size, freedom in bounds))
    return {
        "mean": round(mean, 4),
        "stderr": None if error is None else round(error, 4),
        "sampling": round(sampling, 4),
        "tied": tied,
        "ahead": ahead,
    }


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
