"""Masks: tubes, single tokens and time slices (arXiv 2203.12602, section 3.3), and blocks (arXiv 2106.11250).

Tokens are numbered 0..L-1 in raster order (t, h, w). All masks are pure functions of the samples' seeds (int64).

Legend: B samples, L tokens, U units (locations, slices or tokens), M visible and Q hidden tokens, N blocks, T H W the grid, S its
size along one axis, A random numbers per block.
"""

from typing import Literal

import torch
from torch import Tensor

from ar_model.clusters import hashed, uniform
from ar_model.inputs import Grid

Masking = Literal["tube", "random", "frame"]


def draw_mask(kind: Masking, grid: Grid, ratio: float, seed_B: Tensor) -> tuple[Tensor, Tensor]:
    """Return the indices of the visible (B, M) and the hidden (B, Q) tokens, each in raster order.

    The units that are hidden are locations in all time slices (`tube`), whole slices (`frame`) or tokens (`random`). As in
    VideoMAE's code, floor(ratio * n) of n units are hidden in every sample. Raises a ValueError if the ratio hides no unit or all
    units.
    """
    units, count = check_ratio(kind, grid, ratio)
    order_BU = hashed(seed_B, units, stream=3).argsort(dim=1)
    visible, hidden = (part.sort(dim=1).values for part in (order_BU[:, count:], order_BU[:, :count]))
    return _tokens(kind, grid, visible), _tokens(kind, grid, hidden)


def check_ratio(kind: Masking, grid: Grid, ratio: float) -> tuple[int, int]:
    """Return the number of units and of hidden units. Raises a ValueError if the ratio hides no unit or all units."""
    t, h, w = grid
    units, name = {"tube": (h * w, "locations"), "frame": (t, "time slices"), "random": (t * h * w, "tokens")}[kind]
    # The margin corrects products such as 0.29 * 100 = 28.999999999999996, which would lose a unit.
    count = int(ratio * units + 1e-9)
    if not 0 < count < units:
        problem = "hides nothing" if count <= 0 else "leaves nothing visible"
        raise ValueError(f"objective.ratio {ratio} of {units} {name} {problem}")
    return units, count


def _tokens(kind: Masking, grid: Grid, units_BU: Tensor) -> Tensor:
    """Return the token indices of some units, (B, tokens)."""
    slices, locations = grid[0], grid[1] * grid[2]
    if kind == "tube":
        return (torch.arange(slices, device=units_BU.device)[:, None] * locations + units_BU[:, None]).flatten(1)
    if kind == "frame":
        return (units_BU[..., None] * locations + torch.arange(locations, device=units_BU.device)).flatten(1)
    return units_BU


def block_mask(grid: Grid, blocks: int, seed_B: Tensor, slices_B: Tensor | None = None) -> Tensor:
    """Return a bool mask (B, T, H, W), true for tokens inside at least one of the sample's blocks.

    The sides of a block are drawn uniformly from 1..floor(2T / 3), 1..H / 2 and 1..W / 2, and its position from all that fit.
    (Section 3.2 of arXiv 2106.11250 rounds 2T / 3 up, but the paper's code and its table of ratios round down.) `slices_B`: the
    number of valid time slices of each sample, used instead of T.
    """
    t, h, w = grid
    slices_B = torch.full_like(seed_B, t) if slices_B is None else slices_B
    high_B, wide_B = torch.full_like(seed_B, h), torch.full_like(seed_B, w)
    limits = [(slices_B, 2 * slices_B // 3), (high_B, high_B // 2), (wide_B, wide_B // 2)]
    draws_BAN = uniform(seed_B, 6 * blocks, stream=4).view(len(seed_B), 6, blocks)
    inside = []
    for axis, (side_B, longest_B) in enumerate(limits):
        length_BN = 1 + (draws_BAN[:, 2 * axis] * longest_B.clamp(min=1)[:, None]).long()
        first_BN = (draws_BAN[:, 2 * axis + 1] * (side_B[:, None] - length_BN + 1)).long()
        index_S = torch.arange(grid[axis], device=seed_B.device)
        inside.append((index_S >= first_BN[..., None]) & (index_S < (first_BN + length_BN)[..., None]))
    t_BNT, h_BNH, w_BNW = inside
    return (t_BNT[..., None, None] & h_BNH[:, :, None, :, None] & w_BNW[:, :, None, None]).any(dim=1)


def scattered_mask(ratio: float, seed_B: Tensor, absent_BL: Tensor) -> Tensor:
    """Return a bool mask (B, L), true for a random share `ratio` of the tokens that are not absent, at least one per sample."""
    order_BL = hashed(seed_B, absent_BL.shape[1], stream=3).masked_fill(absent_BL, torch.iinfo(torch.int64).max)
    rank_BL = order_BL.argsort(dim=1).argsort(dim=1)
    count_B1 = (ratio * (~absent_BL).sum(1, keepdim=True) + 1e-6).long().clamp(min=1)
    return rank_BL < count_B1
