"""Show a decoded frame as a player does: upright, with square pixels, in RGB, resized.

Legend: H W height and width, C colours.
"""

from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import av
import numpy as np

# Numbers of colour properties (ITU-T H.273).
_UNSPECIFIED = 2
_KNOWN_MATRICES = (0, 1, _UNSPECIFIED, 4, 5, 6, 7, 9)
_MOST_ASPECT = 16
_TURNS = (1, 0, 0, 1), (0, -1, 1, 0), (-1, 0, 0, -1), (0, 1, -1, 0)
"""Display matrices that turn a picture by 0, 90, 180 and 270 degrees, anticlockwise."""


class Resizer:
    """Converter of the frames of a video to uint8 RGB (h, w, 3), upright and resized with the aspect ratio kept.

    The short side of the picture as it is displayed gets `short_side` pixels. `pixel_aspect` is the width of a pixel
    divided by its height. A downscaled pixel is the mean of the area that it covers.
    """

    def __init__(self, short_side: int, pixel_aspect: Fraction | None = None) -> None:
        self._short_side = short_side
        self._pixel_aspect = pixel_aspect
        self._key: tuple[object, ...] = ()
        self._graph: av.filter.Graph

    def shape(self, frame: av.VideoFrame, pixel_aspect: Fraction | None = None) -> tuple[int, int]:
        """Return height and width of the resized frame before it is turned upright."""
        height, width = _displayed(frame, pixel_aspect or self._pixel_aspect)
        scale = self._short_side / min(height, width)
        return max(self._short_side, round(height * scale)), max(self._short_side, round(width * scale))

    def __call__(self, frame: av.VideoFrame, shape: tuple[int, int] | None = None) -> np.ndarray:
        """Return the frame with `shape`, as `Resizer.shape` returns it, or with its own shape.

        Raises FFmpegError if FFmpeg cannot convert the frame's pixel format.
        """
        # Transfer functions and primaries are not converted, but FFmpeg refuses some of their numbers.
        frame.color_trc = frame.color_primaries = _UNSPECIFIED
        if frame.colorspace not in _KNOWN_MATRICES:
            frame.colorspace = _UNSPECIFIED
        key = (frame.width, frame.height, frame.format.name, frame.colorspace, frame.color_range, shape)
        if key != self._key:
            self._graph, self._key = self._graph_for(frame, shape or self.shape(frame)), key
        self._graph.vpush(frame)
        return upright(self._graph.vpull().to_ndarray(), display_matrix(frame))

    def _graph_for(self, frame: av.VideoFrame, shape: tuple[int, int]) -> av.filter.Graph:
        """Return a filter graph for frames like this one. Building it takes as long as resizing one small frame."""
        method = "area" if self._short_side < min(_displayed(frame, self._pixel_aspect)) else "bicubic"
        graph = av.filter.Graph()
        graph.threads = 1
        source = graph.add(
            "buffer",
            video_size=f"{frame.width}x{frame.height}",
            pix_fmt=frame.format.name,
            time_base="1/1",
            colorspace=str(int(frame.colorspace)),
            range=str(int(frame.color_range)),
        )
        # Without full_chroma_int, a result of an even width has chroma of half its width.
        scale = graph.add("scale", w=str(shape[1]), h=str(shape[0]), flags=f"{method}+full_chroma_int")
        graph.link_nodes(source, scale, graph.add("format", "rgb24"), graph.add("buffersink"))
        graph.configure()
        return graph


def _displayed(frame: av.VideoFrame, pixel_aspect: Fraction | None) -> tuple[float, float]:
    """Return height and width of a frame with square pixels."""
    aspect = float(pixel_aspect or 1)
    # Other ratios are errors in the file, and the picture would need any amount of memory.
    return frame.height, frame.width * (aspect if 1 / _MOST_ASPECT <= aspect <= _MOST_ASPECT else 1)


def display_matrix(frame: av.VideoFrame) -> tuple[int, int, int, int]:
    """Return a, b, c, d of the frame's display matrix: a stored point (x, y) is displayed at (ax + cy, bx + dy)."""
    try:
        side_data: Any = frame.side_data  # a mapping, but its type stub says otherwise
        data = side_data.get("DISPLAYMATRIX")
    except ValueError:
        # PyAV lists no side data if it does not know one of them, such as the EXIF data of a JPEG.
        return _TURNS[round(frame.rotation / 90) % 4]
    if data is None:
        return _TURNS[0]
    a, b, _, c, d = (int(number) for number in np.frombuffer(data, np.int32)[:5])
    return a, b, c, d


def upright(pixels_HWC: np.ndarray, matrix: Sequence[int]) -> np.ndarray:
    """Return pixels turned and mirrored by a display matrix, by the multiple of 90 degrees that is nearest to it."""
    a, b, c, d = matrix
    if abs(b) + abs(c) > abs(a) + abs(d):
        pixels_HWC, a, d = pixels_HWC.swapaxes(0, 1), c, b
    return np.ascontiguousarray(pixels_HWC[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1])
