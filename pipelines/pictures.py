"""Pictures that pipelines write: PNG files and, for the report, charts."""

from pathlib import Path

import numpy as np
from einops import rearrange
from PIL import Image
from torch import Tensor


def reconstruction_grid(pixels_BTHWC: Tensor, video_BTHWC: Tensor, file: Path, columns: int = 8) -> None:
    """Three rows per clip, frames from left to right: input, reconstruction, and their difference around grey."""
    frames = np.linspace(0, pixels_BTHWC.shape[1] - 1, columns).round().astype(int)
    seen, made = (x[:, frames].numpy() for x in (pixels_BTHWC, video_BTHWC))
    difference = (128 + (made.astype(np.int16) - seen)).clip(0, 255).astype(np.uint8)
    rows = np.stack([seen, made, difference], axis=1)
    save_png(rearrange(rows, "b r t h w c -> (b r h) (t w) c"), file)


def save_png(image_HWC: np.ndarray, file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image_HWC).save(file)
