"""Levels of the components of the linear tokenizer: how many each component gets, and where they lie.

Legend: N samples, D components, L levels.
"""

import math

import torch
from torch import Tensor


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

    The thresholds divide a normal distribution of the same mean and variance into equally likely parts. A centre is the mean of
    the samples of its level; a level without samples has the value of its end that is nearer to the mean of the component.
    """
    mean = values_N.mean()
    share_L = torch.arange(1, levels, dtype=torch.float64) / levels
    thresholds_L = mean + values_N.std(correction=0) * torch.special.ndtri(share_L)
    level_N = torch.searchsorted(thresholds_L, values_N, right=True)
    count_L = level_N.bincount(minlength=levels)
    sum_L = level_N.bincount(weights=values_N, minlength=levels)
    middle = [mean[None]] if levels % 2 else []
    inner_L = torch.cat([thresholds_L[: levels // 2], *middle, thresholds_L[(levels - 1) // 2 :]])
    return torch.where(count_L > 0, sum_L / count_L.clamp(min=1), inner_L), thresholds_L
