"""Open a video, decode it from start to end, and say so if anything in it is damaged. No seeking, one thread.

Decoders conceal errors: of files with 200 overwritten bytes most still decode to the full number of frames. So the
decoder is told to raise, frames marked corrupt are refused, the container's checksums and indices are verified
(`damage.py`), and the last timestamp is held against the declared duration.
"""

import errno
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np

from data.damage import container_damage, overrun_decoder
from data.text import one_line


def _reason(error: Exception) -> str:
    """Return FFmpeg's message without the error number and path, on one line."""
    return one_line(getattr(error, "strerror", None) or error)


def _version(library: str) -> str:
    return ".".join(map(str, av.library_versions[library]))


VERSION = f"pyav-{av.__version__} avcodec-{_version('libavcodec')} swscale-{_version('libswscale')} checks-2"
"""What decides which frames a video has and whether it is refused; part of a cache's key."""
# Demuxers for files that hold a video; without this list a text file can be a playlist that opens other files.
_FORMATS = "asf,avi,flv,matroska,webm,mov,mp4,m4a,3gp,3g2,mj2,mpeg,mpegts,mpegvideo,ogg,h264,hevc,ivf"
# More to refuse than outright errors: bits left over behind a picture. Elsewhere good videos have those.
_STRICTER = {"h264": "+aggressive"} | dict.fromkeys(("msmpeg4v1", "msmpeg4v2", "msmpeg4", "wmv1", "wmv2"), "+buffer")
_SYSTEM_ERRORS = frozenset(
    getattr(errno, name, None) for name in ("EACCES", "EMFILE", "ENFILE", "ESTALE", "ETIMEDOUT", "ENOTCONN", "EBADF")
)
_MISSING = 3  # frames that may lack at the end: packed AVI streams and rounded durations lack up to two


class DamagedVideo(Exception):
    """The video cannot be used; the text is the reason, on one line."""


@dataclass(frozen=True)
class Frames:
    """Chosen frames of a video, uint8 (n, h, w, 3), the video's number of frames, and how many a second has."""

    pixels_THWC: np.ndarray
    total: int
    rate: float | None


def read_frames(path: Path, short_side: int, choose: Callable[[int], Sequence[int]]) -> Frames:
    """Decode the frames that `choose(total)` names, resized so that the short side has `short_side` pixels.

    The whole file is decoded, so damage anywhere in it is found. The number of frames that a file declares is an
    estimate: where it is wrong the file is decoded once more, so the choice always follows the true number. Memory
    holds the chosen frames only.

    Raises:
        DamagedVideo: if the file is empty, is no video, ends early, or holds frames that do not decode cleanly.
    """
    with _as_damage(path):
        with _open(path) as container:
            expected = max(1, _declared(container).frames)
        while True:
            wanted = choose(expected)
            frames: dict[int, np.ndarray] = {}
            decoded = iter_frames(path, short_side, frozenset(wanted).__contains__)
            while True:
                try:
                    number, pixels_HWC = next(decoded)
                except StopIteration as end:
                    total, rate = end.value
                    break
                frames[number] = pixels_HWC
            if total == expected:
                return Frames(np.stack([frames[i] for i in wanted]), total, rate)
            expected = total


def iter_frames(
    path: Path, short_side: int, wanted: Callable[[int], bool]
) -> Generator[tuple[int, np.ndarray], None, tuple[int, float | None]]:
    """Decode a video from start to end; gives number and pixels (h, w, 3) of each wanted frame, as it comes.

    Returns, when all are given, the number of frames and how many a second has. Raises DamagedVideo as `read_frames`
    does, often only at the end.
    """
    with _as_damage(path):
        return (yield from _decode(path, short_side, wanted))


@contextmanager
def _as_damage(path: Path) -> Iterator[None]:
    try:
        if path.stat().st_size == 0:
            raise DamagedVideo("empty file")
        yield
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: is gone since it was listed") from None
    except av.error.FFmpegError as error:
        _raise_if_not_the_videos_fault(error, path)
        raise DamagedVideo(f"does not open as a video: {_reason(error)}") from None


def _raise_if_not_the_videos_fault(error: Exception, path: Path) -> None:
    """A disk that fails or a folder that is not mounted must not be recorded as damage: that would be for ever."""
    number = getattr(error, "errno", None)
    if number == errno.EIO:  # what some demuxers say of damage too; if the disk fails, reading fails here
        with path.open("rb") as file:
            while file.read(2**20):
                pass
    elif number in _SYSTEM_ERRORS:
        raise OSError(f"{path}: cannot be read: {_reason(error)}") from None


def resized(frame: av.VideoFrame, short_side: int) -> np.ndarray:
    """The frame upright as uint8 RGB (h, w, 3), aspect ratio kept."""
    height, width = _shape(frame, short_side)
    scale = short_side / min(frame.width, frame.height)
    pixels_HWC = frame.reformat(
        width=width, height=height, format="rgb24", interpolation="AREA" if scale < 1 else "BICUBIC", threads=1
    ).to_ndarray()
    return np.ascontiguousarray(np.rot90(pixels_HWC, k=round(getattr(frame, "rotation", 0) / 90) % 4))


def _shape(frame: av.VideoFrame, short_side: int) -> tuple[int, int]:
    """Height and width of the resized frame."""
    scale = short_side / min(frame.width, frame.height)
    return max(short_side, round(frame.height * scale)), max(short_side, round(frame.width * scale))


@dataclass(frozen=True)
class _Declared:
    """What the file says of itself; 0 where it says nothing."""

    frames: int
    seconds: float
    start: float
    rate: float
    counts_frames: bool  # the number of frames is in the file, not computed from its duration; AVI counts pauses in


def _open(path: Path) -> av.container.InputContainer:
    container = av.open(f"file:{path}", metadata_errors="replace", options={"format_whitelist": _FORMATS})
    if not container.streams.video or container.streams.video[0].codec_context is None:
        what = "holds no video stream" if not container.streams.video else "holds video of an unknown codec"
        container.close()
        raise DamagedVideo(what)
    return container


def _declared(container: av.container.InputContainer) -> _Declared:
    stream = container.streams.video[0]
    rate = float(stream.average_rate or 0)
    seconds = (container.duration or 0) / av.time_base
    frames = stream.frames or round(seconds * rate)
    counts_frames = bool(stream.frames) and container.format.name != "avi"
    return _Declared(frames, seconds, (container.start_time or 0) / av.time_base, rate, counts_frames)


def _decode(
    path: Path, short_side: int, wanted: Callable[[int], bool]
) -> Generator[tuple[int, np.ndarray], None, tuple[int, float | None]]:
    count, hidden, end = 0, 0, 0.0
    shape: tuple[int, int] | None = None
    with _open(path) as container:
        if damage := container_damage(path, container.format.name):
            raise DamagedVideo(damage)
        declared = _declared(container)
        stream = container.streams.video[0]
        stream.thread_type = "NONE"
        stream.codec_context.options = {"err_detect": "explode" + _STRICTER.get(stream.codec_context.name, "")}
        overrun = overrun_decoder(stream.codec_context)
        try:
            for packet in container.demux():  # of all streams: the file ends where the last of them ends
                end = max(end, _end(packet, declared.rate))
                hidden += packet.stream is stream and packet.is_discard  # cut away by an edit list
                if overrun and packet.stream is stream:
                    overrun.decode(packet)
                for frame in packet.decode() if packet.stream is stream else ():
                    if frame.is_corrupt:
                        raise DamagedVideo(f"frame {count} is corrupt")
                    shape = shape or _shape(frame, short_side)
                    if _shape(frame, short_side) != shape:
                        raise DamagedVideo(f"frame {count} has another shape than the first")
                    if wanted(count):
                        yield count, resized(frame, short_side)
                    count += 1
        except (av.error.FFmpegError, ValueError) as error:
            _raise_if_not_the_videos_fault(error, path)
            raise DamagedVideo(f"frame {count} does not decode: {_reason(error)}") from None
    _check_early_end(declared, count, hidden, end)
    return count, declared.rate or None


def _end(packet: av.Packet, rate: float) -> float:
    """When the packet has been shown, in seconds."""
    if packet.pts is None or packet.time_base is None:
        return 0.0
    length = float(packet.duration * packet.time_base) if packet.duration else 1 / rate if rate else 0.0
    return float(packet.pts * packet.time_base) + length


def _check_early_end(declared: _Declared, count: int, hidden: int, end: float) -> None:
    if count == 0:
        raise DamagedVideo("holds no frames")
    if declared.counts_frames:
        missing = declared.frames - count - hidden
    else:  # durations count from zero in some formats and from the first picture in others: believe the milder
        rate = min(declared.rate, count / end) if end > 0 else declared.rate  # an AVI may tick faster than frames come
        missing = round((declared.seconds - max(end, end - declared.start)) * rate)
    if missing > _MISSING:
        raise DamagedVideo(f"ends early: {count} frames of about {count + missing}")
