"""Twelve kinds of odd and damaged files among good ones: the damaged are named, the others read, each as itself."""

import random
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from data.decoding import DamagedVideo, read_frames
from tests.helpers.videos import MakeVideo

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
    ("mkv", "libvpx"),  # VP8 and HEVC elsewhere: a decoder alone finds about 10 and 40 %
    ("ts", "libx265"),
]
OPTIONS = {"libx265": {"x265-params": "log-level=none:pools=1"}}
Make = Callable[[Path, int], object]


def coloured(number: int, count: int = 6) -> list[np.ndarray]:
    """Frames in a colour that tells the number, below 512, through any codec."""
    colour = [30 + 28 * (number // 8**digit % 8) for digit in range(3)]
    return [np.full((48, 64, 3), colour, np.uint8)] * count


def number_of(pixels_THWC: np.ndarray) -> int:
    colour = pixels_THWC.mean(axis=(0, 1, 2))
    assert np.abs(pixels_THWC - colour).max() < 14
    return sum(round((level - 30) / 28) * 8**digit for digit, level in enumerate(colour))


def busy(seed: int, count: int = 24) -> list[np.ndarray]:
    """A picture of blocks that moves, so that every frame takes many bytes."""
    blocks = np.random.default_rng(seed).integers(0, 255, (20, 24, 3), dtype=np.uint8).repeat(8, 0).repeat(8, 1)
    return [np.ascontiguousarray(blocks[i : i + 96, 2 * i : 2 * i + 128]) for i in range(count)]


def read_or_reason(path: Path) -> np.ndarray | str:
    """All frames, or why the file is refused; anything but DamagedVideo fails the test."""
    try:
        return read_frames(path, 48, range).pixels_THWC
    except DamagedVideo as damage:
        reason = str(damage)
        assert reason.strip()
        assert len(reason.splitlines()) == 1
        return reason


def played(path: Path) -> list[bytes]:
    """What a player shows, damage or not."""
    with av.open(str(path)) as container:
        shown = []
        for packet in container.demux(video=0):
            try:
                shown += [frame.to_ndarray(format="rgb24").tobytes() for frame in packet.decode()]
            except av.error.FFmpegError:
                shown.append(b"error")
        return shown


def kinds(make_video: MakeVideo) -> tuple[dict[str, Make], dict[str, Make]]:
    """Kinds of files that hold no video to use, and of odd ones that do."""

    def video(path: Path, number: int) -> bytearray:
        return bytearray(make_video(path, coloured(number), codec="libx264").read_bytes())

    def audio_only(path: Path, number: int) -> None:
        with av.open(str(path), "w") as container:
            stream = container.add_stream("aac", rate=16000)
            sound = av.AudioFrame.from_ndarray(np.zeros((1, 16000), np.float32), format="fltp", layout="mono")
            sound.sample_rate, sound.pts = 16000, 0
            for packet in [*stream.encode(sound), *stream.encode(None)]:
                container.mux(packet)

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

    def with_pauses(codec: str) -> Make:
        times = [0, 1, 2, 30, 40, 41]
        return lambda path, number: make_video(path, coloured(number), codec=codec, times=times)

    damaged: dict[str, Make] = {
        "empty.mp4": lambda path, number: path.touch(),
        "page.mp4": lambda path, number: path.write_text("<!DOCTYPE html><html><body>404</body></html>" * 20),
        "truncated.mp4": lambda path, number: path.write_bytes(video(path, number)[:-400]),
        "truncated.mkv": lambda path, number: path.write_bytes((content := video(path, number))[: len(content) // 2]),
        "without moov.mp4": lambda path, number: path.write_bytes(
            (content := video(path, number))[: content.index(b"moov") - 4]
        ),
        "sound.mp4": audio_only,
    }
    odd: dict[str, Make] = {
        "one frame.mp4": lambda path, number: make_video(path, coloured(number, 1)),
        "wrong name.mp4": lambda path, number: make_video(path.with_suffix(".avi"), coloured(number)).rename(path),
        "rotated.mp4": rotated,
        "header of 8k.mp4": header_of_8k,
        "odd pixels.mkv": odd_pixels,
    }
    odd |= {f"pauses.{suffix}": with_pauses(codec) for suffix, codec in GOOD}
    return damaged, odd


def with_noise(content: bytes, draw: random.Random) -> bytes:
    at = draw.randrange(len(content) // 5, len(content) * 4 // 5 - 200)
    return content[:at] + draw.randbytes(200) + content[at + 200 :]


def overwritten(folder: Path, make_video: MakeVideo, trials: int) -> list[Path]:
    """Videos with 200 random bytes in their middle that a player shows."""
    draw = random.Random(8)
    made = []
    for trial in range(trials):
        suffix, codec = OVERWRITTEN[trial % len(OVERWRITTEN)]
        path = folder / f"overwritten {trial}.{suffix}"
        make_video(path, busy(trial), codec=codec, **OPTIONS.get(codec, {}))
        shown = played(path)
        path.write_bytes(with_noise(path.read_bytes(), draw))
        if played(path) != shown:
            made.append(path)
    return made


@pytest.mark.parametrize(("good", "trials"), [(50, 10), pytest.param(500, 60, marks=pytest.mark.soak)])
def test_each_damaged_file_is_named_and_each_other_read_as_itself(
    tmp_path: Path, make_video: MakeVideo, good: int, trials: int
) -> None:
    numbers: dict[Path, int] = {}
    damaged, odd = kinds(make_video)
    for number in range(good):
        suffix, codec = GOOD[number % len(GOOD)]
        numbers[make_video(tmp_path / f"{number}.{suffix}", coloured(number), codec=codec)] = number
    for number, (name, make) in enumerate(odd.items(), 512 - len(odd)):
        make(tmp_path / name, number)
        numbers[tmp_path / name] = number
    for name, make in damaged.items():
        make(tmp_path / name, 7)
    spoilt = overwritten(tmp_path, make_video, trials)

    read = {path: read_or_reason(path) for path in sorted(tmp_path.iterdir())}

    outcome = {path: got if isinstance(got := read[path], str) else number_of(got) for path in numbers}
    assert outcome == numbers
    assert [name for name in damaged if not isinstance(read[tmp_path / name], str)] == []
    missed = [path.name for path in spoilt if not isinstance(read[path], str)]
    assert len(spoilt) > 0.8 * trials
    assert len(missed) <= 0.05 * len(spoilt), missed


@pytest.mark.parametrize(("suffix", "codec"), [*OVERWRITTEN, ("mkv", "mpeg4"), ("mov", "libx264")])
def test_overwritten_bytes_are_found(tmp_path: Path, make_video: MakeVideo, suffix: str, codec: str) -> None:
    path = make_video(tmp_path / f"a.{suffix}", busy(1), codec=codec, **OPTIONS.get(codec, {}))
    shown, content, draw = played(path), path.read_bytes(), random.Random(0)
    found = []
    for _ in range(40):
        path.write_bytes(with_noise(content, draw))
        refused = isinstance(read_or_reason(path), str)
        if refused or played(path) != shown:
            found.append(refused)
    assert len(found) > 30
    assert sum(found) >= 0.95 * len(found)


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
def test_good_h264_of_any_kind_is_no_damage(tmp_path: Path, make_video: MakeVideo, suffix: str, options: str) -> None:
    path = make_video(tmp_path / f"a.{suffix}", busy(0), codec="libx264", **{"x264-params": options})
    assert len(read_or_reason(path)) == 24


def test_joined_transport_streams_are_no_damage(tmp_path: Path, make_video: MakeVideo) -> None:
    part = make_video(tmp_path / "part.ts", busy(0), codec="libx264").read_bytes()
    path = tmp_path / "a.ts"
    path.write_bytes(part + part)
    assert len(read_or_reason(path)) == 48


@pytest.mark.parametrize("suffix", ["avi", "mkv", "mp4"])
def test_a_clock_faster_than_the_frames_is_no_damage(tmp_path: Path, make_video: MakeVideo, suffix: str) -> None:
    path = make_video(tmp_path / f"a.{suffix}", busy(0), rate=600, times=range(0, 24 * 40, 40))
    assert len(read_or_reason(path)) == 24


def test_damaged_bookkeeping_of_a_container_raises_nothing_else(tmp_path: Path, make_video: MakeVideo) -> None:
    draw = random.Random(2)
    for suffix, codec in (("mkv", "libx264"), ("avi", "mpeg4"), ("ts", "libx264"), ("mp4", "libx264")):
        path = make_video(tmp_path / f"a.{suffix}", coloured(0), codec=codec)
        content = path.read_bytes()
        for _ in range(60):
            spoilt = bytearray(content)
            for at in draw.sample(range(len(content)), 5):
                spoilt[at] = draw.choice([0, 1, 255, draw.randrange(256)])
            path.write_bytes(spoilt[: draw.choice([len(spoilt), draw.randrange(1, len(spoilt))])])
            read_or_reason(path)
