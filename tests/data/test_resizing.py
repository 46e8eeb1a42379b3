"""Frames are shown as players show them: orientation, pixel aspect ratio and colours, against exact references."""

import io
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from data.decoding import read_frames, resized
from data.resizing import Resizer
from tests.helpers.colours import area_means, exact_rgb, psnr
from tests.helpers.shared_cases import case
from tests.helpers.stream_copies import write_packets
from tests.helpers.videos import make_video

# Display matrices (a, b, c, d), and the filters by which the ffmpeg program shows them.
ORIENTATIONS = {
    "as stored": ((1, 0, 0, 1), []),
    "90 degrees": ((0, 1, -1, 0), [("transpose", "clock")]),
    "180 degrees": ((-1, 0, 0, -1), [("hflip", None), ("vflip", None)]),
    "270 degrees": ((0, -1, 1, 0), [("transpose", "cclock")]),
    "mirrored left to right": ((-1, 0, 0, 1), [("hflip", None)]),
    "mirrored upside down": ((1, 0, 0, -1), [("vflip", None)]),
    "transposed": ((0, 1, 1, 0), [("transpose", "cclock_flip")]),
    "transposed along the other diagonal": ((0, -1, -1, 0), [("transpose", "clock_flip")]),
}
FORMATS = ["yuvj420p", "yuv422p", "yuv444p", "yuv410p", "yuv420p10le", "yuv444p12le", "gray", "gray10le"]
# Numbers of colour matrices (ITU-T H.273).
MATRICES = [1, 2, 5, 6, 9]


def corners(height: int = 64, width: int = 96) -> np.ndarray:
    """Picture whose corners have four colours."""
    pixels = np.zeros((height, width, 3), np.uint8)
    top, left = height // 2, width // 2
    pixels[:top, :left], pixels[:top, left:] = (220, 30, 30), (30, 220, 30)
    pixels[top:, :left], pixels[top:, left:] = (30, 30, 220), (120, 120, 120)
    return pixels


def disc(height: int, width: int, pixel_aspect: float) -> np.ndarray:
    """Picture of a white disc, as stored with pixels of this aspect ratio."""
    rows, columns = np.mgrid[:height, :width]
    radius = 0.4 * min(height, width * pixel_aspect)
    inside = (rows - height / 2 + 0.5) ** 2 + ((columns - width / 2 + 0.5) * pixel_aspect) ** 2 < radius**2
    return np.where(inside[..., None], 235, 20).repeat(3, -1).astype(np.uint8)


def card(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Picture with coloured edges, fine stripes and a smooth background, inside the colours that YUV can express."""
    rows, columns = np.mgrid[:height, :width] / np.array([height, width])[:, None, None]
    pixels = np.stack([60 + 120 * rows, 180 - 120 * columns, 90 + 60 * rows * columns], -1)
    draw = np.random.default_rng(seed)
    for _ in range(12):
        top, left = draw.integers(0, height * 3 // 4), draw.integers(0, width * 3 // 4)
        pixels[top : top + height // 5, left : left + width // 5] = draw.integers(60, 190, 3)
    pixels[height // 2 : height // 2 + 12, ::4] = (170, 90, 90)
    return pixels.astype(np.uint8)


def write(path: Path, pixels_HWC: np.ndarray, codec: str = "mpeg4", aspect: Fraction | None = None) -> Path:
    """Write a video of three equal frames."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=25)
        stream.height, stream.width = pixels_HWC.shape[:2]
        stream.pix_fmt = "yuv420p"
        stream.bit_rate = 4_000_000
        if aspect is not None:
            stream.codec_context.sample_aspect_ratio = aspect
        for number in range(3):
            frame = av.VideoFrame.from_ndarray(pixels_HWC, format="rgb24")
            frame.pts, frame.time_base = number, Fraction(1, 25)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def with_matrix(path: Path, matrix: Sequence[int]) -> Path:
    """Write a display matrix into the header of an MP4 file."""
    a, b, c, d = (number << 16 for number in matrix)
    content = bytearray(path.read_bytes())
    at = content.index(b"tkhd") + 44
    content[at : at + 36] = b"".join(n.to_bytes(4, "big", signed=True) for n in (a, b, 0, c, d, 0, 0, 0, 1 << 30))
    path.write_bytes(content)
    return path


def filtered(path: Path, filters: Sequence[tuple[str, str | None]]) -> np.ndarray:
    """Return the second frame in RGB after some of FFmpeg's filters."""
    with av.open(str(path)) as container:
        frame = list(container.decode(video=0))[1]
    graph = av.filter.Graph()
    source = graph.add_buffer(width=frame.width, height=frame.height, format=frame.format, time_base=Fraction(1))
    steps = [graph.add(name, arguments) for name, arguments in filters]
    graph.link_nodes(source, *steps, graph.add("format", "rgb24"), graph.add("buffersink")).configure()
    graph.vpush(frame)
    return graph.vpull().to_ndarray()


@pytest.mark.parametrize("name", ORIENTATIONS)
def test_orientation_equals_that_of_ffmpeg(tmp_path: Path, name: str) -> None:
    matrix, filters = ORIENTATIONS[name]
    path = with_matrix(write(tmp_path / "a.mp4", corners()), matrix)
    pixels = read_frames(path, 64, lambda _: [1]).pixels_THWC[0]
    expected = filtered(path, filters)
    assert pixels.shape == expected.shape
    assert psnr(pixels, expected) > 40


@pytest.mark.parametrize(("orientation", "turns"), [(1, 0), (6, 3), (3, 2), (8, 1)])
def test_motion_jpeg_with_exif_data_is_read_upright(tmp_path: Path, orientation: int, turns: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    jpeg = io.BytesIO()
    Image.fromarray(corners()).save(jpeg, "JPEG", exif=exif.tobytes(), quality=95)
    template = make_video(tmp_path / "template.mov", [corners()], codec="mjpeg", strict="-1")
    path = write_packets(tmp_path / "a.mov", template, [(jpeg.getvalue(), True)] * 3)
    pixels = read_frames(path, 64, lambda _: [1]).pixels_THWC[0]
    expected = np.rot90(corners(), turns)
    assert pixels.shape == expected.shape
    assert psnr(pixels, expected) > 30


@pytest.mark.parametrize("aspect", ["1", "2", "16/15", "64/45", "8/9", "64/51", "1/3"])
@pytest.mark.parametrize(
    ("suffix", "codec"), [("mp4", "libx264"), ("mkv", "mpeg4"), ("mov", "mpeg4"), ("ts", "libx264")]
)
def test_disc_of_pixels_that_are_not_square_is_round(tmp_path: Path, suffix: str, codec: str, aspect: str) -> None:
    ratio = Fraction(aspect)
    path = write(tmp_path / f"a.{suffix}", disc(120, 160, float(ratio)), codec, ratio)
    pixels = read_frames(path, 96, lambda _: [1]).pixels_THWC[0]
    displayed = 120, 160 * float(ratio)
    assert min(pixels.shape[:2]) == 96
    assert pixels.shape[1] / pixels.shape[0] == pytest.approx(displayed[1] / displayed[0], rel=0.01)
    bright = pixels.mean(-1) > 128
    assert bright.any(0).sum() / bright.any(1).sum() == pytest.approx(1, abs=0.05)


def test_turned_video_of_pixels_that_are_not_square_is_in_proportion(tmp_path: Path) -> None:
    path = with_matrix(write(tmp_path / "a.mp4", disc(120, 160, 2.0), "libx264", Fraction(2)), (0, 1, -1, 0))
    pixels = read_frames(path, 60, lambda _: [1]).pixels_THWC[0]
    assert pixels.shape == (160, 60, 3)


@pytest.mark.parametrize("width", [114, 115])
@pytest.mark.parametrize(
    ("pixel_format", "matrix"), [*(("yuv420p", matrix) for matrix in MATRICES), *((name, 1) for name in FORMATS)]
)
def test_colours_are_the_means_of_the_areas(pixel_format: str, matrix: int, width: int) -> None:
    stored_width = 320 if width == 114 else 323
    frame = av.VideoFrame.from_ndarray(card(180, stored_width), format="rgb24").reformat(format=pixel_format)
    frame.colorspace = matrix
    pixels = resized(frame, 64)
    assert pixels.shape == (64, width, 3)
    assert psnr(pixels, area_means(exact_rgb(frame), 64, width)) > 45


def test_reserved_numbers_of_colour_properties_are_read_as_unspecified() -> None:
    frame = av.VideoFrame.from_ndarray(card(72, 96), format="rgb24").reformat(format="yuv420p")
    expected = resized(frame, 24)
    for matrix, transfer in [(3, 3), (8, 2), (10, 16), (14, 18), (17, 1)]:
        frame.colorspace = matrix
        frame.color_trc = frame.color_primaries = transfer
        assert (resized(frame, 24) == expected).all()


@pytest.mark.parametrize("size", [(1, 1), (1, 2), (2, 1), (3, 5), (2, 300), (480, 1)])
@pytest.mark.parametrize("short_side", [1, 2, 16])
def test_tiny_frames_are_resized(size: tuple[int, int], short_side: int) -> None:
    frame = av.VideoFrame.from_ndarray(np.full((*size, 3), 90, np.uint8), format="rgb24").reformat(format="yuv420p")
    pixels = resized(frame, short_side)
    assert min(pixels.shape[:2]) == short_side
    assert np.abs(pixels.astype(int) - 90).max() < 6


def test_resizer_follows_frames_of_another_size_and_format() -> None:
    resizer = Resizer(24)
    frames = [
        av.VideoFrame.from_ndarray(card(*size), format="rgb24").reformat(format=pixel_format)
        for size, pixel_format in [
            ((48, 64), "yuv420p"),
            ((96, 128), "yuv420p"),
            ((96, 128), "yuv444p"),
            ((48, 64), "gray"),
        ]
    ]
    for frame in frames * 2:
        assert (resizer(frame) == resized(frame, 24)).all()


@pytest.mark.parametrize("aspect", ["1/100000", "4294967295", "0"])
def test_impossible_aspect_ratio_is_ignored(aspect: str) -> None:
    frame = av.VideoFrame.from_ndarray(card(48, 64), format="rgb24")
    assert Resizer(24, Fraction(aspect))(frame).shape == (24, 32, 3)


REPORTED_MIRRORS = {
    "m_hflip": "mirrored left to right",
    "m_vflip": "mirrored upside down",
    "m_rot90": "270 degrees",
    "m_transpose": "transposed",
    "m_antitranspose": "transposed along the other diagonal",
}


@pytest.mark.parametrize("name", REPORTED_MIRRORS)
def test_reported_mirrored_videos_are_shown_as_by_ffmpeg(name: str) -> None:
    path = case(f"01-mirrored-matrix/{name}.mp4")
    pixels = read_frames(path, 64, lambda _: [1]).pixels_THWC[0]
    expected = filtered(path, ORIENTATIONS[REPORTED_MIRRORS[name]][1])
    assert pixels.shape == expected.shape
    assert psnr(pixels, expected) > 40


@pytest.mark.parametrize("short_side", [64, 57, 65, 112])
def test_reported_test_card_keeps_its_colours(short_side: int) -> None:
    with av.open(str(case("09-chroma-half-width/s8.mp4"))) as container:
        frame = next(container.decode(video=0))
    pixels = resized(frame, short_side)
    assert psnr(pixels, area_means(exact_rgb(frame), *pixels.shape[:2])) > 45


@pytest.mark.parametrize("name", ["sar.mp4", "pal.mpg", "palwide.mpg"])
def test_reported_discs_are_round(name: str) -> None:
    bright = read_frames(case(f"10-anamorphic/{name}"), 96, lambda _: [1]).pixels_THWC[0].mean(-1) > 128
    assert bright.any(0).sum() / bright.any(1).sum() == pytest.approx(1, abs=0.05)


def test_reported_video_of_wide_pixels_has_its_proportions() -> None:
    assert read_frames(case("16-own-videos/sar2.mp4"), 64, lambda _: [0]).pixels_THWC.shape == (1, 64, 114, 3)
