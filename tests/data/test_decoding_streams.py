"""Good videos that look damaged are read whole: cut without decoding, padded, joined, with pictures that show nothing.

Legend: T H W C frames, height, width, colours.
"""

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from av.stream import Disposition

from data.decoding import DamagedVideo, read_frames
from tests.helpers.shared_cases import case
from tests.helpers.stream_copies import cut, encode, packets_of, shown_frames, write_packets
from tests.helpers.videos import make_video, moving_blocks, numbered_frames


def count(path: Path) -> int:
    return read_frames(path, 32, lambda _: [0]).total


CUTS = [
    ("h264 open gop", "mp4", "mp4"),
    ("h264 open gop", "mp4", "mkv"),
    ("h264 open gop", "ts", "ts"),
    ("h264 intra refresh", "mp4", "mp4"),
    ("hevc open gop", "mp4", "mp4"),
    ("hevc open gop", "mp4", "mkv"),
    ("mpeg2", "mpg", "mpg"),
]


@pytest.mark.parametrize(("kind", "source", "target"), CUTS)
def test_video_cut_without_decoding_is_read_as_players_show_it(
    tmp_path: Path, kind: str, source: str, target: str
) -> None:
    whole = encode(tmp_path / f"whole.{source}", kind)
    # Without an edit list, an MP4 file names its leading pictures as ordinary ones.
    options = {"use_editlist": "0"} if target == "mp4" else {}
    path = cut(whole, tmp_path / f"cut.{target}", 1.1, **options)
    expected = shown_frames(path)
    assert 10 < len(expected) < len(shown_frames(whole))
    pixels = read_frames(path, 96, range).pixels_THWC
    assert np.array_equal(pixels, expected)


def test_transport_stream_that_begins_between_key_frames_is_read(tmp_path: Path) -> None:
    content = encode(tmp_path / "a.ts", "mpeg2").read_bytes()
    path = tmp_path / "recorded.ts"
    path.write_bytes(content[len(content) // 3 // 188 * 188 :])
    expected = len(shown_frames(path))
    assert 20 < expected < 40
    assert count(path) == expected


def test_error_in_the_first_key_frame_is_damage(tmp_path: Path) -> None:
    path = encode(tmp_path / "a.mp4", "h264")
    first = packets_of(path)[0]
    content = path.read_bytes()
    path.write_bytes(content.replace(first, first[:800] + bytes(range(1, 201)) + first[1000:]))
    with pytest.raises(DamagedVideo):
        count(path)


@pytest.mark.parametrize("suffix", ["mp4", "mov", "avi"])
def test_pictures_that_repeat_the_last_one_are_not_missing(tmp_path: Path, suffix: str) -> None:
    # MPEG-4 (ISO/IEC 14496-2, 6.2.5) marks them as not coded: a predicted picture whose vop_coded bit is 0.
    source = make_video(tmp_path / "coded.mp4", moving_blocks(0, 12), rate=16)
    packets = [(data, number == 0) for number, data in enumerate(packets_of(source))]
    not_coded = b"\0\0\1\xb6" + bytes([0b0101_0000, 0b1001_1111]), False
    path = write_packets(tmp_path / f"a.{suffix}", source, [part for packet in packets for part in (packet, not_coded)])
    assert len(packets_of(path)) == 24
    assert 12 <= count(path) == len(shown_frames(path)) < 20


@pytest.mark.parametrize("padding", [1000, 66_000, 300_000])
@pytest.mark.parametrize("filler", [b"\x00", b"\xff"])
def test_padding_after_a_transport_stream_is_not_damage(tmp_path: Path, filler: bytes, padding: int) -> None:
    path = make_video(tmp_path / "a.ts", numbered_frames(24), codec="libx264")
    path.write_bytes(path.read_bytes() + padding * filler)
    assert count(path) == 24


@pytest.mark.parametrize("padding", [1000, 70_000])
def test_padding_after_an_ogg_file_is_not_damage(tmp_path: Path, padding: int) -> None:
    path = make_video(tmp_path / "a.ogv", numbered_frames(24), codec="libvpx")
    path.write_bytes(path.read_bytes() + bytes(padding))
    assert count(path) == 24


@pytest.mark.parametrize(("suffix", "codec"), [("ogv", "libvpx"), ("ts", "libx264"), ("mpg", "mpeg2video")])
def test_joined_files_are_read_to_the_end(tmp_path: Path, suffix: str, codec: str) -> None:
    part = make_video(tmp_path / f"part.{suffix}", numbered_frames(12), codec=codec).read_bytes()
    path = tmp_path / f"a.{suffix}"
    path.write_bytes(part + part)
    assert count(path) == len(shown_frames(path))
    assert count(path) >= 23


@pytest.mark.parametrize(("first", "duration"), [(0, 8), (6, 24), (6, 8)])
def test_frames_that_an_edit_list_cuts_away_are_not_missing(tmp_path: Path, first: int, duration: int) -> None:
    path = make_video(tmp_path / "a.mp4", moving_blocks(0, 24), codec="libx264", bf="2", g="6")
    content = bytearray(path.read_bytes())
    entry = content.index(b"elst") + 12
    seconds, start = (int.from_bytes(content[at : at + 4], "big") for at in (entry, entry + 4))
    content[entry : entry + 4] = (seconds * duration // 24).to_bytes(4, "big")
    with av.open(str(path)) as container:
        frame = round(Fraction(1, 10) / container.streams.video[0].time_base)
    content[entry + 4 : entry + 8] = (start + first * frame).to_bytes(4, "big")
    path.write_bytes(content)
    expected = len(shown_frames(path))
    assert expected < 20
    assert count(path) == expected


@pytest.mark.parametrize("later", [(96, 128), (48, 32)])
def test_picture_size_may_change_if_the_shape_on_the_screen_does_not(tmp_path: Path, later: tuple[int, int]) -> None:
    path = tmp_path / "a.ts"
    for number, (height, width) in enumerate([(48, 64), later]):
        part = tmp_path / f"{number}.ts"
        with av.open(str(part), "w") as container:
            stream = container.add_stream("libx264", rate=10)
            stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
            stream.codec_context.sample_aspect_ratio = Fraction(64 * height, 48 * width)
            for pixels in numbered_frames(10, height, width):
                container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
            container.mux(stream.encode(None))
        path.write_bytes((path.read_bytes() if number else b"") + part.read_bytes())
    frames = read_frames(path, 24, range)
    assert frames.pixels_THWC.shape == (20, 24, 32, 3)


def write_streams(path: Path, *streams: tuple[int, int, int, Disposition | None]) -> Path:
    """Write video streams of (number of frames, height, width, disposition) each. One with a single frame is a JPEG."""
    with av.open(str(path), "w") as container:
        made = []
        for frames, height, width, disposition in streams:
            stream = container.add_stream("mjpeg" if frames == 1 else "libx264", rate=10)
            stream.height, stream.width = height, width
            stream.pix_fmt = "yuvj420p" if frames == 1 else "yuv420p"
            if disposition is not None:
                stream.disposition = disposition
            made.append((stream, numbered_frames(frames, height, width)))
        for stream, pictures in made:
            for pixels in pictures:
                frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
                container.mux(stream.encode(frame.reformat(format=stream.pix_fmt)))
            container.mux(stream.encode(None))
    return path


SMALL, LARGE = (48, 64), (96, 128)
NONE = Disposition(0)


def test_default_stream_is_read(tmp_path: Path) -> None:
    path = write_streams(tmp_path / "a.mkv", (5, *LARGE, NONE), (8, *SMALL, Disposition.default))
    assert count(path) == 8


@pytest.mark.parametrize("suffix", ["mkv", "ts"])
def test_largest_picture_is_read_if_no_stream_is_the_default(tmp_path: Path, suffix: str) -> None:
    path = write_streams(tmp_path / f"a.{suffix}", (5, *SMALL, NONE), (8, *LARGE, NONE))
    assert count(path) == 8


def test_cover_beside_a_video_is_not_read(tmp_path: Path) -> None:
    path = write_streams(tmp_path / "a.mp4", (1, 480, 640, Disposition.attached_pic), (8, *SMALL, None))
    assert count(path) == 8


def test_cover_alone_is_no_video(tmp_path: Path) -> None:
    path = write_streams(tmp_path / "a.mp4", (1, 480, 640, Disposition.attached_pic))
    with pytest.raises(DamagedVideo, match="no video stream"):
        count(path)


CASES = {
    "01-mirrored-matrix/m_hflip.mp4": 10,
    "02-open-gop-h264/cut264.mp4": 87,
    "02-open-gop-h264/ogc_1.mkv": 50,
    "02-open-gop-h264/ogc_1.mp4": 50,
    "02-open-gop-h264/ogc_1.ts": 50,
    "02-open-gop-h264/ogc_2.mp4": 50,
    "03-leading-pictures-hevc/cut265.mp4": 87,
    "03-leading-pictures-hevc/d4cut.mp4": 100,
    "03-leading-pictures-hevc/fromnemkv.mp4": 100,
    "03-leading-pictures-hevc/ne265.mp4": 100,
    "05-empty-packets-theora/dup.ogv": 19,
    "05-empty-packets-theora/still.ogv": 5,
    "08-padded-transport-stream/hls.ts": 50,
    "08-padded-transport-stream/padz.ts": 50,
}
"""Videos that users reported, with their numbers of frames by `ffprobe -count_frames`."""


@pytest.mark.parametrize("name", CASES)
def test_reported_videos_have_all_frames(name: str) -> None:
    assert count(case(name)) == CASES[name]


@pytest.mark.parametrize("name", ["sound+cover.mkv", "sound+cover.mp4"])
def test_reported_sound_with_a_cover_is_no_video(name: str) -> None:
    with pytest.raises(DamagedVideo, match="no video stream"):
        count(case(f"06-cover-only/{name}"))


def test_joined_theora_files_are_read_to_the_end(tmp_path: Path) -> None:
    path = tmp_path / "a.ogv"
    path.write_bytes(case("05-empty-packets-theora/dup.ogv").read_bytes() * 2)
    assert count(path) == 38
