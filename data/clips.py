"""Views: which frames of a video, which crop, mirrored or not. A pure function of (specification, video, view number).

View 0 is the canonical one, used for evaluation: the middle of the video, the middle of the frame, not mirrored.
Further views are drawn from the hash of the video's path, so a cache of several is an augmentation that never changes.
Dense views are consecutive clips that cover the video from its first frame to its last, middle crop, not mirrored.

Legend: V views, T frames, H W pixels, C colours.
"""

import hashlib
import os
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import av
import numpy as np

from data.decoding import iter_frames, read_frames, resized
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
    views: int | Literal["dense"] = 1
    """Clips of each video; the first is the middle one, the others are drawn from its path. dense: as many consecutive
    ones as cover the whole video."""
    flip: bool = False
    """Whether views after the first may be mirrored left to right."""

    def __post_init__(self) -> None:
        for name in ("frames", "size", "stride", "views"):
            value = getattr(self, name)
            if value != "dense" and value < 1:
                raise ValueError(f"clip.{name} is {value}, but must be at least 1")


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
class ClipCuts:
    """Where the clips of a video were cut, its number of frames, and how many a second has."""

    views: tuple[View, ...]
    frames: int
    rate: float | None


@dataclass(frozen=True)
class Clips:
    """All views of one video."""

    pixels_VTHWC: np.ndarray
    views: tuple[View, ...]


_COLUMNS = ("start", "real", "top", "left", "flip")


def describe(views: Sequence[View], spec: ClipSpec) -> dict[str, Any]:
    """The views in JSON form: what is the same in all, and a column for what is not. Short, for it is kept with every video."""
    return {
        "stride": spec.stride,
        "crop": spec.size,
        **{name: [int(getattr(view, name)) for view in views] for name in _COLUMNS},
    }


def recorded_views(described: Mapping[str, Any]) -> tuple[View, ...]:
    """The views that `describe` wrote down."""
    rows = zip(*(described[name] for name in _COLUMNS), strict=True)
    views = [dict(zip(_COLUMNS, row, strict=True)) for row in rows]
    stride, size = int(described["stride"]), int(described["crop"])
    views = [{name: int(value) for name, value in view.items()} for view in views]
    return tuple(View(**{**view, "flip": bool(view["flip"])}, stride=stride, size=size) for view in views)


def read_clips(source: Source, video: Video, spec: ClipSpec) -> Clips:
    """Cut all views of a video, uint8.

    Raises:
        DamagedVideo: if the video cannot be used (data/decoding.py).
    """
    clips: list[np.ndarray] = []
    views: tuple[View, ...] = ()
    for part in iter_clips(source, video, spec):
        if isinstance(part, ClipCuts):
            views = part.views
        else:
            clips.append(part)
    return Clips(np.stack(clips), views)


def read_clip(source: Source, video: Video, spec: ClipSpec, view: int) -> np.ndarray:
    """One view of a video, uint8 (T, H, W, 3).

    Raises:
        DamagedVideo: if the video cannot be used.
        IndexError: if it has no such view.
    """
    for number, part in enumerate(iter_clips(source, video, spec)):
        if number == view and not isinstance(part, ClipCuts):
            return part
    raise IndexError(f"{video.path} has no view {view}")


def iter_clips(source: Source, video: Video, spec: ClipSpec) -> Iterator[np.ndarray | ClipCuts]:
    """The views of a video one after the other, uint8 (T, H, W, 3), and at last where they were cut.

    Of dense views only one is in memory at a time, so a video may be of any length.

    Raises:
        DamagedVideo: if the video cannot be used, often only after its last view.
    """
    return _dense(source, video, spec) if spec.views == "dense" else _chosen(source, video, spec, spec.views)


def _chosen(source: Source, video: Video, spec: ClipSpec, count: int) -> Iterator[np.ndarray | ClipCuts]:
    def starts(total: int) -> list[View]:
        return [_in_time(spec, video.path, v, total) for v in range(count)]

    def wanted(total: int) -> Sequence[int]:
        return sorted({i for view in starts(total) for i in view.frames(spec.frames)})

    if source.root is None:
        clip = _rendered(video, spec)
        total, numbers, rate = len(clip), wanted(len(clip)), None
        pixels = clip[numbers]
    else:
        frames = read_frames(_as_listed(source, video), spec.size, wanted)
        total, numbers, pixels, rate = frames.total, wanted(frames.total), frames.pixels_THWC, frames.rate
    row = {number: i for i, number in enumerate(numbers)}
    views = [_in_space(spec, video.path, v, view, pixels.shape[1:3]) for v, view in enumerate(starts(total))]
    for view in views:
        yield _cut(pixels, [row[i] for i in view.frames(spec.frames)], view)
    yield ClipCuts(tuple(views), total, rate)


def _dense(source: Source, video: Video, spec: ClipSpec) -> Iterator[np.ndarray | ClipCuts]:
    views: list[View] = []
    waiting: list[np.ndarray] = []

    def clip() -> np.ndarray:
        start = len(views) * spec.frames * spec.stride
        view = View(start=start, stride=spec.stride, real=len(waiting), top=0, left=0, size=spec.size, flip=False)
        views.append(_in_space(spec, video.path, 0, view, waiting[0].shape[:2]))
        rows = [min(i, len(waiting) - 1) for i in range(spec.frames)]
        pixels_THWC = _cut(np.stack(waiting), rows, views[-1])
        waiting.clear()
        return pixels_THWC

    frames = _every(source, video, spec)
    while True:
        try:
            waiting.append(next(frames))
        except StopIteration as end:
            total, rate = end.value
            break
        if len(waiting) == spec.frames:
            yield clip()
    if waiting:
        yield clip()
    yield ClipCuts(tuple(views), total, rate)


def _every(source: Source, video: Video, spec: ClipSpec) -> Generator[np.ndarray, None, tuple[int, float | None]]:
    """Every stride-th frame of a video, resized; returns the number of all frames and their rate."""
    if source.root is None:
        clip = _rendered(video, spec)
        yield from clip[:: spec.stride]
        return len(clip), None
    decoded = iter_frames(_as_listed(source, video), spec.size, lambda number: number % spec.stride == 0)
    while True:
        try:
            yield next(decoded)[1]
        except StopIteration as end:
            return end.value


def _as_listed(source: Source, video: Video) -> Path:
    """Where the video is; ValueError if it has another size than when it was listed."""
    assert source.root is not None
    path = source.root / video.path
    try:
        size = path.stat().st_size
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: is gone since it was listed") from None
    if size != video.size:
        raise ValueError(f"{path}: has changed since it was listed; run again")
    return path


def _rendered(video: Video, spec: ClipSpec) -> np.ndarray:
    """A built-in clip in the size that is wanted."""
    split, index = video.path.split("/")
    from data import moving_digits  # imports torch

    clip = moving_digits.render(0, split, int(index))
    if spec.size == moving_digits.SIZE:
        return clip
    return np.stack([resized(av.VideoFrame.from_ndarray(frame), spec.size) for frame in clip])


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
