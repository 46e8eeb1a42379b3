"""What is hidden of a clip: tubes, single tokens, slices of time (arXiv 2203.12602, section 3.3), blocks (arXiv 2106.11250).

Tokens are numbered 0..L-1 in raster order (t, h, w).

Legend: B samples, L tokens, U places or slices or tokens, M visible and Q hidden tokens, N blocks, T H W the grid.
"""

from typing import Literal

import torch
from torch import Tensor

from ar_model.clusters import hashed, uniform
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


def block_mask(grid: Grid, blocks: int, seed_B: Tensor, slices_B: Tensor | None = None) -> Tensor:
    """Whether each token is in one of a sample's blocks, bool (B, T, H, W); a pure function of the samples' seeds (int64).

    Blocks are 1..floor(2T / 3) long, 1..H / 2 high and 1..W / 2 wide, all equally likely, at any place where they fit
    (arXiv 2106.11250, section 3.2, which says that 2T / 3 is rounded up; its code and its table of ratios round down).
    `slices_B`: how many slices of time of a sample are there, instead of T.
    """
    t, h, w = grid
    slices_B = torch.full_like(seed_B, t) if slices_B is None else slices_B
    inside = torch.ones(len(seed_B), blocks, 1, 1, 1, dtype=torch.bool, device=seed_B.device)
    draws_BAN = uniform(seed_B, 6 * blocks, stream=4).view(len(seed_B), 6, blocks)
    high_B, wide_B = torch.full_like(seed_B, h), torch.full_like(seed_B, w)
    for axis, (side_B, longest_B) in enumerate(
        ((slices_B, 2 * slices_B // 3), (high_B, high_B // 2), (wide_B, wide_B // 2))
    ):
        length_BN = 1 + (draws_BAN[:, 2 * axis] * longest_B.clamp(min=1)[:, None]).long()
        first_BN = (draws_BAN[:, 2 * axis + 1] * (side_B[:, None] - length_BN + 1)).long()
        place = torch.arange(grid[axis], device=seed_B.device)
        along_BNS = (place >= first_BN[..., None]) & (place < (first_BN + length_BN)[..., None])
        inside = inside & along_BNS.view(*along_BNS.shape[:2], *(grid[i] if i == axis else 1 for i in range(3)))
    return inside.any(dim=1)


def scattered_mask(ratio: float, seed_B: Tensor, absent_BL: Tensor) -> Tensor:
    """Whether each token is among a share of those that are not absent, at least one, bool (B, L)."""
    order_BL = hashed(seed_B, absent_BL.shape[1], stream=3).masked_fill(absent_BL, torch.iinfo(torch.int64).max)
    place_BL = order_BL.argsort(dim=1).argsort(dim=1)
    count_B1 = (ratio * (~absent_BL).sum(1, keepdim=True) + 1e-6).long().clamp(min=1)
    return place_BL < count_B1
