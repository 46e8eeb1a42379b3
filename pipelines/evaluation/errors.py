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


def accuracy_with_error(right_RM: Sequence[Sequence[bool]], groups_M: np.ndarray) -> dict[str, float | None]:
    """Return the mean accuracy and its standard error (None if it is unknown), rounded to four digits.

    The squared standard error is the sum of two variances: the one of `sampling_error`, and the variance of the mean over the
    repetitions.

    Args:
        right_RM: whether the prediction for a clip is right, in each repetition.
        groups_M: group of each clip.
    """
    accuracy_R = np.mean(right_RM, axis=1)
    repeated = float(np.var(accuracy_R, ddof=1) / len(accuracy_R)) if len(accuracy_R) > 1 else 0.0
    sampling = sampling_error(np.mean(right_RM, axis=0), groups_M)
    error = None if sampling is None else round((sampling**2 + repeated) ** 0.5, 4)
    return {"mean": round(float(accuracy_R.mean()), 4), "stderr": error}


def sampling_error(value_M: np.ndarray, groups_M: np.ndarray) -> float | None:
    """Return the standard error of the mean of values over tested clips, which are a sample of groups of clips.

    This is the jackknife over groups (Efron and Stein 1981), which leaves out each group in turn. Unlike deviations from the
    mean, it is not too small if one group has most of the clips. None if there is only one group.
    """
    number_M = np.unique(groups_M, return_inverse=True)[1]
    sum_G, size_G = np.bincount(number_M, value_M), np.bincount(number_M)
    groups = len(size_G)
    if groups == 1:
        return None
    mean_G = (sum_G.sum() - sum_G) / (size_G.sum() - size_G)
    return float(np.sqrt((groups - 1) * mean_G.var()))


def _freedom(groups_M: np.ndarray) -> float:
    """Return the degrees of freedom of `sampling_error`: one less than the effective number of groups (Kish 1965)."""
    share_G = np.unique(groups_M, return_counts=True)[1] / len(groups_M)
    return float(1 / np.square(share_G).sum() - 1)


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
        Groups of unequal size count as fewer groups.
    """
    difference_RM = np.asarray(one_RM, float) - np.asarray(other_RM, float)
    tied = int(np.sum(one_RM)) == int(np.sum(other_RM))
    mean = 0.0 if tied else float(difference_RM.mean())
    repetitions = len(difference_RM)
    sampling = sampling_error(difference_RM.mean(0), groups_M)
    error = ahead = None
    if repetitions > 1:
        error = float(difference_RM.mean(1).std(ddof=1) / repetitions**0.5)
    if error is not None and sampling is not None:
        both, freedom = math.hypot(error, sampling), _freedom(groups_M)
        welch = both**4 / max(error**4 / (repetitions - 1) + sampling**4 / freedom, 1e-300)
        # The combined bound alone is too low if one of the errors is estimated from few values.
        errors = ((error, repetitions - 1), (sampling, freedom), (both, max(min(repetitions - 1, freedom), welch)))
        confidence = 1 - _LEVEL / comparisons
        # The quantile of a small part of a degree of freedom is infinite.
        bounds = [size and float(stats.t.ppf(confidence, degrees)) * size for size, degrees in errors]
        ahead = mean > max(0.0, *bounds)
    return {
        "mean": round(mean, 4),
        "stderr": None if error is None else round(error, 4),
        "sampling": None if sampling is None else round(sampling, 4),
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
