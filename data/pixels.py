"""A clip's pixels inside a cache: as an array, or as one JPEG per view with its frames stacked.

Legend: V views, T frames, H W pixels, C colours.
"""

import io
from collections.abc import Callable
from typing import Literal

import numpy as np
from PIL import Image

from data.clips import ClipSpec
from data.shards import DamagedCache, from_npy, to_npy

KeepPixels = Literal["none", "raw", "jpeg"]
JPEG_QUALITY = 92


def refuse_too_long(keep: KeepPixels, frames: int, height: int) -> None:
    """Raise a ValueError for clips whose stacked frames no JPEG can hold."""
    if keep == "jpeg" and frames * height > 65_500:
        raise ValueError(f"{frames} frames of {height} pixels exceed the 65,500 rows of a jpeg; use --keep_pixels raw")


def pack_pixels(keep: KeepPixels, pixels_VTHWC: np.ndarray) -> dict[str, bytes]:
    """Shard members by extension."""
    if keep == "none":
        return {}
    if keep == "raw":
        return {"pixels.npy": to_npy(pixels_VTHWC)}
    refuse_too_long(keep, *pixels_VTHWC.shape[1:3])
    return {f"view{v:02d}.jpg": _jpeg(clip.reshape(-1, *clip.shape[2:])) for v, clip in enumerate(pixels_VTHWC)}


def unpack_pixels(keep: KeepPixels, read: Callable[[str], bytes], clip: ClipSpec) -> np.ndarray:
    """The pixels, uint8 (V, T, H, W, 3); `read` gives a member by its extension."""
    shape = (clip.frames, clip.size, clip.size, 3)
    if keep == "raw":
        return from_npy(read("pixels.npy"), np.dtype("u1"), (clip.views, *shape))
    return np.stack([_unjpeg(read(f"view{v:02d}.jpg")).reshape(shape) for v in range(clip.views)])


def _jpeg(image_HWC: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(image_HWC).save(file, "JPEG", quality=JPEG_QUALITY, subsampling=0)
    return file.getvalue()


def _unjpeg(content: bytes) -> np.ndarray:
    try:
        return np.asarray(Image.open(io.BytesIO(content), formats=["JPEG"]).convert("RGB"))
    except OSError as error:
        raise DamagedCache(f"a JPEG in the cache does not decode: {error}") from None
