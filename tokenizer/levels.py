"""Levels of the components of the linear tokenizer: the best levels of a component, and how many each component gets.

Legend: N samples, D components, L levels.
"""

import math

import torch
from torch import Tensor

_SAMPLES = 2**14
"""Samples from which the levels of a component are computed: quantiles of the component."""
_ROUNDS = 60
"""Iterations of Lloyd's algorithm."""
_COUNTS = (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 14, 16, 20, 25, 32, 40, 50, 64, 80, 100, 128)
"""Numbers of levels that a component may have."""
_FLATNESS = 0.5
"""The errors of a component are divided by its variance to this power when levels are given out. With 0, which minimises the
squared error of pixels, the mean of a block gets up to 128 levels, and motion, which has little variance, gets few."""

Code = list[tuple[int, int]]
"""Components of one code of a place with their numbers of levels, lowest digit first."""


class Scalars:
    """Scalar quantizers of components, given their values (N, D)."""

    def __init__(self, values_ND: Tensor) -> None:
        # The quantiles of a component have its distribution, and are sorted.
        count = min(len(values_ND), _SAMPLES)
        rows = torch.linspace(0, len(values_ND) - 1, count, dtype=torch.float64).round().long()
        self._sorted_DN = values_ND.sort(0).values[rows].T.contiguous()
        self._known: dict[int, tuple[Tensor, Tensor, Tensor]] = {}

    @property
    def components(self) -> int:
        """Number of components."""
        return len(self._sorted_DN)

    def error(self, levels: int) -> list[float]:
        """Return the sum over samples of the squared error of each component with this number of levels."""
        return self._lloyd(levels)[2].tolist()

    def levels(self, component: int, levels: int) -> tuple[Tensor, Tensor]:
        """Return the centres (L,) and thresholds (L - 1,) of a component, ascending."""
        centres_DL, thresholds_DL, _ = self._lloyd(levels)
        return centres_DL[component], thresholds_DL[component]

    def _lloyd(self, levels: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return centres, thresholds and squared errors of all components, by Lloyd's algorithm from equal quantiles."""
        if levels in self._known:
            return self._known[levels]
        x_DN = self._sorted_DN
        zero_D1 = x_DN.new_zeros(len(x_DN), 1)
        sum_DN, square_DN = (torch.cat([zero_D1, y.cumsum(1)], 1) for y in (x_DN, x_DN.square()))
        first = torch.linspace(0, x_DN.shape[1], levels + 1, dtype=torch.float64).round().long()
        bound_DL = first.expand(len(x_DN), -1)
        for _ in range(_ROUNDS):
            count_DL = bound_DL.diff(dim=1)
            total_DL = sum_DN.gather(1, bound_DL).diff(dim=1)
            # An empty level stays at its lower bound.
            lower_DL = x_DN.gather(1, bound_DL[:, :-1].clamp(max=x_DN.shape[1] - 1))
            centres_DL = torch.where(count_DL > 0, total_DL / count_DL.clamp(min=1), lower_DL)
            thresholds_DL = (centres_DL[:, 1:] + centres_DL[:, :-1]) / 2
            inner_DL = torch.searchsorted(x_DN, thresholds_DL.contiguous())
            new_DL = torch.cat([bound_DL[:, :1], inner_DL, bound_DL[:, -1:]], 1)
            if torch.equal(new_DL, bound_DL):
                break
            bound_DL = new_DL
        squares_DL = square_DN.gather(1, bound_DL).diff(dim=1)
        sums_DL, count_DL = sum_DN.gather(1, bound_DL).diff(dim=1), bound_DL.diff(dim=1)
        error_D = (squares_DL - sums_DL.square() / count_DL.clamp(min=1)).sum(1)
        self._known[levels] = centres_DL, thresholds_DL, error_D
        return self._known[levels]


def allocate(scalars: Scalars, codes: int, vocabulary: int) -> list[Code]:
    """Give levels to components so that the products of each code's levels stay within the vocabulary.

    In each round, the component that lowers the weighted squared error most per bit gets its next number of levels. A component
    without levels goes to the code with the most room. Raises ValueError if a code gets no component.
    """
    counts = [count for count in _COUNTS if count <= vocabulary]
    errors = [scalars.error(count) for count in counts]
    weights = [(1 / error) ** _FLATNESS if error > 0 else 0 for error in errors[0]]
    step = [0] * scalars.components
    code_of: dict[int, int] = {}
    room = [math.log2(vocabulary)] * codes
    while True:
        best: tuple[float, int, int] | None = None
        for component, now in enumerate(step):
            if now + 1 == len(counts):
                continue
            code = code_of.get(component, max(range(codes), key=lambda c: (room[c], -c)))
            bits = math.log2(counts[now + 1] / counts[now])
            gain = weights[component] * (errors[now][component] - errors[now + 1][component]) / bits
            # The margin allows products that are exactly the vocabulary.
            if bits <= room[code] + 1e-9 and gain > 0 and (best is None or gain > best[0]):
                best = gain, component, code
        if best is None:
            break
        _, component, code = best
        room[code] -= math.log2(counts[step[component] + 1] / counts[step[component]])
        step[component] += 1
        code_of[component] = code
    chosen: list[Code] = [[] for _ in range(codes)]
    for component, code in sorted(code_of.items()):
        chosen[code].append((component, counts[step[component]]))
    if not all(chosen):
        raise ValueError(
            f"only {len(code_of)} components of the blocks can be told apart, too few for {codes} codes of a place"
        )
    return chosen
