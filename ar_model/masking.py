"""What is hidden of a clip: tubes, single tokens, slices of time (arXiv 2203.12602, section 3.3).

Everything is an index tensor; tokens are numbered 0..L-1 in raster order (t, h, w).

Legend: B samples, L tokens, P places of a slice, T slices of time, M visible and Q hidden tokens.
"""

from typing import Literal

import torch
from torch import Tensor

from ar_model.clusters import hashed
from ar_model.inputs import Grid

Masking = Literal["tube", "random", "frame"]


def masked(kind: Masking, grid: Grid, ratio: float, seed_B: Tensor) -> tuple[Tensor, Tensor]:
    """Visible (B, M) and hidden (B, Q) tokens, each in raster order; a pure function of the samples' seeds (int64).

    `tube` hides the same places in every slice of time, `frame` whole slices, `random` tokens anywhere. Of the n places,
    slices or tokens floor(ratio * n) are hidden, as in VideoMAE's code, and the same number in every sample.

    Raises:
        ValueError: if nothing stays visible or nothing is hidden.
    """
    units, count = check_ratio(kind, grid, ratio)
    order_BU = hashed(seed_B, units, stream=3).argsort(dim=1)
    visible, hidden = (part.sort(dim=1).values for part in (order_BU[:, count:], order_BU[:, :count]))
    return _tokens(kind, grid, visible), _tokens(kind, grid, hidden)


def check_ratio(kind: Masking, grid: Grid, ratio: float) -> tuple[int, int]:
    """How many places, slices or tokens there are, and how many of them are hidden.

    Raises:
        ValueError: if nothing stays visible or nothing is hidden.
    """
    t, h, w = grid
    units = {"tube": h * w, "frame": t, "random": t * h * w}[kind]
    count = int(ratio * units + 1e-9)
    if not 0 < count < units:
        what = {"tube": "places of a slice", "frame": "slices of time", "random": "tokens"}[kind]
        state = "nothing is hidden" if count <= 0 else "nothing stays visible"
        raise ValueError(f"objective.ratio {ratio} of {units} {what}: {state}")
    return units, count


def _tokens(kind: Masking, grid: Grid, units_BU: Tensor) -> Tensor:
    """The tokens of some places, slices or tokens."""
    slices, places = grid[0], grid[1] * grid[2]
    if kind == "tube":
        return (torch.arange(slices, device=units_BU.device)[:, None] * places + units_BU[:, None]).flatten(1)
    if kind == "frame":
        return (units_BU[..., None] * places + torch.arange(places, device=units_BU.device)).flatten(1)
    return units_BU
