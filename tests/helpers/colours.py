"""Reference for colours and sizes, without FFmpeg's scaler: exact RGB of a frame, and exact means of areas.

Legend: H W height and width, C colours.
"""

import av
import numpy as np

# Weights of red and blue in luma, by the number of the matrix (ITU-T H.273). FFmpeg takes an unspecified matrix, 2, for 601.
_WEIGHTS = {1: (0.2126, 0.0722), 2: (0.299, 0.114), 5: (0.299, 0.114), 6: (0.299, 0.114), 9: (0.2627, 0.0593)}
_FULL_RANGE = 2


def exact_rgb(frame: av.VideoFrame) -> np.ndarray:
    """Return RGB (h, w, 3) in 0..255, not rounded, of a planar YUV or grey frame. Chroma is repeated."""
    components = frame.format.components
    planes = [_plane(frame, number) for number in range(len(frame.planes))]
    bits = components[0].bits
    full = frame.color_range == _FULL_RANGE or frame.format.name.startswith(("yuvj", "gray"))
    peak, unit = 2.0**bits - 1, 2.0 ** (bits - 8)
    luma = planes[0] / peak if full else (planes[0] - 16 * unit) / (219 * unit)
    if len(planes) == 1:
        return np.clip(luma, 0, 1)[..., None].repeat(3, -1) * 255
    centred = [(plane - 128 * unit) / (peak if full else 224 * unit) for plane in planes[1:3]]
    cb, cr = (_repeated(plane, *luma.shape) for plane in centred)
    red_weight, blue_weight = _WEIGHTS[int(frame.colorspace)]
    red, blue = luma + 2 * (1 - red_weight) * cr, luma + 2 * (1 - blue_weight) * cb
    green = (luma - red_weight * red - blue_weight * blue) / (1 - red_weight - blue_weight)
    return np.clip(np.stack([red, green, blue], -1), 0, 1) * 255


def _plane(frame: av.VideoFrame, number: int) -> np.ndarray:
    plane = frame.planes[number]
    kind = np.dtype("<u2" if frame.format.components[0].bits > 8 else "u1")
    rows = np.frombuffer(plane, kind).reshape(plane.height, plane.line_size // kind.itemsize)
    return rows[:, : plane.width].astype(np.float64)


def _repeated(plane: np.ndarray, height: int, width: int) -> np.ndarray:
    rows, columns = round(height / plane.shape[0]), round(width / plane.shape[1])
    return plane.repeat(rows, 0).repeat(columns, 1)[:height, :width]


def area_means(pixels_HWC: np.ndarray, height: int, width: int) -> np.ndarray:
    """Return the picture downscaled exactly: each pixel is the mean of the area that it covers."""
    rows, columns = _shares(pixels_HWC.shape[0], height), _shares(pixels_HWC.shape[1], width)
    return np.einsum("ah,hwc,bw->abc", rows, pixels_HWC, columns, optimize=True)


def _shares(source: int, target: int) -> np.ndarray:
    """Return the share of each source pixel in each target pixel, (target, source)."""
    edges = np.arange(target + 1) * source / target
    pixels = np.arange(source)
    overlap = np.minimum(edges[1:, None], pixels + 1) - np.maximum(edges[:-1, None], pixels)
    return np.clip(overlap, 0, None) * target / source


def psnr(pixels: np.ndarray, reference: np.ndarray) -> float:
    """Return the peak signal-to-noise ratio of pixels in 0..255, in decibels."""
    return float(10 * np.log10(255**2 / max(np.mean((pixels - reference) ** 2), 1e-9)))
