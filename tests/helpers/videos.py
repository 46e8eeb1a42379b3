"""Tiny videos, identical in every run."""

from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

MakeVideo = Callable[..., Path]
"""Type of the fixture `make_video`."""


def make_video(
    path: Path,
    frames: Sequence[np.ndarray],
    codec: str = "mpeg4",
    rate: int = 10,
    times: Sequence[int] | None = None,
    last_duration: int = 0,
    audio_seconds: float = 0,
    **options: str,
) -> Path:
    """Write frames, uint8 (h, w, 3), as a video. `times` and `last_duration` are in ticks of 1 / rate seconds."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate)
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = "yuv420p"
        stream.bit_rate = 2_000_000
        stream.options = options
        sound = container.add_stream("aac", rate=16000) if audio_seconds else None
        packets = []
        for time, pixels in zip(times or range(len(frames)), frames, strict=True):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts, frame.time_base = time, Fraction(1, rate)
            packets += stream.encode(frame)
        packets += stream.encode(None)
        if last_duration:
            packets[-1].duration = last_duration
        if sound is not None:
            for first in range(0, int(audio_seconds * 16000), 1024):
                silence = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
                silence.sample_rate, silence.pts = 16000, first
                packets += sound.encode(silence)
            packets += sound.encode(None)
        for packet in packets:
            container.mux(packet)
    return path


def write_silence(path: Path) -> None:
    """Write a file with one second of sound and no video stream."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=16000)
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 16000), np.float32), format="fltp", layout="mono")
        sound.sample_rate, sound.pts = 16000, 0
        for packet in [*stream.encode(sound), *stream.encode(None)]:
            container.mux(packet)


def numbered_frames(count: int, height: int = 48, width: int = 64) -> list[np.ndarray]:
    """Grey frames whose brightness encodes the frame number, up to 29."""
    return [np.full((height, width, 3), 20 + 8 * number, np.uint8) for number in range(count)]


def frame_numbers(pixels_THWC: np.ndarray) -> list[int]:
    """Numbers of decoded frames of `numbered_frames`."""
    return [round((frame.mean() - 20) / 8) for frame in pixels_THWC]


def moving_blocks(seed: int = 0, count: int = 24) -> list[np.ndarray]:
    """Frames of random blocks that move diagonally, so that every frame takes many bytes."""
    blocks = np.random.default_rng(seed).integers(0, 255, (20, 24, 3), dtype=np.uint8).repeat(8, 0).repeat(8, 1)
    return [np.ascontiguousarray(blocks[i : i + 96, 2 * i : 2 * i + 128]) for i in range(count)]


def moving_square(direction: int, start: int, count: int = 20, height: int = 48, width: int = 64) -> list[np.ndarray]:
    """Frames of a bright square that moves left (-1) or right (1) in front of a grey gradient."""
    frames = []
    for t in range(count):
        frame = np.repeat(np.linspace(30, 90, height, dtype=np.uint8)[:, None], width, axis=1)[..., None].repeat(3, -1)
        left = (start + direction * 2 * t) % (width - 12)
        frame[18:30, left : left + 12] = (230, 200, 170)
        frames.append(np.ascontiguousarray(frame))
    return frames
