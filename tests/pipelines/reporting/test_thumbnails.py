"""Moving pictures have all frames of a clip, a limited size, and repeat at about the speed of the clip."""

import base64
import io

import numpy as np
import pytest
from PIL import Image

from pipelines.reporting.thumbnails import SIDE, moving_picture


@pytest.mark.parametrize("seconds, milliseconds", [(0.8, 100), (0.01, 40), (60.0, 250), (None, 100)])
def test_a_picture_moves_at_the_speed_of_the_clip(seconds: float | None, milliseconds: int) -> None:
    pixels_THWC = np.arange(8, dtype=np.uint8)[:, None, None, None].repeat(200, 1).repeat(300, 2).repeat(3, 3) * 30
    head, _, content = moving_picture(pixels_THWC, seconds).partition(",")
    assert head == "data:image/webp;base64"
    picture = Image.open(io.BytesIO(base64.b64decode(content)))
    assert picture.n_frames == 8 and picture.info["loop"] == 0 and max(picture.size) == SIDE
    levels = []
    for frame in range(8):
        picture.seek(frame)
        levels.append(np.asarray(picture.convert("RGB")).mean())
        assert picture.info["duration"] == milliseconds
    assert np.allclose(levels, np.arange(8) * 30, atol=4)


def test_pictures_are_small() -> None:
    noise_THWC = np.random.default_rng(0).integers(0, 255, (16, 128, 128, 3), dtype=np.uint8)
    assert len(moving_picture(noise_THWC, 1.0)) < 300_000
