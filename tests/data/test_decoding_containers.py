"""Losses that the structure of a container shows are damage; padding, joins and recordings of broadcasts are none."""

from fractions import Fraction
from pathlib import Path

import av
import pytest

from data.decoding import DamagedVideo, read_frames
from tests.helpers.stream_copies import packets_of
from tests.helpers.videos import make_video, moving_blocks, numbered_frames


def count(path: Path) -> int:
    return read_frames(path, 32, lambda _: [0]).total


def refused(path: Path, content: bytes) -> bool:
    path.write_bytes(content)
    try:
        count(path)
    except DamagedVideo:
        return True
    return False


def copied(source: Path, target: Path, **options: str) -> Path:
    with av.open(str(source)) as old, av.open(str(target), "w", options=options) as new:
        stream = new.add_stream_from_template(old.streams.video[0])
        for packet in old.demux(video=0):
            if packet.size:
                packet.stream = stream
                new.mux(packet)
    return target


@pytest.mark.parametrize("padding", [bytes(1880), bytes(1000), b"\xff" * 188, bytes(150_000)])
def test_padding_inside_a_transport_stream_is_not_damage(tmp_path: Path, padding: bytes) -> None:
    path = make_video(tmp_path / "a.ts", numbered_frames(12), codec="libx264")
    content = path.read_bytes()
    path.write_bytes(content + padding + content + padding)
    assert count(path) == 24


@pytest.mark.parametrize("filler", [b"\0", b"\xff"])
@pytest.mark.parametrize("first", [20 * 188, 20 * 188 + 70])
def test_overwritten_part_of_a_transport_stream_is_damage(tmp_path: Path, first: int, filler: bytes) -> None:
    path = make_video(tmp_path / "a.ts", moving_blocks(), codec="libx265", **{"x265-params": "log-level=none:pools=1"})
    content = path.read_bytes()
    end = first + 10 * 188 + 30
    assert not refused(path, content)
    assert refused(path, content[:first] + filler * (end - first) + content[end:])


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> list[bytes]:
    """Pages of an Ogg file of 24 frames."""
    folder = tmp_path_factory.mktemp("ogg")
    source = make_video(folder / "source.ogv", moving_blocks(), codec="libvpx", rate=25, g="6")
    content = copied(source, folder / "a.ogv", page_duration="80000").read_bytes()
    pages = [b"OggS" + part for part in content.split(b"OggS")[1:]]
    assert len(pages) > 6
    return pages


def test_lost_and_changed_ogg_pages_are_damage(tmp_path: Path, pages: list[bytes]) -> None:
    path, whole = tmp_path / "a.ogv", b"".join(pages)
    assert not refused(path, whole)
    for lost in range(3, len(pages) - 1):
        assert refused(path, b"".join(pages[:lost] + pages[lost + 1 :]))
    for at in range(len(whole) // 5, len(whole), len(whole) // 7):
        changed = bytearray(whole)
        changed[at] ^= 1
        assert refused(path, bytes(changed))
    assert refused(path, whole[: len(whole) * 2 // 3])
    assert refused(path, whole[: len(whole) // 2] + whole[len(whole) // 2 + 9 :])


def test_joined_padded_and_broadcast_ogg_files_are_not_damage(tmp_path: Path, pages: list[bytes]) -> None:
    path, whole = tmp_path / "a.ogv", b"".join(pages)
    for content in (whole * 2, whole + bytes(1000) + whole, whole + b"a tag" * 30):
        assert not refused(path, content)
    # A recording of a broadcast has the headers, which end at position 0, and then the pages from some key picture on.
    headers = [page for page in pages if page[6:14] == bytes(8)]
    assert not refused(path, b"".join(headers + pages[4:]))


@pytest.mark.parametrize(("suffix", "codec"), [("mkv", "libx264"), ("webm", "libvpx")])
@pytest.mark.parametrize("frames", [2, 4, 16])
def test_short_matroska_files_cut_off_are_damage(tmp_path: Path, suffix: str, codec: str, frames: int) -> None:
    path = make_video(tmp_path / f"a.{suffix}", moving_blocks(0, frames), codec=codec)
    content = path.read_bytes()
    assert not refused(path, content)
    assert all(refused(path, content[: int(share * len(content))]) for share in (0.3, 0.5, 0.7, 0.9, 0.97))


def test_live_matroska_file_of_unknown_size_is_not_damage(tmp_path: Path) -> None:
    source = make_video(tmp_path / "a.mp4", moving_blocks(), codec="libx264", bf="0")
    assert count(copied(source, tmp_path / "a.mkv", live="1")) == 24


@pytest.mark.parametrize("lost", [1, 2, 3])
@pytest.mark.parametrize(("codec", "frames"), [("libx264", 16), ("mpeg4", 6)])
def test_mp4_file_that_lacks_its_last_pictures_is_damage(tmp_path: Path, codec: str, frames: int, lost: int) -> None:
    source = make_video(tmp_path / "source.mp4", moving_blocks(0, frames), codec=codec)
    path = copied(source, tmp_path / "a.mp4", movflags="faststart")
    content = path.read_bytes()
    assert not refused(path, content)
    assert refused(path, content[: content.rindex(packets_of(path)[-lost])])


@pytest.mark.parametrize("flags", ["dash+global_sidx", "frag_every_frame+empty_moov+default_base_moof"])
def test_missing_fragment_is_damage(tmp_path: Path, flags: str) -> None:
    # Every frame is a key frame, so the frames behind the missing fragment decode.
    source = make_video(tmp_path / "source.mp4", moving_blocks(0, 30), g="1")
    path = copied(source, tmp_path / "a.mp4", movflags=flags)
    content = path.read_bytes()
    starts = [at - 4 for at in range(len(content)) if content.startswith(b"moof", at)]
    assert len(starts) > 3
    assert not refused(path, content)
    assert refused(path, content[: starts[2]] + content[starts[3] :])


def test_fragments_with_pauses_are_not_damage(tmp_path: Path) -> None:
    times = [*range(6), *range(60, 66), *range(90, 96)]
    source = make_video(tmp_path / "source.mp4", moving_blocks(0, 18), times=times, g="6")
    assert count(copied(source, tmp_path / "a.mp4", movflags="frag_keyframe+empty_moov")) == 18


@pytest.mark.parametrize(
    ("name", "codec", "pixels"),
    [("m4v", "mpeg4", "yuv420p"), ("mjpeg", "mjpeg", "yuvj420p"), ("obu", "libsvtav1", "yuv420p")],
)
def test_raw_streams_are_read(tmp_path: Path, name: str, codec: str, pixels: str) -> None:
    path = tmp_path / "a.m4v"
    with av.open(str(path), "w", format=name) as container:
        stream = container.add_stream(codec, rate=25)
        stream.height, stream.width, stream.pix_fmt = 96, 128, pixels
        stream.options = {"preset": "12", "svtav1-params": "lp=1"} if codec == "libsvtav1" else {}
        for number, picture in enumerate(moving_blocks(0, 12)):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24").reformat(format=pixels)
            frame.pts, frame.time_base = number, Fraction(1, 25)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    assert count(path) == 12


def test_format_that_is_not_supported_is_named_as_the_reason(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    with av.open(str(path), "w", format="gif") as container:
        stream = container.add_stream("gif", rate=10)
        stream.height, stream.width, stream.pix_fmt = 48, 64, "rgb8"
        for pixels in numbered_frames(3):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24").reformat(format="rgb8")))
        container.mux(stream.encode(None))
    with pytest.raises(DamagedVideo, match="not supported"):
        count(path)


def test_default_stream_without_pictures_is_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "a.mkv"
    with av.open(str(path), "w") as container:
        empty, filled = (container.add_stream("mpeg4", rate=10) for _ in range(2))
        empty.height, empty.width, empty.pix_fmt = 96, 128, "yuv420p"
        filled.height, filled.width, filled.pix_fmt = 48, 64, "yuv420p"
        for pixels in numbered_frames(12):
            container.mux(filled.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(filled.encode(None))
    assert count(path) == 12
