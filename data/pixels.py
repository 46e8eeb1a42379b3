"""Pixels of clips in a cache. Each view has one member: an array, or a JPEG of its frames stacked vertically.

Legend: T frames, H W pixels, C colours.
"""

import io
from collections.abc import Callable
from typing import Literal

import numpy as np
from PIL import Image

from data.clip_spec import ClipSpec
from data.shards import DamagedCache, from_npy, to_npy

KeepPixels = Literal["none", "raw", "jpeg"]
JPEG_QUALITY = 92


def check_jpeg_height(keep: KeepPixels, frames: int, height: int) -> None:
    """Raise a ValueError if the stacked frames of a clip exceed the height of a JPEG."""
    if keep == "jpeg" and frames * height > 65_500:  # the limit of libjpeg
        raise ValueError(f"{frames} frames of {height} pixels exceed the 65,500 rows of a jpeg; use --keep_pixels raw")


def pack_pixels(keep: KeepPixels, view: int, pixels_THWC: np.ndarray) -> dict[str, bytes]:
    """Encode the pixels of a view as a member of a shard, {extension: content}. Return {} if pixels are not kept."""
    if keep == "none":
        return {}
    if keep == "raw":
        return {_extension(keep, view): to_npy(pixels_THWC)}
    check_jpeg_height(keep, *pixels_THWC.shape[:2])
    file = io.BytesIO()
    image = Image.fromarray(pixels_THWC.reshape(-1, *pixels_THWC.shape[2:]))
    image.save(file, "JPEG", quality=JPEG_QUALITY, subsampling=0)
    return {_extension(keep, view): file.getvalue()}


def unpack_pixels(keep: KeepPixels, read: Callable[[str], bytes], clip: ClipSpec, view: int) -> np.ndarray:
    """Decode the pixels of a view, uint8 (T, H, W, 3). `read` returns a member by its extension.

    Raises DamagedCache if the member does not decode or has another size.
    """
    shape = (clip.frames, clip.size, clip.size, 3)
    content = read(_extension(keep, view))
    if keep == "raw":
        return from_npy(content, np.dtype("u1"), shape)
    expected_size = (clip.size, clip.frames * clip.size)
    try:
        image = Image.open(io.BytesIO(content), formats=["JPEG"])
        # Check before decoding, because a forged size could exhaust the memory.
        if image.size != expected_size:
            raise DamagedCache(f"a JPEG in the cache has {image.size} pixels, expected {expected_size}")
        return np.asarray(image.convert("RGB")).reshape(shape)
    except (OSError, Image.DecompressionBombError) as error:
        raise DamagedCache(f"a JPEG in the cache does not decode: {error}") from None


def _extension(keep: KeepPixels, view: int) -> str:
    return f"view{view:02d}.{'npy' if keep == 'raw' else 'jpg'}"
