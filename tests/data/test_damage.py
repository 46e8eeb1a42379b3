"""Many kinds of unusual and damaged files among good ones: damaged files are refused, all others are read correctly."""

import random
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from data.decoding import DamagedVideo, read_frames
from tests.helpers.videos import make_video, moving_blocks, write_silence

GOOD = [
    ("mp4", "libx264"),
    ("mkv", "libx264"),
    ("avi", "mpeg4"),
    ("ts", "libx264"),
    ("mov", "mpeg4"),
    ("webm", "libvpx"),
]
OVERWRITTEN = [
    ("mp4", "libx264"),
    ("mkv", "libx264"),
    ("ts", "libx264"),
    ("flv", "libx264"),
    ("mp4", "mpeg4"),
    ("avi", "mpeg4"),
    ("avi", "msmpeg4v3"),
    ("mpg", "mpeg2video"),
    # The decoders of VP8 and HEVC detect only about 10 % and 40 % of the damage, but these containers have checksums.
    ("mkv", "libvpx"),
    ("ts", "libx265"),
]
OPTIONS = {"libx265": {"x265-params": "log-level=none:pools=1"}}
WriteFile = Callable[[Path, int], object]
"""Writes a video of `coloured` frames with this number."""


def coloured(number: int, count: int = 6) -> list[np.ndarray]:
    """Frames whose colour encodes a number below 512. The number survives any codec."""
    colour = [30 + 28 * (number // 8**digit % 8) for digit in range(3)]
    return [np.full((48, 64, 3), colour, np.uint8)] * count


def number_of(pixels_THWC: np.ndarray) -> int:
    """Decode the number from `coloured` frames."""
    colour = pixels_THWC.mean(axis=(0, 1, 2))
    assert np.abs(pixels_THWC - colour).max() < 14
    return sum(round((level - 30) / 28) * 8**digit for digit, level in enumerate(colour))


def read_or_reason(path: Path) -> np.ndarray | str:
    """Return all frames, or the reason why the file is refused. Any error other than DamagedVideo fails the test."""
    try:
        return read_frames(path, 48, range).pixels_THWC
    except DamagedVideo as damage:
        reason = str(damage)
        assert reason.strip()
        assert len(reason.splitlines()) == 1
        return reason


def decoded_leniently(path: Path) -> list[bytes]:
    """Return the frames that a player would show, in spite of damage."""
    with av.open(str(path)) as container:
        frames = []
        for packet in container.demux(video=0):
            try:
                frames += [frame.to_ndarray(format="rgb24").tobytes() for frame in packet.decode()]
            except av.error.FFmpegError:
                frames.append(b"error")
        return frames


def kinds_of_files() -> tuple[dict[str, WriteFile], dict[str, WriteFile]]:
    """Return writers of damaged files and of unusual but valid files, by file name."""

    def video(path: Path, number: int) -> bytearray:
        return bytearray(make_video(path, coloured(number), codec="libx264").read_bytes())

    def truncated(path: Path, number: int) -> None:
        content = video(path, number)
        path.write_bytes(content[: len(content) // 2])

    def without_index(path: Path, number: int) -> None:
        content = video(path, number)
        path.write_bytes(content[: content.index(b"moov") - 4])

    def rotated(path: Path, number: int) -> None:
        content = video(path, number)
        matrix = content.index(b"tkhd") + 44
        turn = (0, 1 << 16, 0, -1 << 16, 0, 0, 0, 0, 1 << 30)
        content[matrix : matrix + 36] = b"".join(n.to_bytes(4, "big", signed=True) for n in turn)
        path.write_bytes(content)

    def header_of_8k(path: Path, number: int) -> None:
        content = video(path, number)
        track, sample = content.index(b"tkhd") + 80, content.index(b"avc1", content.index(b"stsd")) + 28
        content[track : track + 8] = (7680 << 16).to_bytes(4, "big") + (4320 << 16).to_bytes(4, "big")
        content[sample : sample + 4] = (7680).to_bytes(2, "big") + (4320).to_bytes(2, "big")
        path.write_bytes(content)

    def odd_pixels(path: Path, number: int) -> None:
        with av.open(str(path), "w") as container:
            stream = container.add_stream("ffv1", rate=10)
            stream.height, stream.width, stream.pix_fmt = 48, 64, "yuv440p12le"
            for time, pixels in enumerate(coloured(number)):
                frame = av.VideoFrame.from_ndarray(pixels, format="rgb24").reformat(format="yuv440p12le")
                frame.pts, frame.time_base = time, Fraction(1, 10)
                container.mux(stream.encode(frame))
            container.mux(stream.encode(None))

    def with_pauses(codec: str) -> WriteFile:
        times = [0, 1, 2, 30, 40, 41]
        return lambda path, number: make_video(path, coloured(number), codec=codec, times=times)

    damaged: dict[str, WriteFile] = {
        "empty.mp4": lambda path, number: path.touch(),
        "page.mp4": lambda path, number: path.write_text("<!DOCTYPE html><html><body>404</body></html>" * 20),
        "truncated.mp4": lambda path, number: path.write_bytes(video(path, number)[:-400]),
        "truncated.mkv": truncated,
        "without moov.mp4": without_index,
        "sound.mp4": lambda path, number: write_silence(path),
    }
    unusual: dict[str, WriteFile] = {
        "one frame.mp4": lambda path, number: make_video(path, coloured(number, 1)),
        "wrong name.mp4": lambda path, number: make_video(path.with_suffix(".avi"), coloured(number)).rename(path),
        "rotated.mp4": rotated,
        "header of 8k.mp4": header_of_8k,
        "odd pixels.mkv": odd_pixels,
    }
    unusual |= {f"pauses.{suffix}": with_pauses(codec) for suffix, codec in GOOD}
    return damaged, unusual


def with_noise(content: bytes, draw: random.Random) -> bytes:
    """Return the content with 200 random bytes at a random place in its middle."""
    at = draw.randrange(len(content) // 5, len(content) * 4 // 5 - 200)
    return content[:at] + draw.randbytes(200) + content[at + 200 :]


def overwritten(folder: Path, trials: int) -> list[Path]:
    """Write videos with noise; return those whose decoded frames changed."""
    draw = random.Random(8)
    paths = []
    for trial in range(trials):
        suffix, codec = OVERWRITTEN[trial % len(OVERWRITTEN)]
        path = folder / f"overwritten {trial}.{suffix}"
        make_video(path, moving_blocks(trial), codec=codec, **OPTIONS.get(codec, {}))
        frames = decoded_leniently(path)
        path.write_bytes(with_noise(path.read_bytes(), draw))
        if decoded_leniently(path) != frames:
            paths.append(path)
    return paths


@pytest.mark.parametrize(("good", "trials"), [(50, 10), pytest.param(500, 60, marks=pytest.mark.soak)])
def test_damaged_files_are_refused_and_all_others_read_correctly(tmp_path: Path, good: int, trials: int) -> None:
    numbers: dict[Path, int] = {}
    damaged, unusual = kinds_of_files()
    for number in range(good):
        suffix, codec = GOOD[number % len(GOOD)]
        numbers[make_video(tmp_path / f"{number}.{suffix}", coloured(number), codec=codec)] = number
    for number, (name, write) in enumerate(unusual.items(), 512 - len(unusual)):
        write(tmp_path / name, number)
        numbers[tmp_path / name] = number
    for name, write in damaged.items():
        write(tmp_path / name, 7)
    noisy = overwritten(tmp_path, trials)

    outcomes: dict[Path, int | str] = {}
    for path in sorted(tmp_path.iterdir()):
        frames = read_or_reason(path)
        outcomes[path] = frames if isinstance(frames, str) else len(frames)
        if path in numbers and not isinstance(frames, str):
            outcomes[path] = number_of(frames)

    assert {path: outcomes[path] for path in numbers} == numbers
    assert [name for name in damaged if not isinstance(outcomes[tmp_path / name], str)] == []
    missed = [path.name for path in noisy if not isinstance(outcomes[path], str)]
    assert len(noisy) > 0.8 * trials
    assert len(missed) <= 0.05 * len(noisy), missed


@pytest.mark.parametrize(("suffix", "codec"), [*OVERWRITTEN, ("mkv", "mpeg4"), ("mov", "libx264")])
def test_overwritten_bytes_are_found(tmp_path: Path, suffix: str, codec: str) -> None:
    path = make_video(tmp_path / f"a.{suffix}", moving_blocks(1), codec=codec, **OPTIONS.get(codec, {}))
    frames, content, draw = decoded_leniently(path), path.read_bytes(), random.Random(0)
    refusals = []  # one value for each trial that is refused or changes the decoded frames
    for _ in range(40):
        path.write_bytes(with_noise(content, draw))
        refused = isinstance(read_or_reason(path), str)
        if refused or decoded_leniently(path) != frames:
            refusals.append(refused)
    assert len(refusals) > 30
    assert sum(refusals) >= 0.95 * len(refusals)


@pytest.mark.parametrize(
    "options",
    [
        "cabac=0",
        "cabac=0:slices=3",
        "slice-max-size=200",
        "bframes=8:ref=16:b-pyramid=strict",
        "tff=1",
        "intra-refresh=1",
        "qp=0",
        "repeat-headers=1:keyint=8",
        "nal-hrd=cbr:vbv-maxrate=900:vbv-bufsize=900:bitrate=900:filler=1",
    ],
)
@pytest.mark.parametrize("suffix", ["mp4", "ts"])
def test_h264_with_unusual_options_is_not_damage(tmp_path: Path, suffix: str, options: str) -> None:
    path = make_video(tmp_path / f"a.{suffix}", moving_blocks(0), codec="libx264", **{"x264-params": options})
    assert len(read_or_reason(path)) == 24


def test_concatenated_transport_streams_are_not_damage(tmp_path: Path) -> None:
    part = make_video(tmp_path / "part.ts", moving_blocks(0), codec="libx264").read_bytes()
    path = tmp_path / "a.ts"
    path.write_bytes(part + part)
    assert len(read_or_reason(path)) == 48


@pytest.mark.parametrize("suffix", ["avi", "mkv", "mp4"])
def test_clock_faster_than_the_frame_rate_is_not_damage(tmp_path: Path, suffix: str) -> None:
    path = make_video(tmp_path / f"a.{suffix}", moving_blocks(0), rate=600, times=range(0, 24 * 40, 40))
    assert len(read_or_reason(path)) == 24


def test_damaged_structure_of_a_container_raises_damaged_video_only(tmp_path: Path) -> None:
    draw = random.Random(2)
    for suffix, codec in (("mkv", "libx264"), ("avi", "mpeg4"), ("ts", "libx264"), ("mp4", "libx264")):
        path = make_video(tmp_path / f"a.{suffix}", coloured(0), codec=codec)
        content = path.read_bytes()
        for _ in range(60):
            changed = bytearray(content)
            for at in draw.sample(range(len(content)), 5):
                changed[at] = draw.choice([0, 1, 255, draw.randrange(256)])
            path.write_bytes(changed[: draw.choice([len(changed), draw.randrange(1, len(changed))])])
            read_or_reason(path)
