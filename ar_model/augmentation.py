"""Random crops and mirroring of clips of pixels, as pure functions of the samples' seeds.

Legend: B clips, T H W C frames, height, width, colours.
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from ar_model.clusters import uniform

_STREAM = 8


def crop_and_flip(pixels_BTHWC: Tensor, seed_B: Tensor, scale: float, flip: bool) -> Tensor:
    """Crop each clip to a random box, resize the box to the whole frame, and mirror half of the clips.

    Args:
        pixels_BTHWC: uint8 (B, T, H, W, 3).
        seed_B: int64 seeds. All frames of a clip have the same crop.
        scale: smallest share of the area of the frame that a crop has; 1 crops nothing. Crops keep the aspect ratio.
        flip: mirror left and right, each clip with probability 1/2.

    Returns:
        Pixels from 0 to 255, float32 (B, T, H, W, 3).
    """
    frames = pixels_BTHWC.shape[1]
    area_B, x_B, y_B, mirror_B = uniform(seed_B, 4, _STREAM).T
    side_B = (scale + (1 - scale) * area_B).sqrt()
    # Coordinates of affine_grid run from -1 to 1, so a box of side s has its centre within 1 - s.
    centre_x_B, centre_y_B = ((1 - side_B) * (2 * at_B - 1) for at_B in (x_B, y_B))
    zero_B = torch.zeros_like(side_B)
    width_B = torch.where(mirror_B < 0.5, -side_B, side_B) if flip else side_B
    rows = [torch.stack(row, dim=1) for row in ((width_B, zero_B, centre_x_B), (zero_B, side_B, centre_y_B))]
    affine_B23 = torch.stack(rows, dim=1)
    images = rearrange(pixels_BTHWC.float(), "b t h w c -> b (t c) h w")
    places = F.affine_grid(affine_B23, list(images.shape), align_corners=False)
    cropped = F.grid_sample(images, places, mode="bilinear", padding_mode="border", align_corners=False)
    return rearrange(cropped, "b (t c) h w -> b t h w c", t=frames)
