"""Videos cut and copied without decoding, as `ffmpeg -ss START -i SOURCE -c copy TARGET` does, and their true frames."""

from fractions import Fraction
from pathlib import Path

import av
import numpy as np

from tests.helpers.videos import make_video, moving_blocks

COUNT, RATE = 50, 25
_X265 = "log-level=none:pools=1:frame-threads=1:keyint=12:min-keyint=12:scenecut=0"
_SVT = "keyint=12:lp=1"
ENCODERS: dict[str, tuple[str, dict[str, str]]] = {
    "h264": ("libx264", {"x264-params": "keyint=12:scenecut=0:bframes=3"}),
    "h264 open gop": ("libx264", {"x264-params": "keyint=12:min-keyint=6:scenecut=0:bframes=8:b-adapt=0:open-gop=1"}),
    "h264 intra refresh": ("libx264", {"x264-params": "keyint=12:intra-refresh=1:bframes=0"}),
    "hevc": ("libx265", {"x265-params": f"{_X265}:bframes=3:open-gop=0"}),
    "hevc open gop": ("libx265", {"x265-params": f"{_X265}:bframes=8:open-gop=1"}),
    "mpeg1": ("mpeg1video", {"bf": "2", "g": "12"}),
    "mpeg2": ("mpeg2video", {"bf": "2", "g": "12"}),
    "mpeg4": ("mpeg4", {"bf": "2", "g": "12"}),
    "msmpeg4": ("msmpeg4", {"g": "12"}),
    "wmv2": ("wmv2", {"g": "12"}),
    "flv1": ("flv", {"g": "12"}),
    "h263+": ("h263p", {"g": "12"}),
    "vp8": ("libvpx", {"g": "12", "auto-alt-ref": "1", "lag-in-frames": "16", "cpu-used": "8"}),
    "vp9": ("libvpx-vp9", {"g": "12", "auto-alt-ref": "1", "lag-in-frames": "16", "cpu-used": "8"}),
    "av1": ("libsvtav1", {"g": "12", "preset": "12", "svtav1-params": _SVT}),
    "mjpeg": ("mjpeg", {"strict": "-1"}),
    "ffv1": ("ffv1", {}),
}
"""Encoder and options by the kind of video. Each video has several key frames."""


def encode(path: Path, kind: str) -> Path:
    """Write a video of `COUNT` frames. Raises ValueError or FFmpegError if the container does not hold the codec."""
    codec, options = ENCODERS[kind]
    return make_video(path, moving_blocks(0, COUNT), codec=codec, rate=RATE, **options)


def cut(source: Path, target: Path, start: float, **options: str) -> Path:
    """Copy the packets from a key frame near `start`, in seconds. The options are those of the container."""
    with av.open(str(source)) as old, av.open(str(target), "w", options=options) as new:
        stream = old.streams.video[0]
        copied = new.add_stream_from_template(stream, opaque=True)
        old.seek(int(start * 1_000_000))
        following = 0
        shift: int | None = None
        for packet in old.demux(stream):
            if not packet.size or (shift is None and not packet.is_keyframe):
                continue
            if packet.dts is None:
                packet.dts = following  # as the ffmpeg program estimates it
            following = packet.dts + (packet.duration or 1)
            if shift is None:
                shift = packet.dts if packet.pts is None else packet.pts
            packet.dts -= shift
            if packet.pts is not None:
                packet.pts -= shift
            packet.stream = copied
            new.mux(packet)
    return target


def packets_of(path: Path) -> list[bytes]:
    """Return the data of the packets of a video."""
    with av.open(str(path)) as container:
        return [bytes(packet) for packet in container.demux(video=0) if packet.size]


def write_packets(path: Path, template: Path, packets: list[tuple[bytes, bool]], rate: int = RATE) -> Path:
    """Write packets, each with its data and True for a key frame, in the order of their display."""
    with av.open(str(template)) as old, av.open(str(path), "w") as new:
        stream = new.add_stream_from_template(old.streams.video[0])
        for number, (data, is_key) in enumerate(packets):
            packet = av.Packet(data)
            packet.pts = packet.dts = number
            packet.duration, packet.time_base = 1, Fraction(1, rate)
            packet.is_keyframe, packet.stream = is_key, stream
            new.mux(packet)
    return path


def shown_frames(path: Path) -> list[np.ndarray]:
    """Decode as `ffprobe -count_frames` and players do: errors are passed over. Returns frames of RGB, uint8 (h, w, 3).

    Raises IndexError if FFmpeg finds no video, FFmpegError if it cannot open the file.
    """
    frames = []
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        try:
            for packet in container.demux(stream):
                # The last packet has neither data nor times; it ends the stream.
                if packet.size or packet.pts is None:
                    frames += _decoded(packet)
        except av.error.FFmpegError:
            pass
    return frames


def _decoded(packet: av.Packet) -> list[np.ndarray]:
    try:
        return [frame.to_ndarray(format="rgb24") for frame in packet.decode()]
    except av.error.FFmpegError:
        return []
