"""Open a video, decode it from start to end, and report any damage in it. No seeking, one thread.

Decoders conceal errors: most files with 200 overwritten bytes still decode to the full number of frames. Therefore the
decoder is set to raise, frames marked corrupt are refused, the container's checksums and indices are verified
(`damage.py`), and the last timestamp is compared with the declared duration.
"""

import errno
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from itertools import chain
from pathlib import Path

import av
import numpy as np
from av.stream import Disposition

from data.damage import container_damage, lacks_fragments
from data.pictures import Decoder, Joined, JoinedDecoder
from data.resizing import Resizer
from data.text import one_line
from data.timing import Timing

_VERSIONS = {library: ".".join(map(str, numbers)) for library, numbers in av.library_versions.items()}
VERSION = f"pyav-{av.__version__} avcodec-{_VERSIONS['libavcodec']} swscale-{_VERSIONS['libswscale']} checks-4"
"""Versions that decide which frames a video has, their pixels, and whether it is refused; part of a cache's key."""
# Allowed demuxers. Without this list, a text file could be read as a playlist that opens other files.
_FORMATS = (
    "asf,avi,dv,flv,matroska,webm,mov,mp4,m4a,3gp,3g2,mj2,mpeg,mpegts,mpegvideo,m4v,mjpeg,ogg,h264,hevc,ivf,obu,av1"
)
_SYSTEM_ERRORS = {
    errno.EACCES,
    errno.EMFILE,
    errno.ENFILE,
    errno.ESTALE,
    errno.ETIMEDOUT,
    errno.ENOTCONN,
    errno.EBADF,
}
_MEMORY = 1 << 28  # bytes that must be free before a video is called damaged: dozens of large pictures
# Frames that may be missing at the end. Packed AVI streams and rounded durations account for up to two.
_TOLERATED = 3
_SEARCHED = 1 << 16  # bytes in which FFmpeg searches for the next transport packet before it pauses

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
        declared = _declared(container, _shown(container, path))
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
    """Raise FFmpeg's errors as DamagedVideo, unless the machine is to blame: a cache would record damage permanently."""
    try:
        if path.stat().st_size == 0:
            raise DamagedVideo("empty file")
        yield
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: has disappeared since it was listed") from None
    except av.error.FFmpegError as error:
        _raise_system_error(error, path)
        _check_machine(path)
        # FFmpeg's error for a format that is not on the list.
        not_listed = error.errno == errno.EINVAL
        reason = "the format is not supported" if not_listed else _reason(error)
        raise DamagedVideo(f"does not open as a video: {reason}") from None
    except DamagedVideo:
        _check_machine(path)
        raise
    except MemoryError:
        raise OSError(f"{path}: cannot be read: out of memory") from None


def _raise_system_error(error: Exception, path: Path) -> None:
    """Raise an OSError if the system failed. Some demuxers report damage as EIO and ENOMEM: see `_check_machine`."""
    if getattr(error, "errno", None) in _SYSTEM_ERRORS:
        raise OSError(f"{path}: cannot be read: {_reason(error)}") from None


def _check_machine(path: Path) -> None:
    """Raise OSError if the file cannot be read to its end, or if memory is short.

    FFmpeg hides both: a decoder gets a part of a packet, or reports that the data is invalid.
    """
    try:
        np.empty(_MEMORY, np.uint8)
        with path.open("rb") as file:
            while file.read(2**20):
                pass
    except MemoryError:
        raise OSError(f"{path}: cannot be read: out of memory") from None
    except OSError as error:
        raise OSError(f"{path}: cannot be read: {one_line(error.strerror or error)}") from None


def _reason(error: Exception) -> str:
    """Return FFmpeg's message without the error number and the path."""
    return one_line(getattr(error, "strerror", None) or error)


def resized(frame: av.VideoFrame, short_side: int) -> np.ndarray:
    """Return a frame with square pixels as uint8 RGB (h, w, 3), upright and resized with its aspect ratio kept."""
    return Resizer(short_side)(frame)


@dataclass(frozen=True)
class _Declared:
    """Length of the video according to its file, with 0 for an unknown number."""

    frames: int
    seconds: float
    start: float
    rate: float
    packets: int
    """Number of packets in the index, 0 if the file has none."""


@dataclass
class _Progress:
    """Part of a file that has been read."""

    packets: int = 0
    """Packets of the video, also those without data."""
    due: int | None = None
    """Decoding time, in ticks, of the next packet of the video."""
    has_gap: bool = False
    """True if a packet of the video has a later decoding time."""
    end: float = 0.0
    """Time in seconds at which the file ends, in any of its streams."""


def _open(path: Path) -> av.container.InputContainer:
    container = av.open(f"file:{path}", metadata_errors="replace", options={"format_whitelist": _FORMATS})
    reason = "holds no video stream"
    for stream in _moving(container):
        if stream.codec_context is not None:
            return container
        reason = "holds video of an unknown codec"
    container.close()
    raise DamagedVideo(reason)


def _moving(container: av.container.InputContainer) -> list[av.VideoStream]:
    """Return the streams that are no cover pictures."""
    return [stream for stream in container.streams.video if Disposition.attached_pic not in stream.disposition]


def _shown(container: av.container.InputContainer, path: Path) -> av.VideoStream:
    """Return the stream that FFmpeg shows: a default one before others, the largest picture before smaller ones.

    Streams without packets come last.
    """
    streams = [stream for stream in _moving(container) if stream.codec_context is not None]
    streams.sort(
        key=lambda stream: (Disposition.default in stream.disposition, stream.width * stream.height), reverse=True
    )
    if len(streams) == 1:
        return streams[0]
    filled = _filled(path, streams[0].index)
    return next((stream for stream in streams if stream.index in filled), streams[0])


def _filled(path: Path, wanted: int) -> set[int]:
    """Return the indices of the streams with packets, as far as the first packet of the wanted stream."""
    found: set[int] = set()
    with _open(path) as container, suppress(av.error.FFmpegError):
        for packet in container.demux():
            if packet.size:
                found.add(packet.stream.index)
            if wanted in found:
                break
    return found


def _declared(container: av.container.InputContainer, stream: av.VideoStream) -> _Declared:
    rate = float(stream.average_rate or 0)
    seconds = (container.duration or 0) / av.time_base
    # Only MP4 files have an index of all packets. In other formats FFmpeg fills it while it reads.
    packets = len(stream.index_entries) if "mp4" in container.format.name and stream.frames else 0
    frames = packets or stream.frames or round(seconds * rate)
    return _Declared(frames, seconds, (container.start_time or 0) / av.time_base, rate, packets)


def _decode(
    path: Path, short_side: int, sides_of: Callable[[int], Collection[int]]
) -> Generator[SizedFrame, None, Timing]:
    """Yield the chosen frames, and return the timing of the video."""
    done = -1

    def once(number: int) -> Collection[int]:
        nonlocal done
        if number <= done:
            return ()
        done = number
        return sides_of(number)

    try:
        return (yield from _decode_with(Decoder, path, short_side, once))
    except Joined:
        return (yield from _decode_with(JoinedDecoder, path, short_side, once))


def _decode_with(
    decoder: type[Decoder], path: Path, short_side: int, sides_of: Callable[[int], Collection[int]]
) -> Generator[SizedFrame, None, Timing]:
    stamps_T: list[float | None] = []
    last = 0.0
    count, size = 0, (0, 0)
    with _as_damage(path), _open(path) as container:
        if damage := container_damage(path, container.format.name):
            raise DamagedVideo(damage)
        stream = _shown(container, path)
        time_base = stream.time_base or Fraction(1, av.time_base)
        declared, progress = _declared(container, stream), _Progress()
        resizers = {short_side: Resizer(short_side, stream.sample_aspect_ratio)}
        shapes: dict[int, tuple[int, int]] = {}
        for frame in _frames(decoder(stream, path), _packets(container, stream, path, progress), path):
            if (frame.width, frame.height) != size:
                size = frame.width, frame.height
                aspect = stream.codec_context.sample_aspect_ratio if shapes else None
                shape = resizers[short_side].shape(frame, aspect)
                if shapes.setdefault(short_side, shape) != shape:
                    raise DamagedVideo(f"frame {count} has another shape than the first frame")
            for side in sides_of(count):
                resizer = resizers.setdefault(side, Resizer(side, stream.sample_aspect_ratio))
                try:
                    pixels_HWC = resizer(frame, shapes.setdefault(side, resizer.shape(frame, aspect)))
                except (av.error.FFmpegError, ValueError) as error:
                    raise DamagedVideo(f"frame {count} cannot be converted to RGB: {_reason(error)}") from None
                yield count, side, pixels_HWC
            # PyAV gives frames that the end of the packets releases no time base.
            stamps_T.append(None if frame.pts is None else float(frame.pts * time_base))
            last = float(frame.duration * time_base)
            count += 1
        if count == 0:
            raise DamagedVideo("holds no frames")
        if missing := _missing(declared, progress, count):
            raise DamagedVideo(f"ends early: {count} of about {count + missing} frames")
        # In MP4 files, the time of a packet is the sum of the durations before it, unless a fragment states another one.
        if "mp4" in container.format.name and progress.has_gap and lacks_fragments(path):
            raise DamagedVideo("a fragment is missing")
    return Timing(count, declared.rate or None, stamps_T, last)


def _packets(
    container: av.container.InputContainer, stream: av.VideoStream, path: Path, progress: _Progress
) -> Iterator[av.Packet]:
    """Yield the packets of a stream that hold data."""
    rate = float(stream.average_rate or 0)
    pauses = path.stat().st_size // _SEARCHED
    while True:
        try:
            for packet in container.demux():
                # Packets of all streams count, because the file ends where the last stream ends.
                progress.end = max(progress.end, _end(packet, rate))
                # A packet without data repeats a frame. A decoder would refuse it, or take it for the end.
                if packet.stream is stream and packet.dts is not None:
                    progress.has_gap |= progress.due is not None and packet.dts > progress.due
                    progress.due = packet.dts + (packet.duration or 0)
                if packet.stream is stream and (packet.size or packet.dts is not None):
                    progress.packets += 1
                if packet.stream is stream and packet.size:
                    yield packet
            return
        except av.error.BlockingIOError:
            # FFmpeg pauses after each 64 KiB without a transport packet, for example in padding.
            if pauses == 0:
                return
            pauses -= 1
        except av.error.FFmpegError as error:
            # FFmpeg searches 64 KiB for the next page. If pages follow, the file ends early by its last time stamp.
            if container.format.name == "ogg" and isinstance(error, av.error.InvalidDataError):
                return
            _raise_system_error(error, path)
            raise DamagedVideo(f"packet {progress.packets} cannot be read: {_reason(error)}") from None


def _frames(decoder: Decoder, packets: Iterable[av.Packet], path: Path) -> Iterator[av.VideoFrame]:
    """Decode all packets. Raises DamagedVideo for a packet with an error or a corrupt frame."""
    count = 0
    for packet in chain(packets, [None]):
        try:
            frames = decoder.decode(packet)
        except (av.error.FFmpegError, ValueError) as error:
            _raise_system_error(error, path)
            raise DamagedVideo(f"frame {count} does not decode: {_reason(error)}") from None
        for frame in frames:
            if frame.is_corrupt and decoder.is_strict:
                raise DamagedVideo(f"frame {count} is corrupt")
            yield frame
            count += 1


def _end(packet: av.Packet, rate: float) -> float:
    """Return the time in seconds at which the display of the packet ends, 0 if it is unknown."""
    if packet.pts is None or packet.time_base is None:
        return 0.0
    start, default = float(packet.pts * packet.time_base), 1 / rate if rate else 0.0
    return start + (float(packet.duration * packet.time_base) if packet.duration else default)


def _missing(declared: _Declared, progress: _Progress, count: int) -> int:
    """Return the number of frames that the end of the file lacks."""
    if declared.packets:
        return max(0, declared.packets - progress.packets)
    end = progress.end
    # The rate that an AVI declares may be higher than its true frame rate.
    rate = min(declared.rate, count / end) if end > 0 else declared.rate
    # Durations count from zero in some formats and from the first picture in others. Use the smaller gap.
    missing = round((declared.seconds - max(end, end - declared.start)) * rate)
    return missing if missing > _TOLERATED else 0
