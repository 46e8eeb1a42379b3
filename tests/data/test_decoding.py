"""Decoding: the frames that were asked for, upright and in proportion; damage is one kind of error with one line of reason."""

import os
import random
from collections.abc import Callable, Sequence
from pathlib import Path

import av
import numpy as np
import pytest

from data.decoding import DamagedVideo, Frames, read_frames
from tests.helpers.videos import MakeVideo

COUNT = 24
CONTAINERS = [("mp4", "libx264"), ("mkv", "mpeg4"), ("avi", "mpeg4")]


def numbered(count: int = COUNT, height: int = 48, width: int = 64) -> list[np.ndarray]:
    """Grey frames; the brightness is the number of the frame."""
    return [np.full((height, width, 3), 20 + 8 * i, np.uint8) for i in range(count)]


def numbers_of(frames: Frames) -> list[int]:
    return [round((frame.mean() - 20) / 8) for frame in frames.pixels_THWC]


def busy(count: int = COUNT) -> list[np.ndarray]:
    """A picture of blocks that moves, so that every frame takes many bytes."""
    blocks = np.random.default_rng(0).integers(0, 255, (20, 24, 3), dtype=np.uint8).repeat(8, 0).repeat(8, 1)
    return [np.ascontiguousarray(blocks[i : i + 96, 2 * i : 2 * i + 128]) for i in range(count)]


def read(path: Path, *wanted: int) -> Frames:
    return read_frames(path, 32, lambda total: wanted or range(total))


def reason_of(path: Path) -> str | None:
    """Why the video is refused, None if it is not; anything but DamagedVideo fails the test."""
    try:
        read(path, 0)
    except DamagedVideo as damage:
        reason = str(damage)
        assert reason.strip()
        assert len(reason.splitlines()) == 1
        return reason
    return None


@pytest.fixture(scope="module", params=CONTAINERS, ids=lambda pair: "-".join(pair))
def busy_video(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, make_video: MakeVideo) -> Path:
    suffix, codec = request.param
    return make_video(tmp_path_factory.mktemp("busy") / f"a.{suffix}", busy(), codec=codec)


@pytest.mark.parametrize(("suffix", "codec"), [*CONTAINERS, ("mpg", "mpeg2video"), ("ts", "libx264"), ("mov", "mpeg4")])
@pytest.mark.parametrize("wanted", [(0, 1, 2), (3, 9, 20), (COUNT - 1,)])
def test_chosen_frames_are_the_right_ones(
    tmp_path: Path, make_video: MakeVideo, suffix: str, codec: str, wanted: Sequence[int]
) -> None:
    path = make_video(tmp_path / f"a.{suffix}", numbered(), codec=codec, rate=25)
    frames = read(path, *wanted)
    assert frames.total == COUNT
    assert numbers_of(frames) == list(wanted)


def test_frames_come_in_the_order_of_the_choice_even_repeated(tmp_path: Path, make_video: MakeVideo) -> None:
    assert numbers_of(read(make_video(tmp_path / "a.mp4", numbered()), 7, 2, 2, 11)) == [7, 2, 2, 11]


def test_pixels_are_rgb_bytes(tmp_path: Path, make_video: MakeVideo) -> None:
    frames = [np.full((48, 64, 3), (200, 40, 90), np.uint8)] * 3
    pixels = read(make_video(tmp_path / "a.mp4", frames), 1).pixels_THWC
    assert pixels.dtype == np.uint8
    assert np.abs(pixels.mean(axis=(0, 1, 2)) - (200, 40, 90)).max() < 8


@pytest.mark.parametrize(
    ("size", "short_side", "expected"),
    [
        ((48, 64), 24, (24, 32)),
        ((64, 48), 24, (32, 24)),
        ((48, 48), 24, (24, 24)),
        ((48, 64), 96, (96, 128)),
        ((36, 128), 18, (18, 64)),
    ],
)
def test_short_side_is_resized_and_the_aspect_ratio_kept(
    tmp_path: Path,
    make_video: MakeVideo,
    size: tuple[int, int],
    short_side: int,
    expected: tuple[int, int],
) -> None:
    path = make_video(tmp_path / "a.mp4", numbered(3, *size))
    assert read_frames(path, short_side, lambda _: [0]).pixels_THWC.shape == (1, *expected, 3)


def test_resizing_keeps_what_is_where(tmp_path: Path, make_video: MakeVideo) -> None:
    frame = np.full((48, 64, 3), 30, np.uint8)
    frame[:24, 32:] = 220
    pixels = read_frames(make_video(tmp_path / "a.mp4", [frame] * 3), 24, lambda _: [1]).pixels_THWC[0]
    assert pixels[2:10, 18:30].min() > 200
    assert max(pixels[14:].max(), pixels[:, :14].max()) < 50


def test_a_video_recorded_upright_on_its_side_is_turned(tmp_path: Path, make_video: MakeVideo) -> None:
    frame = np.full((48, 64, 3), 30, np.uint8)
    frame[:20, :28] = 220  # the upper left corner, stored
    path = make_video(tmp_path / "a.mp4", [frame] * 3)
    content = bytearray(path.read_bytes())
    matrix = content.index(b"tkhd") + 44
    identity = b"".join(n.to_bytes(4, "big") for n in (1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30))
    assert content[matrix : matrix + 36] == identity
    clockwise = b"".join(n.to_bytes(4, "big", signed=True) for n in (0, 1 << 16, 0, -1 << 16, 0, 0, 0, 0, 1 << 30))
    content[matrix : matrix + 36] = clockwise
    path.write_bytes(content)
    pixels = read_frames(path, 48, lambda _: [1]).pixels_THWC[0]
    assert pixels.shape == (64, 48, 3)
    assert pixels[2:26, 30:46].min() > 200  # the upper right corner, shown
    assert max(pixels[30:].max(), pixels[:, :26].max()) < 50


@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_video_of_few_frames_is_read(tmp_path: Path, make_video: MakeVideo, count: int) -> None:
    frames = read(make_video(tmp_path / "a.mp4", numbered(count)))
    assert numbers_of(frames) == list(range(count))


def test_the_choice_follows_the_true_number_where_the_declared_one_is_wrong(
    tmp_path: Path, make_video: MakeVideo
) -> None:
    # Matroska declares no number of frames; over a pause, duration times rate is far from it.
    times = [*range(12), *range(40, 52)]
    path = make_video(tmp_path / "a.mkv", numbered(24), times=times)
    asked: list[int] = []

    def last(total: int) -> list[int]:
        asked.append(total)
        return [0, total // 2, total - 1]

    frames = read_frames(path, 32, last)
    assert asked[0] != asked[-1] == frames.total == 24
    assert numbers_of(frames) == [0, 12, 23]


def test_a_declared_number_too_small_loses_no_frames(tmp_path: Path, make_video: MakeVideo) -> None:
    path = make_video(tmp_path / "a.avi", numbered())
    content = bytearray(path.read_bytes())
    length = content.index(b"strh") + 8 + 32
    assert int.from_bytes(content[length : length + 4], "little") == COUNT
    content[length : length + 4] = (10).to_bytes(4, "little")
    path.write_bytes(content)
    frames = read_frames(path, 32, lambda total: [total - 1])
    assert frames.total == COUNT
    assert numbers_of(frames) == [COUNT - 1]


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "avi"])
def test_sound_that_outlasts_the_pictures_is_no_damage(tmp_path: Path, make_video: MakeVideo, suffix: str) -> None:
    path = make_video(tmp_path / f"a.{suffix}", numbered(), audio_seconds=5)
    assert read(path, 0).total == COUNT


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
def test_pictures_that_begin_late_are_no_damage(tmp_path: Path, make_video: MakeVideo, suffix: str) -> None:
    path = make_video(tmp_path / f"a.{suffix}", numbered(), times=range(30, 30 + COUNT))
    assert read(path, 0).total == COUNT


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
def test_a_last_frame_that_is_held_long_is_no_damage(tmp_path: Path, make_video: MakeVideo, suffix: str) -> None:
    path = make_video(
        tmp_path / f"a.{suffix}", numbered(), last_duration=30
    )  # three seconds, as screen recorders write
    assert read(path, 0).total == COUNT


def test_frames_of_several_shapes_are_damage(tmp_path: Path, make_video: MakeVideo) -> None:
    parts = [
        make_video(tmp_path / f"{i}.ts", numbered(10, *size), codec="libx264")
        for i, size in enumerate([(48, 64), (64, 48)])
    ]
    path = tmp_path / "a.ts"
    path.write_bytes(b"".join(part.read_bytes() for part in parts))
    for wanted in ((), (0,)):  # whichever frames are chosen
        with pytest.raises(DamagedVideo):
            read(path, *wanted)


def test_empty_file_is_named_so(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    path.touch()
    with pytest.raises(DamagedVideo, match="^empty file$"):
        read(path)


@pytest.mark.parametrize(
    "text",
    ["<!DOCTYPE html><html>404</html>", "version https://git-lfs.github.com/spec/v1\nsize 4\n", "\0" * 500, "x"],
)
def test_text_named_like_a_video_does_not_open(tmp_path: Path, text: str) -> None:
    path = tmp_path / "a.mp4"
    path.write_text(text)
    assert "does not open as a video" in (reason_of(path) or "")


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "avi", "ts"])
def test_a_playlist_named_like_a_video_opens_no_other_file(tmp_path: Path, make_video: MakeVideo, suffix: str) -> None:
    other = make_video(tmp_path / "other.ts", numbered(), codec="libx264")
    path = tmp_path / f"a.{suffix}"
    lists = [f"ffconcat version 1.0\nfile {other.name}\n", f"#EXTM3U\n#EXTINF:2,\n{other.name}\n#EXT-X-ENDLIST\n"]
    for text in lists:
        path.write_text(text)
        assert reason_of(path)


def test_sound_without_pictures_is_named_so(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=16000)
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 16000), np.float32), format="fltp", layout="mono")
        sound.sample_rate, sound.pts = 16000, 0
        for packet in [*stream.encode(sound), *stream.encode(None)]:
            container.mux(packet)
    assert reason_of(path) == "holds no video stream"


def test_pictures_of_an_unknown_codec_are_damage(tmp_path: Path, make_video: MakeVideo) -> None:
    path = make_video(tmp_path / "a.avi", numbered())
    path.write_bytes(path.read_bytes().replace(b"FMP4", b"Zz9?"))
    assert reason_of(path)


@pytest.mark.parametrize("share", [0.02, 0.2, 0.4, 0.6, 0.75])
def test_a_truncated_file_is_damage(tmp_path: Path, busy_video: Path, share: float) -> None:
    content = busy_video.read_bytes()
    path = tmp_path / busy_video.name
    path.write_bytes(content[: int(share * len(content))])
    assert reason_of(path)


def test_a_file_cut_before_its_last_frames_is_damage_even_with_its_index_in_front(
    tmp_path: Path, make_video: MakeVideo
) -> None:
    whole = make_video(tmp_path / "whole.mp4", busy())
    front = tmp_path / "front.mp4"
    with av.open(str(whole)) as source, av.open(str(front), "w", options={"movflags": "faststart"}) as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.dts is not None:
                packet.stream = stream
                target.mux(packet)
    content = front.read_bytes()
    assert content.index(b"moov") < content.index(b"mdat")
    assert read(front, 0).total == COUNT
    front.write_bytes(content[: int(0.7 * len(content))])
    assert reason_of(front)


def broken_bits(content: bytes, draw: random.Random) -> bytes:
    damaged = bytearray(content)
    ends = [*range(min(1500, len(content))), *range(len(content) - min(1500, len(content)), len(content))]
    for at in draw.sample(ends, 4):
        damaged[at] = draw.randrange(256)
    return bytes(damaged)


def test_damaged_headers_and_indices_raise_nothing_else(tmp_path: Path, busy_video: Path) -> None:
    content = busy_video.read_bytes()
    path = tmp_path / busy_video.name
    draw = random.Random(1)
    reasons = []
    for _ in range(120):
        path.write_bytes(broken_bits(content, draw))
        reasons.append(reason_of(path))
    assert any(reasons)


def test_damage_behind_the_chosen_frames_is_found_too(tmp_path: Path, make_video: MakeVideo) -> None:
    path = make_video(tmp_path / "a.avi", busy())
    content = bytearray(path.read_bytes())
    at = len(content) * 3 // 4
    content[at : at + 400] = random.Random(0).randbytes(400)
    path.write_bytes(content)
    with pytest.raises(DamagedVideo):
        read(path, 0)


@pytest.mark.parametrize(
    "name",
    [
        b"a  b.mp4",
        b"a.b,'\".mp4",
        b"a\nb.mp4",
        b"%03d #1?.mp4",
        b"\xff\xfe.mp4",
        "\U0001f3ac.mp4".encode(),
        b"x" * 251 + b".mp4",
    ],
)
def test_a_video_with_a_hostile_name_opens(tmp_path: Path, make_video: MakeVideo, name: bytes) -> None:
    path = make_video(tmp_path / "plain.mp4", numbered(3))
    path = path.rename(tmp_path / os.fsdecode(name))
    assert numbers_of(read(path)) == [0, 1, 2]


def test_files_are_closed_whether_good_or_damaged(tmp_path: Path, make_video: MakeVideo) -> None:
    descriptors = Path("/proc/self/fd")
    if not descriptors.exists():
        pytest.skip("counts open files by /proc")
    good = make_video(tmp_path / "good.mp4", numbered(3))
    damaged = tmp_path / "damaged.mp4"
    damaged.write_bytes(good.read_bytes()[:-300])
    actions: list[Callable[[], object]] = [lambda: read(good), lambda: reason_of(damaged)]
    before = len(list(descriptors.iterdir()))
    for _ in range(20):
        for action in actions:
            action()
    assert len(list(descriptors.iterdir())) <= before + 1
