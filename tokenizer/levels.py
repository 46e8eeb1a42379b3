"""Levels of the components of the linear tokenizer: how many each component gets, and where they lie.

Legend: N samples, D components, L levels.
"""

import math

import torch
from torch import Tensor

_ROUNDS = 60
"""Most iterations of the search for thresholds."""


def levels_of(vocabulary: int) -> tuple[int, ...]:
    """Return the numbers of levels of the components of a code, with a product up to `vocabulary`, the largest first.

    There are as many components as can have at least five levels each, as in FSQ (arXiv 2309.15505, section 4.1). All but the
    first have an odd number: their mean, which stands for no motion and no texture, is then inside a level. On a threshold, noise
    would decide.
    """
    # The margin allows exact powers of 5, whose logarithm is rounded.
    levels = [5] * max(1, int(math.log(vocabulary, 5) + 1e-9))
    turn = 0
    while math.prod(levels) // levels[turn] * (levels[turn] + 2) <= vocabulary:
        levels[turn] += 2
        turn = (turn + 1) % len(levels)
    return vocabulary // math.prod(levels[1:]), *levels[1:]


def centres_and_thresholds(values_N: Tensor, levels: int) -> tuple[Tensor, Tensor]:
    """Return the centres (L,) and thresholds (L - 1,) of a component, both ascending.

    The thresholds minimise the absolute error: each is halfway between the medians of its neighbours. With the squared error,
    rare large values take most of the levels. A centre is the mean of the samples of a level.
    """
    sorted_N, last = values_N.sort().values, len(values_N) - 1
    bound_L = torch.linspace(0, len(values_N), levels + 1, dtype=torch.float64).round().long()
    for _ in range(_ROUNDS):
        median_L = sorted_N[((bound_L[1:] + bound_L[:-1]) // 2).clamp(max=last)]
        thresholds_L = (median_L[1:] + median_L[:-1]) / 2
        new_L = torch.cat([bound_L[:1], torch.searchsorted(sorted_N, thresholds_L), bound_L[-1:]])
        if torch.equal(new_L, bound_L):
            break
        bound_L = new_L
    sum_N = torch.cat([sorted_N.new_zeros(1), sorted_N.cumsum(0)])
    count_L = bound_L.diff()
    # A level without samples, of a component of few different values, has the value that would be its median.
    return torch.where(count_L > 0, sum_N[bound_L].diff() / count_L.clamp(min=1), median_L), thresholds_L
