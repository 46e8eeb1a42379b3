"""A destroyed start is damage; a start or a join that lacks pictures, because it was cut without decoding, is none."""

from contextlib import suppress
from pathlib import Path

import av
import numpy as np
import pytest

from data.decoding import DamagedVideo, read_frames
from tests.helpers.stream_copies import RATE, cut, encode, packets_of, shown_frames
from tests.helpers.videos import make_video, moving_blocks

AV1 = {"g": "6", "preset": "12", "svtav1-params": "lp=1"}
STARTS = [
    ("mp4", "libx264", {"g": "6"}),
    ("flv", "libx264", {"g": "6"}),
    ("mp4", "libx264", {"x264-params": "keyint=12:min-keyint=6:scenecut=0:bframes=8:b-adapt=0:open-gop=1"}),
    ("ts", "libx264", {"g": "6"}),
    ("mpg", "mpeg2video", {"g": "6", "bf": "2"}),
    ("ts", "mpeg2video", {"g": "6", "bf": "2"}),
    ("mpg", "mpeg1video", {"g": "6"}),
    ("mp4", "libvpx-vp9", {"g": "6", "cpu-used": "8"}),
    ("mp4", "libsvtav1", AV1),
]


def count(path: Path) -> int:
    return read_frames(path, 32, lambda _: [0]).total


def start_of(path: Path) -> tuple[bytes, int]:
    """Return the content of a file and the position of its first picture."""
    content = path.read_bytes()
    at = content.find(packets_of(path)[0][:60])
    assert at > 0
    return content, at


@pytest.mark.parametrize(("suffix", "codec", "options"), STARTS)
def test_first_pictures_overwritten_with_zeros_are_damage(
    tmp_path: Path, suffix: str, codec: str, options: dict[str, str]
) -> None:
    path = make_video(tmp_path / f"a.{suffix}", moving_blocks(0, 30), codec=codec, rate=25, **options)
    assert count(path) == 30
    content, at = start_of(path)
    for share in (0.1, 0.3, 0.5, 0.7):
        end = at + int(share * len(content))
        path.write_bytes(content[:at] + bytes(end - at) + content[end:])
        with pytest.raises(DamagedVideo):
            count(path)


@pytest.mark.parametrize(("suffix", "codec", "options"), [s for s in STARTS if s[0] != "ts"])
def test_overwritten_head_of_the_first_picture_loses_no_frames_silently(
    tmp_path: Path, suffix: str, codec: str, options: dict[str, str]
) -> None:
    path = make_video(tmp_path / f"a.{suffix}", moving_blocks(0, 30), codec=codec, rate=25, **options)
    content, at = start_of(path)
    for length in (8, 200):
        path.write_bytes(content[:at] + b"\x5a" * length + content[at + length :])
        try:
            assert count(path) == 30
        except DamagedVideo:
            continue


def test_random_first_picture_is_damage(tmp_path: Path) -> None:
    path = make_video(tmp_path / "a.mp4", moving_blocks(0, 30), codec="libx264", g="6")
    content, at = start_of(path)
    length = len(packets_of(path)[0])
    noise = np.random.default_rng(0).integers(0, 256, length, dtype=np.uint8).tobytes()
    path.write_bytes(content[:at] + noise + content[at + length :])
    with pytest.raises(DamagedVideo, match="frame 0"):
        count(path)


def joined(target: Path, *parts: Path) -> Path:
    """Copy the packets of videos behind one another, as `ffmpeg -f concat -c copy` does."""
    with av.open(str(target), "w") as new, av.open(str(parts[0])) as first:
        stream = new.add_stream_from_template(first.streams.video[0], opaque=True)
        offset = 0
        for part in parts:
            with av.open(str(part)) as old:
                packets = [packet for packet in old.demux(video=0) if packet.size]
                start, base = packets[0].dts, packets[0].time_base
                assert start is not None
                assert base is not None
                for packet in packets:
                    assert packet.dts is not None
                    assert packet.pts is not None
                    packet.dts += offset - start
                    packet.pts += offset - start
                    packet.stream = stream
                    new.mux(packet)
                offset += len(packets) * round(1 / (RATE * base))
    return target


@pytest.mark.parametrize("kind", ["h264 open gop", "hevc open gop"])
@pytest.mark.parametrize("suffix", ["ts", "mpg", "mp4", "mov", "mkv"])
def test_joined_copies_of_open_groups_are_read_as_players_show_them(tmp_path: Path, kind: str, suffix: str) -> None:
    source = "mp4" if suffix == "mkv" else suffix
    whole = encode(tmp_path / f"whole.{source}", kind)
    part = cut(whole, tmp_path / f"cut.{source}", 0.7)
    for number, parts in enumerate(((whole, part), (part, part))):
        path = tmp_path / f"{number}.{suffix}"
        if suffix in ("ts", "mpg"):
            path.write_bytes(b"".join(p.read_bytes() for p in parts))
        elif suffix == "mkv":
            cut(joined(tmp_path / f"{number}.mp4", *parts), path, 0)
        else:
            joined(path, *parts)
        expected = shown_frames(path)
        pixels = read_frames(path, 96, range).pixels_THWC
        assert np.array_equal(pixels, expected)


def test_damage_behind_a_join_is_found(tmp_path: Path) -> None:
    whole = encode(tmp_path / "whole.mp4", "h264 open gop")
    path = joined(tmp_path / "a.mp4", whole, cut(whole, tmp_path / "cut.mp4", 0.7))
    content, packets = path.read_bytes(), packets_of(path)
    assert count(path) > 50
    for packet in (packets[10], packets[60], packets[88]):
        at = content.rindex(packet) + 4
        path.write_bytes(content[:at] + b"\x5a" * 100 + content[at + 100 :])
        with pytest.raises(DamagedVideo):
            count(path)


RECORDED = [
    ("h264", "ts"),
    ("h264 open gop", "ts"),
    ("hevc open gop", "ts"),
    ("mpeg4", "ts"),
    ("h264", "mpg"),
    ("hevc", "mpg"),
    ("mpeg1", "mpg"),
]


@pytest.mark.parametrize(("kind", "suffix"), RECORDED)
def test_recordings_that_begin_anywhere_are_read(tmp_path: Path, kind: str, suffix: str) -> None:
    path = encode(tmp_path / f"a.{suffix}", kind)
    content, unit = path.read_bytes(), {"ts": 188, "mpg": 2048}[suffix]
    for share in (0.1, 0.3, 0.45, 0.6):
        path.write_bytes(content[int(share * len(content)) // unit * unit :])
        expected = 0
        with suppress(IndexError, av.error.FFmpegError):
            expected = len(shown_frames(path))
        # FFmpeg finds no video in some files, because no key picture follows soon.
        if expected:
            assert count(path) == expected


@pytest.mark.parametrize(("kind", "suffix"), [("h264", "mp4"), ("mpeg2", "mkv"), ("vp9", "webm"), ("vp8", "asf")])
def test_copies_that_begin_between_key_pictures_are_read(tmp_path: Path, kind: str, suffix: str) -> None:
    whole = encode(tmp_path / f"whole.{suffix}", kind)
    path = tmp_path / f"a.{suffix}"
    with av.open(str(whole)) as old, av.open(str(path), "w") as new:
        stream = new.add_stream_from_template(old.streams.video[0])
        for number, packet in enumerate(packet for packet in old.demux(video=0) if packet.size):
            packet.dts = number if packet.dts is None else packet.dts
            if number >= 5:
                packet.stream = stream
                new.mux(packet)
    assert count(path) == len(shown_frames(path)) > 30
