"""Views of a video: frames, crop and mirroring, as a pure function of (specification, video, view number).

View 0 is the canonical view, used for evaluation: the middle of the video, the middle of the frame, not mirrored.
Further views are drawn from the hash of the video's path, so a cache of several views is a fixed augmentation.
Dense views are consecutive clips that cover the video from its first frame to its last, with the middle crop, not mirrored.

Legend: V views, T frames, H W pixels, C colours.
"""

import hashlib
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from data.clip_spec import MAX_FPS, ClipSpec
from data.decoding import DamagedVideo, FrameStream, iter_frames, read_sized_frames
from data.frame_reading import (
    Read,
    listed_path,
    part_of,
    reader_of,
    reader_of_frames,
    rendered,
    rendered_timing,
    stream_of_part,
)
from data.sources import Source, Video
from data.timing import Timing


@dataclass(frozen=True, kw_only=True)
class View:
    """Position of a view in its video, sufficient to cut the same pixels again.

    Frame numbers are those of the resampled video, if the specification resamples it or spreads the frames of a clip.
    """

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
    short_side: int = 0
    """Short side of the resized frame: `size` (the default), or more if the view has a scale below 1."""
    shift: int = 0
    """If frames are spread over the video: time of the first frame, in thousandths of the distance of two frames."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "short_side", self.short_side or self.size)

    def frames(self, count: int) -> list[int]:
        """Return `count` frame numbers in the video."""
        return [self.start + self.stride * min(i, self.real - 1) for i in range(count)]


@dataclass(frozen=True)
class ClipCuts:
    """Positions of all views of a video, its number of frames, and its frames per second, both after resampling."""

    views: tuple[View, ...]
    frames: int
    rate: float | None


@dataclass(frozen=True)
class Clips:
    """Pixels and positions of all views of a video."""

    pixels_VTHWC: np.ndarray
    views: tuple[View, ...]


Draw = Callable[[int, int, int], int]
"""Choice of one of n positions, 0 to n - 1, from the number of a view, the axis and n."""
NO_RATE = "clip.fps and clip.seconds need a frame rate, which the built-in videos do not have"
_COLUMNS = ("start", "real", "top", "left", "flip")


def describe(views: Sequence[View], spec: ClipSpec) -> dict[str, Any]:
    """Return the views as compact JSON content: numbers that all views share once, and a column for each other number."""
    names = [*_COLUMNS, *(["short_side"] if spec.scales is not None else []), *(["shift"] if spec.span else [])]
    columns = {name: [int(getattr(view, name)) for view in views] for name in names}
    return {"stride": spec.stride, "crop": spec.size, **columns}


def recorded_views(described: Mapping[str, Any]) -> tuple[View, ...]:
    """Return the views from the JSON content made by `describe`."""
    stride, size = int(described["stride"]), int(described["crop"])
    columns = [described[name] for name in _COLUMNS]
    columns += [described.get(name, [0] * len(columns[0])) for name in ("short_side", "shift")]
    rows = [[int(value) for value in row] for row in zip(*columns, strict=True)]
    return tuple(
        View(
            start=start,
            stride=stride,
            real=real,
            top=top,
            left=left,
            size=size,
            flip=bool(flip),
            short_side=side,
            shift=shift,
        )
        for start, real, top, left, flip, side, shift in rows
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
    if source.root is None and spec.rate is not None:
        raise ValueError(NO_RATE)
    if spec.views == "dense":
        return _dense_views(source, video, spec)
    return _drawn_views(reader_of(source, video, spec.size), _random(video.path), spec, spec.views)


def clip_of_file(path: str | Path, spec: ClipSpec) -> tuple[np.ndarray, View]:
    """Cut the canonical view of a video file, uint8 (spec.frames, spec.size, spec.size, 3), and return it with its position.

    Raises FileNotFoundError if there is no such file, and DamagedVideo if it cannot be used.
    """
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{path}: no such video file")
    return _canonical(partial(read_sized_frames, Path(path), spec.size), spec)


def clip_of_frames(frames_THWC: np.ndarray, spec: ClipSpec, rate: float | None = None) -> tuple[np.ndarray, View]:
    """Cut the canonical view of a video in memory, uint8 (T, H, W, 3) of any length and size, as `read_clip` cuts a file.

    Args:
        rate: frames per second of the video. `spec.rate` needs it.

    Returns the pixels, uint8 (spec.frames, spec.size, spec.size, 3), and their position.

    Raises ValueError if the frames are not uint8 (T, H, W, 3), or `spec.rate` needs a rate.
    """
    if frames_THWC.dtype != np.uint8 or frames_THWC.ndim != 4 or frames_THWC.shape[3] != 3 or 0 in frames_THWC.shape:
        kind = f"{frames_THWC.dtype} of shape {frames_THWC.shape}"
        raise ValueError(f"a video in memory must be uint8 of shape (frames, height, width, 3), got {kind}")
    if spec.rate is not None and not (rate and 0 < rate <= MAX_FPS):
        needed = f"the rate of the video, above 0 and at most {MAX_FPS}"
        raise ValueError(f"clips of {spec.rate:g} frames per second need {needed}, got {rate}")
    return _canonical(reader_of_frames(frames_THWC, rate), spec)


def _canonical(read: Read, spec: ClipSpec) -> tuple[np.ndarray, View]:
    pixels_THWC, cuts = _drawn_views(read, _random(""), spec, 1)
    assert isinstance(pixels_THWC, np.ndarray) and isinstance(cuts, ClipCuts)
    return pixels_THWC, cuts.views[0]


def iter_test_views(
    source: Source, video: Video, spec: ClipSpec, clips: int, crops: int
) -> Iterator[np.ndarray | ClipCuts]:
    """Yield clips x crops views that are evenly spread over time and over the longer side, and finally their positions.

    The views of the first clip come first. A single clip or crop is the middle one. Frames that are spread over the video are
    shifted evenly. Errors are those of `iter_clips`.
    """
    spec = replace(spec, views=clips * crops, scales=None, flip=False)
    if source.root is None and spec.rate is not None:
        raise ValueError(NO_RATE)
    return _drawn_views(reader_of(source, video, spec.size), _even(clips, crops), spec, clips * crops)


def _drawn_views(read: Read, draw: Draw, spec: ClipSpec, count: int) -> Iterator[np.ndarray | ClipCuts]:
    """Yield `count` views of a video and their positions."""

    def views_in_time(total: int) -> list[View]:
        return [_in_time(spec, draw, v, total) for v in range(count)]

    def choose(timing: Timing) -> dict[int, set[int]]:
        sides: dict[int, set[int]] = defaultdict(set)
        for view in views_in_time(_length(spec, timing)):
            for number in _frames_of(spec, timing, view):
                sides[number].add(view.short_side)
        return dict(sides)

    frames, timing = read(choose)
    views = []
    length = _length(spec, timing)
    for v, in_time in enumerate(views_in_time(length)):
        clip = [frames[number, in_time.short_side] for number in _frames_of(spec, timing, in_time)]
        views.append(_in_space(spec, draw, v, in_time, clip[0].shape[:2]))
        yield _cut(clip, views[-1])
    rate = timing.rate_of(spec.frames) if spec.span else spec.rate or timing.rate
    yield ClipCuts(tuple(views), length, rate)


def _dense_views(source: Source, video: Video, spec: ClipSpec) -> Iterator[np.ndarray | ClipCuts]:
    stream, repeats = _dense_stream(source, video, spec)
    frames = (pixels_HWC for number, _, pixels_HWC in stream for _ in range(repeats[number] if repeats else 1))
    views: list[View] = []
    while clip := list(islice(frames, spec.frames)):
        start, real = len(views) * spec.frames * spec.stride, len(clip)
        view = View(start=start, stride=spec.stride, real=real, top=0, left=0, size=spec.size, flip=False)
        views.append(_in_space(spec, _random(video.path), 0, view, clip[0].shape[:2]))
        yield _cut(clip + clip[-1:] * (spec.frames - real), views[-1])
    yield ClipCuts(tuple(views), len(_frame_numbers(spec, stream.timing)), spec.rate or stream.timing.rate)


def _dense_stream(source: Source, video: Video, spec: ClipSpec) -> tuple[FrameStream, Mapping[int, int] | None]:
    """Return every stride-th frame, and how often each is shown at another rate."""
    sides = (spec.size,)
    if source.root is None:
        numbers = _frame_numbers(spec, rendered_timing())[:: spec.stride]
        return FrameStream(rendered(video, dict.fromkeys(numbers, sides))), None
    path, segment = listed_path(source, video)
    if spec.rate is None and segment is None:
        return iter_frames(path, spec.size, lambda number: () if number % spec.stride else sides), None
    # Which frame is on display at a time is known only after the next frame, so the times are read first.
    timed = iter_frames(path, spec.size, lambda number: ())
    for _ in timed:
        pass
    part, first = (timed.timing, 0) if segment is None else part_of(timed.timing, segment)
    repeats = Counter(first + number for number in _frame_numbers(spec, part)[:: spec.stride])
    stream = iter_frames(path, spec.size, lambda number: sides if number in repeats else ())
    return stream_of_part(stream, part), repeats


def _length(spec: ClipSpec, timing: Timing) -> int:
    """Return the number of frames of the video from which the frames of clips are counted."""
    return spec.frames if spec.span else len(_frame_numbers(spec, timing))


def _frames_of(spec: ClipSpec, timing: Timing, view: View) -> list[int]:
    """Return the numbers of the frames of a view in the video."""
    if spec.span:
        return timing.spread(spec.frames, view.shift / 1000).tolist()
    numbers = _frame_numbers(spec, timing)
    return [numbers[i] for i in view.frames(spec.frames)]


def _frame_numbers(spec: ClipSpec, timing: Timing) -> Sequence[int]:
    """Return the frame number of each frame of the resampled video. Raises DamagedVideo if its times are unknown."""
    if spec.rate is None:
        return range(timing.total)
    try:
        return timing.resampled(spec.rate).tolist()
    except ValueError as error:
        raise DamagedVideo(str(error)) from None


# Axes of the random draws. Other numbers would change all drawn views.
_START, _TOP, _LEFT, _FLIP, _SCALE, _SHIFT = range(6)


def _random(path: str) -> Draw:
    """Return the draws of views: the middle choice for the canonical view, else a random one, seeded by the path."""

    def draw(view: int, axis: int, choices: int) -> int:
        if view == 0:
            return (choices - 1) // 2
        seed = hashlib.sha256(os.fsencode(path)).digest()[:8]
        return int(np.random.default_rng([int.from_bytes(seed, "little"), view, axis]).integers(choices))

    return draw


def _even(clips: int, crops: int) -> Draw:
    """Return the draws of test views, crop by crop of each clip: clips and crops that are evenly spread, from end to end."""

    def draw(view: int, axis: int, choices: int) -> int:
        number, count = (view // crops, clips) if axis in (_START, _SHIFT) else (view % crops, crops)
        if count == 1:
            return (choices - 1) // 2
        if axis == _SHIFT:
            return (2 * number + 1) * choices // (2 * count)
        return round(number * (choices - 1) / (count - 1))

    return draw


def _in_time(spec: ClipSpec, draw: Draw, number: int, total: int) -> View:
    """Place view `number` in a video of `total` frames, and draw its scale. Its crop is not set yet."""
    span = (spec.frames - 1) * spec.stride + 1
    if total < span:
        # A short video is used from its first frame and padded after its last frame.
        start, real = 0, (total - 1) // spec.stride + 1
    else:
        start, real = draw(number, _START, total - span + 1), spec.frames
    scale = 1.0
    if spec.scales is not None and number > 0:
        scale = spec.scales[draw(number, _SCALE, len(spec.scales))]
    short_side = round(spec.size / scale)
    view = View(
        start=start, stride=spec.stride, real=real, top=0, left=0, size=spec.size, flip=False, short_side=short_side
    )
    return replace(view, shift=draw(number, _SHIFT, 1000)) if spec.span else view


def _in_space(spec: ClipSpec, draw: Draw, number: int, view: View, frame: tuple[int, int]) -> View:
    """Place view `number` in a frame of (height, width) pixels."""
    top = draw(number, _TOP, frame[0] - spec.size + 1)
    left = draw(number, _LEFT, frame[1] - spec.size + 1)
    flip = spec.flip and number > 0 and draw(number, _FLIP, 2) == 1
    return replace(view, top=top, left=left, flip=flip)


def _cut(frames: Sequence[np.ndarray], view: View) -> np.ndarray:
    """Cut the crop of a view from its resized frames, uint8 (T, H, W, 3)."""
    box = slice(view.top, view.top + view.size), slice(view.left, view.left + view.size)
    clip_THWC = np.stack([pixels_HWC[box] for pixels_HWC in frames])
    return clip_THWC[:, :, ::-1] if view.flip else clip_THWC
