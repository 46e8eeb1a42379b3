"""Movies: of any size and rate, exact enough to look at, and never seen before they are whole."""

from collections.abc import Iterator
from pathlib import Path

import av
import numpy as np
import pytest

from pipelines.reporting.movies import side_by_side, write_mp4


def decoded(file: Path) -> np.ndarray:
    with av.open(str(file)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def frames(count: int, height: int, width: int) -> list[np.ndarray]:
    """Frames of one colour each."""
    return [np.full((height, width, 3), (20 * i % 256, (200 - 10 * i) % 256, 90), np.uint8) for i in range(count)]


@pytest.mark.parametrize(
    ("height", "width", "seen"),
    [(32, 32, (256, 256)), (31, 45, (248, 360)), (33, 7, (232, 50)), (129, 131, (130, 132)), (300, 200, (300, 200))],
)
def test_frames_are_enlarged_to_an_even_size(tmp_path: Path, height: int, width: int, seen: tuple[int, int]) -> None:
    shown = frames(5, height, width)
    write_mp4(tmp_path / "deep" / "movie.mp4", shown, rate=8)
    found = decoded(tmp_path / "deep" / "movie.mp4")
    assert found.shape == (5, *seen, 3)
    for frame, large in zip(shown, found, strict=True):
        assert np.abs(large.astype(int) - frame[0, 0]).max() < 8
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["movie.mp4"]


@pytest.mark.parametrize("rate", [8, 29.97, 30000 / 1001, 12.5, 0.5])
def test_it_is_h264_of_the_rate_asked_for(tmp_path: Path, rate: float) -> None:
    write_mp4(tmp_path / "movie.mp4", frames(4, 16, 16), rate)
    with av.open(str(tmp_path / "movie.mp4")) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.pix_fmt) == ("h264", "yuv420p")
        assert float(stream.average_rate or 0) == pytest.approx(rate, rel=1e-3)


def test_two_clips_side_by_side_have_white_between_them() -> None:
    a, b = np.zeros((2, 4, 6, 3), np.uint8), np.full((2, 4, 6, 3), 7, np.uint8)
    both = side_by_side(a, b)
    assert both.shape == (2, 4, 20, 3)
    assert (both[:, :, :6] == 0).all() and (both[:, :, 6:14] == 255).all() and (both[:, :, 14:] == 7).all()


def test_a_movie_is_not_seen_before_it_is_whole(tmp_path: Path) -> None:
    file = tmp_path / "movie.mp4"
    looked: list[bool] = []

    def watched() -> Iterator[np.ndarray]:
        for frame in frames(30, 64, 64):
            looked.append(file.exists())
            yield frame

    write_mp4(file, watched(), rate=8)
    assert looked == [False] * 30
    assert len(decoded(file)) == 30


def test_a_movie_that_fails_leaves_the_earlier_one_and_nothing_else(tmp_path: Path) -> None:
    file = tmp_path / "movie.mp4"
    write_mp4(file, frames(3, 16, 16), rate=8)
    before = file.read_bytes()

    def failing() -> Iterator[np.ndarray]:
        yield from frames(90, 64, 64)  # so many that some are written
        assert file.read_bytes() == before and len(list(tmp_path.iterdir())) == 2
        raise RuntimeError("no more frames")

    with pytest.raises(RuntimeError, match="no more frames"):
        write_mp4(file, failing(), rate=8)
    assert file.read_bytes() == before
    assert list(tmp_path.iterdir()) == [file]


def test_what_a_killed_process_left_is_in_nobodys_way(tmp_path: Path) -> None:
    (tmp_path / "movie.part.mp4").write_bytes(b"half a movie")
    write_mp4(tmp_path / "movie.mp4", frames(3, 16, 16), rate=8)
    assert [path.name for path in tmp_path.iterdir()] == ["movie.mp4"]
