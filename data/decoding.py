"""Open a video, decode it from start to end, and report any damage in it. No seeking, one thread.

Decoders conceal errors: most files with 200 overwritten bytes still decode to the full number of frames. Therefore the
decoder is set to raise, frames marked corrupt are refused, the container's checksums and indices are verified
(`damage.py`), and the last timestamp is compared with the declared duration.
"""

import errno
from collections.abc import Callable, Collection, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import av
import numpy as np

from data.damage import container_damage, overrun_decoder
from data.text import one_line
from data.timing import Timing

_VERSIONS = {library: ".".join(map(str, numbers)) for library, numbers in av.library_versions.items()}
VERSION = f"pyav-{av.__version__} avcodec-{_VERSIONS['libavcodec']} swscale-{_VERSIONS['libswscale']} checks-2"
"""Versions that decide which frames a video has and whether it is refused; part of a cache's key."""
# Allowed demuxers. Without this list, a text file could be read as a playlist that opens other files.
_FORMATS = "asf,avi,flv,matroska,webm,mov,mp4,m4a,3gp,3g2,mj2,mpeg,mpegts,mpegvideo,ogg,h264,hevc,ivf"
# Codecs for which unused bits after a picture are errors too. With other codecs, intact videos have such bits.
_STRICTER = {"h264": "+aggressive"} | dict.fromkeys(("msmpeg4v1", "msmpeg4v2", "msmpeg4", "wmv1", "wmv2"), "+buffer")
_SYSTEM_ERRORS = {errno.EACCES, errno.EMFILE, errno.ENFILE, errno.ESTALE, errno.ETIMEDOUT, errno.ENOTCONN, errno.EBADF}
# Frames that may be missing at the end. Packed AVI streams and rounded durations account for up to two.
_MISSING = 3

SizedFrame = tuple[int, int, np.ndarray]
"""Number, short side and pixels (h, w, 3) of a frame."""


class DamagedVideo(Exception):
    """Error for a video that cannot be used. The message is the reason, in one line."""


@dataclass(frozen=True)
class Frames:
    """Chosen frames of a video, uint8 (n, h, w, 3), with its total number of frames and its frames per second."""

    pixels_THWC: np.ndarray
    total: int
    rate: float | None


class FrameStream:
    """Iterator over the wanted frames of a video. At its end it sets the `timing` of the video."""

    timing: Timing

    def __init__(self, frames: Generator[SizedFrame, None, Timing]) -> None:
        self._frames = frames

    def __iter__(self) -> Iterator[SizedFrame]:
        self.timing = yield from self._frames


def read_frames(path: Path, short_side: int, choose: Callable[[int], Sequence[int]]) -> Frames:
    """Decode the frames numbered `choose(total)`, resized so that the short side has `short_side` pixels.

    Raises the same errors as `read_sized_frames`.
    """
    frames, timing = read_sized_frames(
        path, short_side, lambda timing: dict.fromkeys(choose(timing.total), [short_side])
    )
    pixels_THWC = np.stack([frames[number, short_side] for number in choose(timing.total)])
    return Frames(pixels_THWC, timing.total, timing.rate)


def read_sized_frames(
    path: Path, short_side: int, choose: Callable[[Timing], Mapping[int, Collection[int]]]
) -> tuple[dict[tuple[int, int], np.ndarray], Timing]:
    """Decode some frames of a video, and resize each to one or more short sides.

    The whole file is decoded, so damage anywhere in it is found. The number of frames and the rate that a file declares are
    estimates: if they lead to a wrong choice, the file is decoded once more. Memory holds only the chosen frames.

    Args:
        short_side: short side at which all frames must have the same shape.
        choose: maps the timing of the video to the chosen frame numbers, each with its short sides.

    Returns the pixels (h, w, 3) by number and short side, and the timing.

    Raises DamagedVideo if the file is empty, is not a video, ends early, or contains frames that do not decode cleanly.
    """
    with _as_damage(path), _open(path) as container:
        declared = _declared(container)
    chosen: Mapping[int, Collection[int]] = {}
    # The declared rate may be too wrong for any choice.
    with suppress(DamagedVideo):
        chosen = choose(Timing(max(1, declared.frames), declared.rate or None))
    while True:
        stream = iter_frames(path, short_side, partial(_sides_of, chosen))
        frames = {(number, side): pixels for number, side, pixels in stream}
        earlier, chosen = chosen, choose(stream.timing)
        if chosen == earlier:
            return frames, stream.timing


def _sides_of(chosen: Mapping[int, Collection[int]], number: int) -> Collection[int]:
    return chosen.get(number, ())


def iter_frames(path: Path, short_side: int, sides_of: Callable[[int], Collection[int]]) -> FrameStream:
    """Decode frames like `read_sized_frames`, but yield each at once. Damage may be found only at the end."""
    return FrameStream(_decode(path, short_side, sides_of))


@contextmanager
def _as_damage(path: Path) -> Iterator[None]:
    try:
        if path.stat().st_size == 0:
            raise DamagedVideo("empty file")
        yield
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: has disappeared since it was listed") from None
    except av.error.FFmpegError as error:
        _raise_system_error(error, path)
        raise DamagedVideo(f"does not open as a video: {_reason(error)}") from None


def _raise_system_error(error: Exception, path: Path) -> None:
    """Raise an OSError if the disk or the system failed, because a cache would record a DamagedVideo permanently."""
    number = getattr(error, "errno", None)
    if number == errno.EIO:
        # Some demuxers report damage as EIO too. If the disk has failed, reading the file raises an OSError.
        with path.open("rb") as file:
            while file.read(2**20):
                pass
    elif number in _SYSTEM_ERRORS:
        raise OSError(f"{path}: cannot be read: {_reason(error)}") from None


def _reason(error: Exception) -> str:
    """Return FFmpeg's message without the error number and the path."""
    return one_line(getattr(error, "strerror", None) or error)


def resized(frame: av.VideoFrame, short_side: int) -> np.ndarray:
    """Return the frame upright as uint8 RGB (h, w, 3), resized with its aspect ratio kept."""
    height, width = _shape(frame, short_side)
    method = "AREA" if short_side < min(frame.width, frame.height) else "BICUBIC"
    scaled = frame.reformat(width=width, height=height, format="rgb24", interpolation=method, threads=1)
    quarter_turns = round(getattr(frame, "rotation", 0) / 90) % 4
    return np.ascontiguousarray(np.rot90(scaled.to_ndarray(), k=quarter_turns))


def _shape(frame: av.VideoFrame, short_side: int) -> tuple[int, int]:
    """Return height and width of the resized frame, before it is turned upright."""
    scale = short_side / min(frame.width, frame.height)
    return max(short_side, round(frame.height * scale)), max(short_side, round(frame.width * scale))


@dataclass(frozen=True)
class _Declared:
    """Length of the video according to its file, with 0 for an unknown number."""

    frames: int
    seconds: float
    start: float
    rate: float
    counts_frames: bool
    """True if the file stores `frames`, False if `frames` is computed from the duration or, in AVI files, includes pauses."""


def _open(path: Path) -> av.container.InputContainer:
    container = av.open(f"file:{path}", metadata_errors="replace", options={"format_whitelist": _FORMATS})
    if container.streams.video and container.streams.video[0].codec_context is not None:
        return container
    reason = "holds video of an unknown codec" if container.streams.video else "holds no video stream"
    container.close()
    raise DamagedVideo(reason)


def _declared(container: av.container.InputContainer) -> _Declared:
    stream = container.streams.video[0]
    rate = float(stream.average_rate or 0)
    seconds = (container.duration or 0) / av.time_base
    frames = stream.frames or round(seconds * rate)
    counts_frames = bool(stream.frames) and container.format.name != "avi"
    return _Declared(frames, seconds, (container.start_time or 0) / av.time_base, rate, counts_frames)


def _decode(
    path: Path, short_side: int, sides_of: Callable[[int], Collection[int]]
) -> Generator[SizedFrame, None, Timing]:
    """Yield the chosen frames, and return the timing of the video."""
    stamps_T: list[float | None] = []
    count, hidden, end = 0, 0, 0.0
    shape: tuple[int, int] | None = None
    with _as_damage(path), _open(path) as container:
        if damage := container_damage(path, container.format.name):
            raise DamagedVideo(damage)
        declared = _declared(container)
        stream = container.streams.video[0]
        stream.thread_type = "NONE"
        stream.codec_context.options = {"err_detect": "explode" + _STRICTER.get(stream.codec_context.name, "")}
        overrun = overrun_decoder(stream.codec_context)
        try:
            for packet in container.demux():
                # Packets of all streams count, because the file ends where the last stream ends.
                end = max(end, _end(packet, declared.rate))
                if packet.stream is not stream:
                    continue
                if packet.is_discard:
                    hidden += 1  # cut away by an edit list
                if overrun is not None:
                    overrun.decode(packet)
                for frame in packet.decode():
                    if frame.is_corrupt:
                        raise DamagedVideo(f"frame {count} is corrupt")
                    shape = shape or _shape(frame, short_side)
                    if _shape(frame, short_side) != shape:
                        raise DamagedVideo(f"frame {count} has another shape than the first frame")
                    for side in sides_of(count):
                        yield count, side, resized(frame, side)
                    stamps_T.append(frame.time)
                    count += 1
        except (av.error.FFmpegError, ValueError) as error:
            _raise_system_error(error, path)
            raise DamagedVideo(f"frame {count} does not decode: {_reason(error)}") from None
    _check_early_end(declared, count, hidden, end)
    return Timing(count, declared.rate or None, stamps_T)


def _end(packet: av.Packet, rate: float) -> float:
    """Return the time in seconds at which the display of the packet ends, 0 if it is unknown."""
    if packet.pts is None or packet.time_base is None:
        return 0.0
    start, default = float(packet.pts * packet.time_base), 1 / rate if rate else 0.0
    return start + (float(packet.duration * packet.time_base) if packet.duration else default)


def _check_early_end(declared: _Declared, count: int, hidden: int, end: float) -> None:
    if count == 0:
        raise DamagedVideo("holds no frames")
    if declared.counts_frames:
        missing = declared.frames - count - hidden
    else:
        # The rate that an AVI declares may be higher than its true frame rate.
        rate = min(declared.rate, count / end) if end > 0 else declared.rate
        # Durations count from zero in some formats and from the first picture in others. Use the smaller gap.
        missing = round((declared.seconds - max(end, end - declared.start)) * rate)
    if missing > _MISSING:
        raise DamagedVideo(f"ends early: {count} of about {count + missing} frames")
