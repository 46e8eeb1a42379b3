"""Reading of the frames of a video of a source: a file, a part of it, a built-in video, or frames in memory.

Legend: T H W C frames, height, width, colours.
"""

from collections.abc import Callable, Collection, Generator, Mapping
from functools import partial
from pathlib import Path

import av
import numpy as np

from data.decoding import DamagedVideo, FrameStream, SizedFrame, read_sized_frames, resized
from data.segments import Segment, split_path
from data.sources import Source, Video
from data.timing import Timing

Choose = Callable[[Timing], Mapping[int, Collection[int]]]
"""Choice of the frame numbers of a video, each with its short sides."""
Read = Callable[[Choose], tuple[dict[tuple[int, int], np.ndarray], Timing]]
"""Reading of the chosen frames, by number and short side, and of the timing; see `read_sized_frames`."""


def reader_of(source: Source, video: Video, short_side: int) -> Read:
    """Return the function that reads frames of a video of a source."""
    if source.root is not None:
        path, segment = listed_path(source, video)
        read = partial(read_sized_frames, path, short_side)
        return read if segment is None else partial(_read_part, read, segment)

    def render(choose: Choose) -> tuple[dict[tuple[int, int], np.ndarray], Timing]:
        timing = rendered_timing()
        return {(number, side): pixels for number, side, pixels in rendered(video, choose(timing))}, timing

    return render


def reader_of_frames(frames_THWC: np.ndarray, rate: float | None) -> Read:
    """Return the function that reads frames in memory, uint8 (T, H, W, 3) with `rate` frames per second."""

    def read(choose: Choose) -> tuple[dict[tuple[int, int], np.ndarray], Timing]:
        timing = Timing(len(frames_THWC), rate)
        frames: dict[tuple[int, int], np.ndarray] = {}
        for number, sides in choose(timing).items():
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(frames_THWC[number]))
            frames |= {(number, side): resized(frame, side) for side in sides}
        return frames, timing

    return read


def _read_part(read: Read, segment: Segment, choose: Choose) -> tuple[dict[tuple[int, int], np.ndarray], Timing]:
    """Read chosen frames of a part of a video. Their numbers, and the timing, are those of the part alone."""
    part: Timing | None = None
    first = 0

    def choose_in_video(timing: Timing) -> Mapping[int, Collection[int]]:
        nonlocal part, first
        part, first = part_of(timing, segment)
        return {first + number: sides for number, sides in choose(part).items()}

    frames, _ = read(choose_in_video)
    assert part is not None
    return {(number - first, side): pixels_HWC for (number, side), pixels_HWC in frames.items()}, part


def part_of(timing: Timing, segment: Segment) -> tuple[Timing, int]:
    """Do the work of `Timing.part`. Raises DamagedVideo if the video has no such part."""
    try:
        return timing.part(segment.start, segment.end)
    except ValueError as error:
        raise DamagedVideo(str(error)) from None


def stream_of_part(stream: FrameStream, part: Timing) -> FrameStream:
    """Return a stream whose timing is that of a part."""

    def frames() -> Generator[SizedFrame, None, Timing]:
        yield from stream
        return part

    return FrameStream(frames())


def listed_path(source: Source, video: Video) -> tuple[Path, Segment | None]:
    """Return the path of a video, and which part of it is used.

    Raises ValueError if its size has changed, FileNotFoundError if it has disappeared.
    """
    assert source.root is not None
    path, segment = source.root / video.path, None
    if not path.exists():
        name, segment = split_path(video.path)
        path = source.root / name
    if not path.exists():
        raise FileNotFoundError(f"{path}: has disappeared since it was listed")
    if path.stat().st_size != video.size:
        raise ValueError(f"{path}: has changed since it was listed; run again")
    return path, segment


def rendered_timing() -> Timing:
    from data import moving_digits  # imports torch

    return Timing(moving_digits.FRAMES, None)


def rendered(video: Video, sides: Mapping[int, Collection[int]]) -> Generator[SizedFrame, None, Timing]:
    """Render frames of a built-in video, each resized to its short sides."""
    split, index = video.path.split("/")
    from data import moving_digits  # imports torch

    numbers = sorted(sides)
    for number, pixels_HWC in zip(numbers, moving_digits.render(0, split, int(index), numbers), strict=True):
        frame = av.VideoFrame.from_ndarray(pixels_HWC)
        for side in sides[number]:
            yield number, side, pixels_HWC if side == moving_digits.SIZE else resized(frame, side)
    return rendered_timing()
