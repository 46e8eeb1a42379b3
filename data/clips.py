"""Views: which frames of a video, which crop, mirrored or not. A pure function of (specification, video, view number).

View 0 is the canonical one, used for evaluation: the middle of the video, the middle of the frame, not mirrored.
Further views are drawn from the hash of the video's path, so a cache of several is an augmentation that never changes.

Legend: V views, T frames, H W pixels, C colours.
"""

import hashlib
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

import av
import numpy as np

from data import moving_digits
from data.decoding import read_frames, resized
from data.sources import Source, Video


@dataclass(frozen=True, kw_only=True)
class ClipSpec:
    """What a clip is.

    Raises:
        ValueError: for a number below 1.
    """

    frames: int = 16
    """Frames of a clip; a shorter video is padded with its last frame, and marked."""
    size: int = 64
    """Side of the square crop in pixels; the short side of the video is resized to it, the aspect ratio kept."""
    stride: int = 1
    """Every stride-th frame of the video is taken."""
    views: int = 1
    """Clips of each video; the first is the middle one, the others are drawn from its path."""
    flip: bool = False
    """Whether views after the first may be mirrored left to right."""

    def __post_init__(self) -> None:
        for name in ("frames", "size", "stride", "views"):
            if getattr(self, name) < 1:
                raise ValueError(f"clip.{name} is {getattr(self, name)}, but must be at least 1")


@dataclass(frozen=True, kw_only=True)
class View:
    """Where a view was cut: enough to cut its pixels again."""

    start: int
    """First frame in the video."""
    stride: int
    real: int
    """Frames that exist; the rest repeats the last of them."""
    top: int
    left: int
    """Corner of the crop in the resized frame."""
    size: int
    flip: bool

    def frames(self, count: int) -> list[int]:
        """Frame numbers in the video, `count` of them."""
        return [self.start + self.stride * min(i, self.real - 1) for i in range(count)]


@dataclass(frozen=True)
class Clips:
    """All views of one video."""

    pixels_VTHWC: np.ndarray
    views: tuple[View, ...]

    @property
    def padded(self) -> bool:
        return any(view.real < self.pixels_VTHWC.shape[1] for view in self.views)

    def describe(self) -> list[dict]:
        """The views in JSON form."""
        return [asdict(view) for view in self.views]


def read_clips(source: Source, video: Video, spec: ClipSpec) -> Clips:
    """Cut all views of a video, uint8.

    Raises:
        DamagedVideo: if the video cannot be used (data/decoding.py).
    """

    def starts(total: int) -> list[View]:
        return [_in_time(spec, video.path, v, total) for v in range(spec.views)]

    def wanted(total: int) -> Sequence[int]:
        return sorted({i for view in starts(total) for i in view.frames(spec.frames)})

    if source.root is None:
        split, index = video.path.split("/")
        clip = moving_digits.render(0, split, int(index))
        total, numbers = len(clip), wanted(len(clip))
        pixels = clip[numbers]
        if spec.size != moving_digits.SIZE:
            pixels = np.stack([resized(av.VideoFrame.from_ndarray(frame), spec.size) for frame in pixels])
    else:
        frames = read_frames(source.root / video.path, spec.size, wanted)
        total, numbers, pixels = frames.total, wanted(frames.total), frames.pixels_THWC
    row = {number: i for i, number in enumerate(numbers)}
    views = [_in_space(spec, video.path, v, view, pixels.shape[1:3]) for v, view in enumerate(starts(total))]
    return Clips(
        np.stack([_cut(pixels, [row[i] for i in view.frames(spec.frames)], view) for view in views]), tuple(views)
    )


def _draw(path: str, view: int, axis: int, choices: int) -> int:
    """A fixed draw from 0..choices - 1; the canonical view always gets the middle."""
    if view == 0:
        return (choices - 1) // 2
    seed = hashlib.sha256(os.fsencode(path)).digest()[:8]
    return int(np.random.default_rng([int.from_bytes(seed, "little"), view, axis]).integers(choices))


def _in_time(spec: ClipSpec, path: str, view: int, total: int) -> View:
    span = (spec.frames - 1) * spec.stride + 1
    if total < span:  # begin at the first frame, pad behind the last
        return View(
            start=0, stride=spec.stride, real=(total - 1) // spec.stride + 1, top=0, left=0, size=spec.size, flip=False
        )
    start = _draw(path, view, 0, total - span + 1)
    return View(start=start, stride=spec.stride, real=spec.frames, top=0, left=0, size=spec.size, flip=False)


def _in_space(spec: ClipSpec, path: str, number: int, view: View, frame: tuple[int, int]) -> View:
    top = _draw(path, number, 1, frame[0] - spec.size + 1)
    left = _draw(path, number, 2, frame[1] - spec.size + 1)
    flip = spec.flip and number > 0 and _draw(path, number, 3, 2) == 1
    return replace(view, top=top, left=left, flip=flip)


def _cut(pixels_THWC: np.ndarray, rows: list[int], view: View) -> np.ndarray:
    clip = pixels_THWC[rows, view.top : view.top + view.size, view.left : view.left + view.size]
    return clip[:, :, ::-1] if view.flip else clip
