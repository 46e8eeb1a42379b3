"""Views of a video: frames, crop and mirroring, as a pure function of (specification, video, view number).

View 0 is the canonical view, used for evaluation: the middle of the video, the middle of the frame, not mirrored.
Further views are drawn from the hash of the video's path, so a cache of several views is a fixed augmentation.
Dense views are consecutive clips that cover the video from its first frame to its last, with the middle crop, not mirrored.

Legend: V views, T frames, H W pixels, C colours.
"""

import hashlib
import os
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import av
import numpy as np

from data.decoding import Frames, FrameStream, NumberedFrame, iter_frames, read_frames, resized
from data.sources import Source, Video


@dataclass(frozen=True, kw_only=True)
class ClipSpec:
    """Settings for cutting clips from a video. Raises ValueError for a number below 1."""

    frames: int = 16
    """Frames of a clip. A shorter video is padded with its last frame; the padding is recorded."""
    size: int = 64
    """Side of the square crop in pixels. The short side of the video is resized to this size; the aspect ratio is kept."""
    stride: int = 1
    """Take every stride-th frame of the video."""
    views: int | Literal["dense"] = 1
    """Clips of each video. The first is cut from the middle; the others are drawn at random, seeded by the path. dense:
    consecutive clips that cover the whole video."""
    flip: bool = False
    """Flip all views except the first horizontally, each at random."""

    def __post_init__(self) -> None:
        for name in ("frames", "size", "stride", "views"):
            value = getattr(self, name)
            if value != "dense" and value < 1:
                raise ValueError(f"clip.{name} must be at least 1, got {value}")


@dataclass(frozen=True, kw_only=True)
class View:
    """Position of a view in its video, sufficient to cut the same pixels again."""

    start: int
    """First frame in the video."""
    stride: int
    real: int
    """Number of valid frames. The other frames repeat the last valid frame."""
    top: int
    left: int
    """Corner of the crop in the resized frame."""
    size: int
    flip: bool

    def frames(self, count: int) -> list[int]:
        """Return `count` frame numbers in the video."""
        return [self.start + self.stride * min(i, self.real - 1) for i in range(count)]


@dataclass(frozen=True)
class ClipCuts:
    """Positions of all views of a video, its number of frames, and its frames per second."""

    views: tuple[View, ...]
    frames: int
    rate: float | None


@dataclass(frozen=True)
class Clips:
    """Pixels and positions of all views of a video."""

    pixels_VTHWC: np.ndarray
    views: tuple[View, ...]


_COLUMNS = ("start", "real", "top", "left", "flip")


def describe(views: Sequence[View], spec: ClipSpec) -> dict[str, Any]:
    """Return the views as compact JSON content: numbers that all views share once, and a column for each other number."""
    columns = {name: [int(getattr(view, name)) for view in views] for name in _COLUMNS}
    return {"stride": spec.stride, "crop": spec.size, **columns}


def recorded_views(described: Mapping[str, Any]) -> tuple[View, ...]:
    """Return the views from the JSON content made by `describe`."""
    stride, size = int(described["stride"]), int(described["crop"])
    rows = [[int(value) for value in row] for row in zip(*(described[name] for name in _COLUMNS), strict=True)]
    return tuple(
        View(start=start, stride=stride, real=real, top=top, left=left, size=size, flip=bool(flip))
        for start, real, top, left, flip in rows
    )


def read_clips(source: Source, video: Video, spec: ClipSpec) -> Clips:
    """Cut all views of a video, uint8. Raises the same errors as `iter_clips`."""
    *clips, cuts = iter_clips(source, video, spec)
    assert isinstance(cuts, ClipCuts)
    return Clips(np.stack(clips), cuts.views)  # type: ignore[arg-type]  # all but the last are arrays


def read_clip(source: Source, video: Video, spec: ClipSpec, view: int) -> np.ndarray:
    """Cut one view of a video, uint8 (T, H, W, 3).

    Raises the same errors as `iter_clips`, and IndexError if the video has no such view.
    """
    for number, part in enumerate(iter_clips(source, video, spec)):
        if number == view and not isinstance(part, ClipCuts):
            return part
    raise IndexError(f"{video.path} has no view {view}")


def iter_clips(source: Source, video: Video, spec: ClipSpec) -> Iterator[np.ndarray | ClipCuts]:
    """Yield the views of a video one after the other, uint8 (T, H, W, 3), and finally their positions.

    Only one dense view is in memory at a time, so a video may have any length. Raises DamagedVideo if the video cannot be
    used, often only after its last view; ValueError if it has changed since it was listed; FileNotFoundError if it has
    disappeared since then.
    """
    return _dense_views(source, video, spec) if spec.views == "dense" else _drawn_views(source, video, spec, spec.views)


def _drawn_views(source: Source, video: Video, spec: ClipSpec, count: int) -> Iterator[np.ndarray | ClipCuts]:
    def views_in_time(total: int) -> list[View]:
        return [_in_time(spec, video.path, v, total) for v in range(count)]

    def frame_numbers(total: int) -> list[int]:
        return sorted({i for view in views_in_time(total) for i in view.frames(spec.frames)})

    if source.root is None:
        clip = _rendered(video, spec)
        frames = Frames(clip[frame_numbers(len(clip))], len(clip), None)
    else:
        frames = read_frames(_listed_path(source, video), spec.size, frame_numbers)
    pixels = frames.pixels_THWC
    row_of = {number: row for row, number in enumerate(frame_numbers(frames.total))}
    in_time = views_in_time(frames.total)
    views = [_in_space(spec, video.path, v, view, pixels.shape[1:3]) for v, view in enumerate(in_time)]
    for view in views:
        yield _cut(pixels, [row_of[i] for i in view.frames(spec.frames)], view)
    yield ClipCuts(tuple(views), frames.total, frames.rate)


def _dense_views(source: Source, video: Video, spec: ClipSpec) -> Iterator[np.ndarray | ClipCuts]:
    views: list[View] = []
    if source.root is None:
        stream = FrameStream(_strided_rendered_frames(video, spec))
    else:
        stream = iter_frames(_listed_path(source, video), spec.size, lambda number: number % spec.stride == 0)
    frames = iter(stream)
    while clip := [pixels_HWC for _, pixels_HWC in islice(frames, spec.frames)]:
        start, real = len(views) * spec.frames * spec.stride, len(clip)
        view = View(start=start, stride=spec.stride, real=real, top=0, left=0, size=spec.size, flip=False)
        views.append(_in_space(spec, video.path, 0, view, clip[0].shape[:2]))
        yield _cut(np.stack(clip), [min(i, real - 1) for i in range(spec.frames)], views[-1])
    yield ClipCuts(tuple(views), stream.total, stream.rate)


def _strided_rendered_frames(video: Video, spec: ClipSpec) -> Generator[NumberedFrame, None, tuple[int, None]]:
    clip = _rendered(video, spec)
    for number in range(0, len(clip), spec.stride):
        yield number, clip[number]
    return len(clip), None


def _listed_path(source: Source, video: Video) -> Path:
    """Return the path of a video. Raises ValueError if its size has changed, FileNotFoundError if it has disappeared."""
    assert source.root is not None
    path = source.root / video.path
    if not path.exists():
        raise FileNotFoundError(f"{path}: has disappeared since it was listed")
    if path.stat().st_size != video.size:
        raise ValueError(f"{path}: has changed since it was listed; run again")
    return path


def _rendered(video: Video, spec: ClipSpec) -> np.ndarray:
    """Render a clip of the built-in set, resized to the specification, uint8 (T, H, W, 3)."""
    split, index = video.path.split("/")
    from data import moving_digits  # imports torch

    clip = moving_digits.render(0, split, int(index))
    if spec.size == moving_digits.SIZE:
        return clip
    return np.stack([resized(av.VideoFrame.from_ndarray(frame), spec.size) for frame in clip])


# Axes of the random draws. Other numbers would change all drawn views.
_START, _TOP, _LEFT, _FLIP = range(4)


def _draw(path: str, view: int, axis: int, choices: int) -> int:
    """Return a number in 0..choices - 1: the middle one for the canonical view, else a random one seeded by the arguments."""
    if view == 0:
        return (choices - 1) // 2
    seed = hashlib.sha256(os.fsencode(path)).digest()[:8]
    return int(np.random.default_rng([int.from_bytes(seed, "little"), view, axis]).integers(choices))


def _in_time(spec: ClipSpec, path: str, view: int, total: int) -> View:
    """Place a view in a video of `total` frames. Its crop is not set yet."""
    span = (spec.frames - 1) * spec.stride + 1
    if total < span:
        # A short video is used from its first frame and padded after its last frame.
        start, real = 0, (total - 1) // spec.stride + 1
    else:
        start, real = _draw(path, view, _START, total - span + 1), spec.frames
    return View(start=start, stride=spec.stride, real=real, top=0, left=0, size=spec.size, flip=False)


def _in_space(spec: ClipSpec, path: str, number: int, view: View, frame: tuple[int, int]) -> View:
    """Place view `number` in a frame of (height, width) pixels."""
    top = _draw(path, number, _TOP, frame[0] - spec.size + 1)
    left = _draw(path, number, _LEFT, frame[1] - spec.size + 1)
    flip = spec.flip and number > 0 and _draw(path, number, _FLIP, 2) == 1
    return replace(view, top=top, left=left, flip=flip)


def _cut(pixels_THWC: np.ndarray, rows: list[int], view: View) -> np.ndarray:
    clip = pixels_THWC[rows, view.top : view.top + view.size, view.left : view.left + view.size]
    return clip[:, :, ::-1] if view.flip else clip
