"""Codecs in containers, whole and cut without decoding: the number of frames is that of players, and none is refused."""

from pathlib import Path

import av
import pytest

from data.decoding import DamagedVideo, read_frames
from tests.helpers.stream_copies import ENCODERS, cut, encode, shown_frames

SUFFIXES = ("3gp", "asf", "avi", "flv", "m2ts", "m4v", "mkv", "mov", "mp4", "mpg", "ogv", "ts", "webm")
STARTS = (0.1, 0.4, 0.7, 1.1, 1.6)
SAMPLE = [("h264", "flv"), ("hevc", "mov"), ("mpeg4", "avi"), ("vp8", "webm"), ("mjpeg", "mkv"), ("mpeg1", "ts")]


def files(folder: Path, kind: str, suffix: str, starts: tuple[float, ...]) -> list[Path]:
    """Write a whole video and its cuts. Leaves out what FFmpeg does not write, or does not find in what it wrote."""
    try:
        written = [encode(folder / f"whole.{suffix}", kind)]
        shown_frames(written[0])
    except (ValueError, IndexError, av.error.FFmpegError):
        return []
    for start in starts:
        for options in ({}, {"use_editlist": "0"}) if suffix in ("mp4", "mov", "m4v", "3gp") else ({},):
            try:
                path = cut(written[0], folder / f"{start} {len(options)}.{suffix}", start, **options)
                shown_frames(path)
            except (ValueError, IndexError, av.error.FFmpegError):
                continue
            written.append(path)
    return written


def differences(paths: list[Path]) -> dict[str, object]:
    """Return the files whose number of frames differs from that of a player, with both numbers or the reason."""
    found: dict[str, object] = {}
    for path in paths:
        try:
            read: object = read_frames(path, 32, lambda _: [0]).total
        except DamagedVideo as damage:
            read = str(damage)
        expected = len(shown_frames(path))
        # FFmpeg writes some videos that it cannot read, such as FFV1 in a program stream.
        if read != expected and expected:
            found[path.name] = (expected, read)
    return found


@pytest.mark.parametrize(("kind", "suffix"), SAMPLE)
def test_sample_of_good_videos_has_all_frames(tmp_path: Path, kind: str, suffix: str) -> None:
    paths = files(tmp_path, kind, suffix, (0.7,))
    assert len(paths) > 1
    assert differences(paths) == {}


@pytest.mark.soak
@pytest.mark.parametrize("kind", ENCODERS)
def test_good_videos_have_all_frames(tmp_path: Path, kind: str) -> None:
    made = 0
    for suffix in SUFFIXES:
        folder = tmp_path / suffix
        folder.mkdir()
        paths = files(folder, kind, suffix, STARTS)
        made += len(paths)
        assert differences(paths) == {}, suffix
    assert made >= 6
