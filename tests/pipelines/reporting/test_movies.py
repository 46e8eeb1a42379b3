"""mp4 files have the right size, rate and colours, and appear only when they are complete."""

from collections.abc import Iterator
from pathlib import Path

import av
import numpy as np
import pytest

from pipelines.reporting.movies import side_by_side, write_mp4


def decoded(file: Path) -> np.ndarray:
    """All frames of a movie, (T, H, W, C)."""
    with av.open(str(file)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def frames(count: int, height: int, width: int) -> list[np.ndarray]:
    """Frames that have one colour each."""
    return [np.full((height, width, 3), (20 * i % 256, (200 - 10 * i) % 256, 90), np.uint8) for i in range(count)]


@pytest.mark.parametrize(
    ("height", "width", "size"),
    [(32, 32, (256, 256)), (31, 45, (248, 360)), (33, 7, (232, 50)), (129, 131, (130, 132)), (300, 200, (300, 200))],
)
def test_frames_are_enlarged_to_an_even_size(tmp_path: Path, height: int, width: int, size: tuple[int, int]) -> None:
    originals = frames(5, height, width)
    write_mp4(tmp_path / "deep" / "movie.mp4", originals, rate=8)
    movie = decoded(tmp_path / "deep" / "movie.mp4")
    assert movie.shape == (5, *size, 3)
    for frame, large in zip(originals, movie, strict=True):
        assert np.abs(large.astype(int) - frame[0, 0]).max() < 8
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["movie.mp4"]


@pytest.mark.parametrize("rate", [8, 29.97, 30000 / 1001, 12.5, 0.5])
def test_a_movie_is_h264_and_has_the_given_rate(tmp_path: Path, rate: float) -> None:
    write_mp4(tmp_path / "movie.mp4", frames(4, 16, 16), rate)
    with av.open(str(tmp_path / "movie.mp4")) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.pix_fmt) == ("h264", "yuv420p")
        assert float(stream.average_rate or 0) == pytest.approx(rate, rel=1e-3)


def test_two_clips_side_by_side_have_a_white_gap() -> None:
    a, b = np.zeros((2, 4, 6, 3), np.uint8), np.full((2, 4, 6, 3), 7, np.uint8)
    both = side_by_side(a, b)
    assert both.shape == (2, 4, 20, 3)
    assert (both[:, :, :6] == 0).all() and (both[:, :, 6:14] == 255).all() and (both[:, :, 14:] == 7).all()


def test_a_movie_appears_when_it_is_complete(tmp_path: Path) -> None:
    file = tmp_path / "movie.mp4"
    existed: list[bool] = []

    def watched() -> Iterator[np.ndarray]:
        for frame in frames(30, 64, 64):
            existed.append(file.exists())
            yield frame

    write_mp4(file, watched(), rate=8)
    assert existed == [False] * 30
    assert len(decoded(file)) == 30


def test_a_failed_movie_keeps_the_earlier_file_and_leaves_nothing_else(tmp_path: Path) -> None:
    file = tmp_path / "movie.mp4"
    write_mp4(file, frames(3, 16, 16), rate=8)
    before = file.read_bytes()

    def failing() -> Iterator[np.ndarray]:
        yield from frames(90, 64, 64)  # enough frames that some are written
        assert file.read_bytes() == before and len(list(tmp_path.iterdir())) == 2
        raise RuntimeError("no more frames")

    with pytest.raises(RuntimeError, match="no more frames"):
        write_mp4(file, failing(), rate=8)
    assert file.read_bytes() == before
    assert list(tmp_path.iterdir()) == [file]


def test_a_file_that_a_killed_process_left_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "movie.part.mp4").write_bytes(b"half a movie")
    write_mp4(tmp_path / "movie.mp4", frames(3, 16, 16), rate=8)
    assert [path.name for path in tmp_path.iterdir()] == ["movie.mp4"]


@pytest.mark.parametrize("rate", [float("nan"), float("inf"), -5.0, 0.0, 1e300, 10**400, 0.0009])
def test_rate_that_no_movie_can_have_is_refused(tmp_path: Path, rate: float) -> None:
    with pytest.raises(ValueError, match=r"movie\.mp4: rate must be 0.001 to 1000"):
        write_mp4(tmp_path / "movie.mp4", frames(2, 16, 16), rate)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("rate", [0.001, 1000.0])
def test_slowest_and_fastest_movie_have_their_frames(tmp_path: Path, rate: float) -> None:
    write_mp4(tmp_path / "movie.mp4", frames(3, 16, 16), rate)
    assert len(decoded(tmp_path / "movie.mp4")) == 3
