"""Moving pictures of clips for a page.

Legend: T H W C frames, height, width, colours.
"""

import base64
import io

import numpy as np
from PIL import Image

SIDE = 128
"""Longest side in pixels of a moving picture."""
_QUALITY = 50
_MILLISECONDS = (40, 250)
"""Shortest and longest display of a frame."""
_DEFAULT_MILLISECONDS = 100
"""Display of a frame if the times of a clip are unknown."""


def moving_picture(pixels_THWC: np.ndarray, seconds: float | None) -> str:
    """Return a uint8 clip as a data URI of a WebP file that repeats without end.

    `seconds`: length of the clip, None if it is unknown. Long clips are shown faster.
    """
    frames = [Image.fromarray(np.ascontiguousarray(frame_HWC)) for frame_HWC in pixels_THWC]
    for frame in frames:
        frame.thumbnail((SIDE, SIDE))
    duration = _DEFAULT_MILLISECONDS
    if seconds is not None:
        duration = round(min(max(1000 * seconds / len(frames), _MILLISECONDS[0]), _MILLISECONDS[1]))
    file = io.BytesIO()
    frames[0].save(file, "WEBP", save_all=True, append_images=frames[1:], duration=duration, loop=0, quality=_QUALITY)
    return f"data:image/webp;base64,{base64.b64encode(file.getvalue()).decode()}"
