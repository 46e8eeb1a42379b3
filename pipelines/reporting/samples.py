"""Samples of a tokenizer in its run folder: a picture and a movie of clips and their reconstructions.

Legend: B clips, T H W C frames, height, width, channels.
"""

from pathlib import Path

from torch import Tensor

from pipelines.reporting.movies import side_by_side, write_mp4
from pipelines.reporting.pictures import reconstruction_grid, save_png

_PICTURE_CLIPS, _MOVIE_CLIPS = 8, 4


def write_samples(folder: Path, step: int, pixels_BTHWC: Tensor, video_BTHWC: Tensor) -> None:
    """Write a picture and a movie of the first clips and their reconstructions after a step of training."""
    grid = reconstruction_grid(pixels_BTHWC[:_PICTURE_CLIPS], video_BTHWC[:_PICTURE_CLIPS])
    save_png(grid, folder / f"step_{step:06d}.png")
    pairs = zip(pixels_BTHWC[:_MOVIE_CLIPS].numpy(), video_BTHWC[:_MOVIE_CLIPS].numpy(), strict=True)
    frames = (frame for pixels_THWC, video_THWC in pairs for frame in side_by_side(pixels_THWC, video_THWC))
    write_mp4(folder / f"step_{step:06d}.mp4", frames, rate=8)
