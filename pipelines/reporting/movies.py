"""Clips as mp4 files.

Legend: T H W C frames, height, width, channels.
"""

from collections.abc import Iterable
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

_GAP = 8
"""White columns between two clips."""
_HEIGHT = 256
"""Small frames are enlarged by the largest integer factor that keeps them within this height."""

MIN_RATE, MAX_RATE = 0.001, 1000.0
"""Frames per second that a movie can have."""


def side_by_side(pixels_THWC: np.ndarray, video_THWC: np.ndarray) -> np.ndarray:
    """Join two uint8 clips of the same shape along their width, with a white gap."""
    gap_THWC = np.full((*pixels_THWC.shape[:2], _GAP, 3), 255, np.uint8)
    return np.concatenate([pixels_THWC, gap_THWC, video_THWC], axis=2)


def write_mp4(file: Path, frames: Iterable[np.ndarray], rate: float) -> None:
    """Write uint8 frames (H, W, C) as an mp4 of `rate` frames per second.

    The finished file is moved into place atomically. Small frames are enlarged by repeating pixels. Raises ValueError for a
    rate that is not from `MIN_RATE` to `MAX_RATE`.
    """
    if not MIN_RATE <= rate <= MAX_RATE:
        raise ValueError(f"{file}: rate must be {MIN_RATE:g} to {MAX_RATE:g} frames per second, got {rate}")
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_suffix(".part.mp4")
    try:
        with av.open(str(temporary), "w") as container:
            # Browsers play H.264, but some builds of FFmpeg have no encoder for it.
            codec = "libx264" if "libx264" in av.codecs_available else "mpeg4"
            stream = container.add_stream(codec, rate=Fraction(rate).limit_denominator(1000))
            stream.pix_fmt = "yuv420p"
            if stream.name == "libx264":
                stream.options = {"crf": "16", "preset": "veryfast"}
            else:
                stream.bit_rate = 4_000_000
            for number, frame in enumerate(map(_enlarged, frames)):
                if number == 0:
                    stream.height, stream.width = frame.shape[:2]
                container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
            container.mux(stream.encode(None))
        temporary.replace(file)
    finally:
        temporary.unlink(missing_ok=True)


def _enlarged(frame_HWC: np.ndarray) -> np.ndarray:
    """Repeat pixels up to `_HEIGHT`, and pad to even height and width, which yuv420p needs."""
    scale = max(1, _HEIGHT // frame_HWC.shape[0])
    large_HWC = frame_HWC.repeat(scale, 0).repeat(scale, 1)
    return np.pad(large_HWC, ((0, large_HWC.shape[0] % 2), (0, large_HWC.shape[1] % 2), (0, 0)), mode="edge")
