"""Decoding returns the chosen frames, upright and in proportion. Any damage raises DamagedVideo with a one-line reason."""

import errno
import os
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import BinaryIO

import av
import numpy as np
import pytest

from data.decoding import DamagedVideo, Frames, read_frames
from tests.helpers.hostile_names import HOSTILE_NAMES
from tests.helpers.stream_copies import packets_of
from tests.helpers.videos import frame_numbers, make_video, moving_blocks, numbered_frames, write_silence

COUNT = 24
CONTAINERS = [("mp4", "libx264"), ("mkv", "mpeg4"), ("avi", "mpeg4")]


def read(path: Path, *numbers: int) -> Frames:
    """Read the frames of these numbers, or all frames."""
    return read_frames(path, 32, lambda total: numbers or range(total))


def numbers_of(frames: Frames) -> list[int]:
    return frame_numbers(frames.pixels_THWC)


def reason_of(path: Path) -> str | None:
    """Return the reason why the video is refused, or None if it is read. Any error other than DamagedVideo fails the test."""
    try:
        read(path, 0)
    except DamagedVideo as damage:
        reason = str(damage)
        assert reason.strip()
        assert len(reason.splitlines()) == 1
        return reason
    return None


@pytest.fixture(scope="module", params=CONTAINERS, ids=lambda pair: "-".join(pair))
def large_video(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Video whose frames take many bytes."""
    suffix, codec = request.param
    return make_video(tmp_path_factory.mktemp("large") / f"a.{suffix}", moving_blocks(), codec=codec)


@pytest.mark.parametrize(("suffix", "codec"), [*CONTAINERS, ("mpg", "mpeg2video"), ("ts", "libx264"), ("mov", "mpeg4")])
@pytest.mark.parametrize("numbers", [(0, 1, 2), (3, 9, 20), (COUNT - 1,)])
def test_chosen_frames_are_read(tmp_path: Path, suffix: str, codec: str, numbers: Sequence[int]) -> None:
    path = make_video(tmp_path / f"a.{suffix}", numbered_frames(COUNT), codec=codec, rate=25)
    frames = read(path, *numbers)
    assert frames.total == COUNT
    assert numbers_of(frames) == list(numbers)


def test_frames_have_the_order_of_the_choice_and_may_repeat(tmp_path: Path) -> None:
    assert numbers_of(read(make_video(tmp_path / "a.mp4", numbered_frames(COUNT)), 7, 2, 2, 11)) == [7, 2, 2, 11]


def test_pixels_are_rgb_uint8(tmp_path: Path) -> None:
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
    tmp_path: Path, size: tuple[int, int], short_side: int, expected: tuple[int, int]
) -> None:
    path = make_video(tmp_path / "a.mp4", numbered_frames(3, *size))
    assert read_frames(path, short_side, lambda _: [0]).pixels_THWC.shape == (1, *expected, 3)


def test_resizing_keeps_positions(tmp_path: Path) -> None:
    frame = np.full((48, 64, 3), 30, np.uint8)
    frame[:24, 32:] = 220
    pixels = read_frames(make_video(tmp_path / "a.mp4", [frame] * 3), 24, lambda _: [1]).pixels_THWC[0]
    assert pixels[2:10, 18:30].min() > 200
    assert max(pixels[14:].max(), pixels[:, :14].max()) < 50


def test_video_with_a_rotation_matrix_is_turned_upright(tmp_path: Path) -> None:
    frame = np.full((48, 64, 3), 30, np.uint8)
    frame[:20, :28] = 220  # the upper left corner of the stored frame
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
    assert pixels[2:26, 30:46].min() > 200  # the upper right corner of the displayed frame
    assert max(pixels[30:].max(), pixels[:, :26].max()) < 50


@pytest.mark.parametrize("count", [1, 2, 3])
def test_video_of_few_frames_is_read(tmp_path: Path, count: int) -> None:
    frames = read(make_video(tmp_path / "a.mp4", numbered_frames(count)))
    assert numbers_of(frames) == list(range(count))


def test_choice_uses_the_true_number_of_frames_if_the_declared_one_is_wrong(tmp_path: Path) -> None:
    # Matroska declares no number of frames. With a pause, duration times rate is far from the true number.
    times = [*range(12), *range(40, 52)]
    path = make_video(tmp_path / "a.mkv", numbered_frames(24), times=times)
    totals: list[int] = []

    def first_middle_last(total: int) -> list[int]:
        totals.append(total)
        return [0, total // 2, total - 1]

    frames = read_frames(path, 32, first_middle_last)
    assert totals[0] != 24
    assert totals[-1] == frames.total == 24
    assert numbers_of(frames) == [0, 12, 23]


def test_declared_number_of_frames_that_is_too_small_loses_no_frames(tmp_path: Path) -> None:
    path = make_video(tmp_path / "a.avi", numbered_frames(COUNT))
    content = bytearray(path.read_bytes())
    length = content.index(b"strh") + 8 + 32
    assert int.from_bytes(content[length : length + 4], "little") == COUNT
    content[length : length + 4] = (10).to_bytes(4, "little")
    path.write_bytes(content)
    frames = read_frames(path, 32, lambda total: [total - 1])
    assert frames.total == COUNT
    assert numbers_of(frames) == [COUNT - 1]


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "avi"])
def test_sound_longer_than_the_video_stream_is_not_damage(tmp_path: Path, suffix: str) -> None:
    path = make_video(tmp_path / f"a.{suffix}", numbered_frames(COUNT), audio_seconds=5)
    assert read(path, 0).total == COUNT


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
def test_video_stream_that_begins_late_is_not_damage(tmp_path: Path, suffix: str) -> None:
    path = make_video(tmp_path / f"a.{suffix}", numbered_frames(COUNT), times=range(30, 30 + COUNT))
    assert read(path, 0).total == COUNT


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
def test_long_duration_of_the_last_frame_is_not_damage(tmp_path: Path, suffix: str) -> None:
    # Screen recorders write such durations, here three seconds.
    path = make_video(tmp_path / f"a.{suffix}", numbered_frames(COUNT), last_duration=30)
    assert read(path, 0).total == COUNT


def test_frames_of_several_shapes_are_damage(tmp_path: Path) -> None:
    parts = [
        make_video(tmp_path / f"{i}.ts", numbered_frames(10, *size), codec="libx264")
        for i, size in enumerate([(48, 64), (64, 48)])
    ]
    path = tmp_path / "a.ts"
    path.write_bytes(b"".join(part.read_bytes() for part in parts))
    for numbers in ((), (0,)):
        with pytest.raises(DamagedVideo):
            read(path, *numbers)


def test_empty_file_is_damage(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    path.touch()
    assert reason_of(path) == "empty file"


@pytest.mark.parametrize(
    "text",
    ["<!DOCTYPE html><html>404</html>", "version https://git-lfs.github.com/spec/v1\nsize 4\n", "\0" * 500, "x"],
)
def test_text_with_the_name_of_a_video_is_damage(tmp_path: Path, text: str) -> None:
    path = tmp_path / "a.mp4"
    path.write_text(text)
    assert "open" in (reason_of(path) or "")


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "avi", "ts"])
def test_playlist_with_the_name_of_a_video_opens_no_other_file(tmp_path: Path, suffix: str) -> None:
    other = make_video(tmp_path / "other.ts", numbered_frames(COUNT), codec="libx264")
    path = tmp_path / f"a.{suffix}"
    playlists = [f"ffconcat version 1.0\nfile {other.name}\n", f"#EXTM3U\n#EXTINF:2,\n{other.name}\n#EXT-X-ENDLIST\n"]
    for text in playlists:
        path.write_text(text)
        assert reason_of(path)


def test_file_without_a_video_stream_is_damage(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    write_silence(path)
    assert "no video stream" in (reason_of(path) or "")


def test_unknown_codec_is_damage(tmp_path: Path) -> None:
    path = make_video(tmp_path / "a.avi", numbered_frames(COUNT))
    path.write_bytes(path.read_bytes().replace(b"FMP4", b"Zz9?"))
    assert reason_of(path)


@pytest.mark.parametrize("share", [0.02, 0.2, 0.4, 0.6, 0.75])
def test_truncated_file_is_damage(tmp_path: Path, large_video: Path, share: float) -> None:
    content = large_video.read_bytes()
    path = tmp_path / large_video.name
    path.write_bytes(content[: int(share * len(content))])
    assert reason_of(path)


def test_truncated_file_with_its_index_at_the_front_is_damage(tmp_path: Path) -> None:
    video = make_video(tmp_path / "index_at_the_end.mp4", moving_blocks())
    front = tmp_path / "index_at_the_front.mp4"
    with av.open(str(video)) as source, av.open(str(front), "w", options={"movflags": "faststart"}) as target:
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


def with_changed_ends(content: bytes, draw: random.Random) -> bytes:
    """Return the content with four random bytes among the first and last 1500, where headers and indices are."""
    damaged = bytearray(content)
    ends = [*range(min(1500, len(content))), *range(len(content) - min(1500, len(content)), len(content))]
    for at in draw.sample(ends, 4):
        damaged[at] = draw.randrange(256)
    return bytes(damaged)


def test_damaged_headers_and_indices_raise_damaged_video_only(tmp_path: Path, large_video: Path) -> None:
    content = large_video.read_bytes()
    path = tmp_path / large_video.name
    draw = random.Random(1)
    reasons = []
    for _ in range(120):
        path.write_bytes(with_changed_ends(content, draw))
        reasons.append(reason_of(path))
    assert any(reasons)


def test_damage_after_the_chosen_frames_is_found(tmp_path: Path) -> None:
    path = make_video(tmp_path / "a.avi", moving_blocks())
    content = bytearray(path.read_bytes())
    at = len(content) * 3 // 4
    content[at : at + 400] = random.Random(0).randbytes(400)
    path.write_bytes(content)
    with pytest.raises(DamagedVideo):
        read(path, 0)


@pytest.mark.parametrize("kind", HOSTILE_NAMES)
def test_video_with_a_hostile_name_opens(tmp_path: Path, kind: str) -> None:
    path = make_video(tmp_path / "plain.mp4", numbered_frames(3))
    path = path.rename(tmp_path / os.fsdecode(HOSTILE_NAMES[kind]))
    assert numbers_of(read(path)) == [0, 1, 2]


def test_good_and_damaged_files_are_closed(tmp_path: Path) -> None:
    descriptors = Path("/proc/self/fd")
    if not descriptors.exists():
        pytest.skip("counts open files by /proc")
    good = make_video(tmp_path / "good.mp4", numbered_frames(3))
    damaged = tmp_path / "damaged.mp4"
    damaged.write_bytes(good.read_bytes()[:-300])
    actions: list[Callable[[], object]] = [lambda: read(good), lambda: reason_of(damaged)]
    before = len(list(descriptors.iterdir()))
    for _ in range(20):
        for action in actions:
            action()
    assert len(list(descriptors.iterdir())) <= before + 1


def test_failing_disk_is_no_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # FFmpeg gives the decoder the part of a packet before an unreadable block, and the decoder finds it damaged.
    path = make_video(tmp_path / "a.mp4", moving_blocks(), codec="libx264")
    content = path.read_bytes()
    at = content.index(packets_of(path)[5])
    path.write_bytes(content[:at] + bytes(200) + content[at + 200 :])
    assert reason_of(path)

    def fail(self: Path, mode: str) -> BinaryIO:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(Path, "open", fail)
    with pytest.raises(OSError, match=r"a\.mp4: cannot be read: Input/output error"):
        read(path, 0)


def test_lack_of_memory_is_no_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good = make_video(tmp_path / "a.mp4", moving_blocks(), codec="libx264")
    damaged = tmp_path / "b.mp4"
    damaged.write_bytes(good.read_bytes()[:-300])
    monkeypatch.setattr("data.decoding._MEMORY", 1 << 60)
    assert read(good, 0).total == COUNT
    with pytest.raises(OSError, match=r"b\.mp4: cannot be read: out of memory"):
        read(damaged, 0)
