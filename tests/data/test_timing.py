"""Frames at another rate: those on display at each time, by arithmetic and by FFmpeg's fps filter."""

import random
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from data.decoding import iter_frames
from data.timing import Timing
from tests.helpers.videos import frame_numbers, make_video, numbered_frames


def steady(total: int, rate: float) -> Timing:
    return Timing(total, rate, [i / rate for i in range(total)])


def by_ffmpeg(ticks: list[int], time_base: Fraction, fps: int) -> list[int]:
    """Return the numbers of the frames that FFmpeg's filter keeps until the last frame is displayed."""
    graph = av.filter.Graph()
    source = graph.add_buffer(width=16, height=16, format="gray", time_base=time_base)
    rate = graph.add("fps", f"fps={fps}:round=up:eof_action=pass")
    sink = graph.add("buffersink")
    source.link_to(rate)
    rate.link_to(sink)
    graph.configure()
    numbers = []
    for number, tick in [*enumerate(ticks), (None, None)]:
        frame = None
        if tick is not None:
            frame = av.VideoFrame.from_ndarray(np.full((16, 16), number, np.uint8), format="gray")
            frame.pts, frame.time_base = tick, time_base
        graph.push(frame)
        while True:
            try:
                numbers.append(int(graph.pull().to_ndarray()[0, 0]))
            except (av.error.BlockingIOError, av.error.EOFError):
                break
    return numbers


@pytest.mark.parametrize("fps", [1, 2, 5, 10, 12, 24, 25, 30, 50])
def test_frames_are_those_of_ffmpeg_for_irregular_times(fps: int) -> None:
    draw = random.Random(fps)
    for _ in range(5):
        steps = [draw.choice([1, 7, 33, 34, 40, 170]) for _ in range(60)]
        ticks = [sum(steps[:i]) for i in range(60)]
        expected = by_ffmpeg(ticks, Fraction(1, 1000), fps)
        numbers = Timing(60, 30.0, [7 + tick / 1000 for tick in ticks]).resampled(fps).tolist()
        length = min(len(expected), len(numbers))
        assert length >= fps * ticks[-1] // 1000
        # A time stamp counts as up to a millisecond earlier, because some formats round it.
        differ = [k for k in range(length) if numbers[k] != expected[k]]
        assert all(0 < ticks[numbers[k]] - 1000 * k / fps < 1.001 for k in differ)
        assert len(differ) <= 0.15 * length + 1


@pytest.mark.parametrize(("rate", "divisor"), [(25, 1), (25, 2), (30000 / 1001, 1), (30000 / 1001, 4), (24, 12)])
def test_a_whole_fraction_of_the_rate_takes_every_nth_frame(rate: float, divisor: int) -> None:
    for total in (1, 2, 3, 48, 49, 50, 1000):
        assert steady(total, rate).resampled(rate / divisor).tolist() == list(range(0, total, divisor))


def test_a_higher_rate_repeats_frames() -> None:
    assert steady(4, 10).resampled(20).tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert steady(3, 10).resampled(25).tolist() == [0, 0, 0, 1, 1, 2, 2, 2]


@pytest.mark.parametrize("rate", [24, 25, 30000 / 1001, 60])
def test_times_rounded_to_milliseconds_neither_repeat_nor_drop_a_frame(rate: float) -> None:
    for rounded in (round, int):
        stamps = [rounded(1000 * i / rate) / 1000 for i in range(200)]
        assert Timing(200, rate, stamps).resampled(rate).tolist() == list(range(200))


def test_a_long_frame_is_shown_until_the_next_one() -> None:
    assert Timing(4, 4.0, [5.0, 5.1, 8.0, 8.1]).resampled(2).tolist() == [0, 1, 1, 1, 1, 1, 2]


@pytest.mark.parametrize(("last", "expected"), [(0.0, [0, 1, 2, 2]), (0.1, [0, 1, 2]), (1.6, [0, 1, 2, 2, 2, 2])])
def test_the_last_frame_is_shown_for_its_own_time_or_for_that_of_the_frame_before(
    last: float, expected: list[int]
) -> None:
    assert Timing(3, None, [1.0, 1.4, 2.0], last).resampled(2).tolist() == expected


@pytest.mark.parametrize(
    "stamps", [[], [0.0, None, 0.2, 0.3], [0.0, 0.2, 0.1, 0.3], [1.0] * 4, [0.0, float("nan")] * 2]
)
def test_the_average_rate_replaces_unknown_times(stamps: list[float | None]) -> None:
    assert Timing(4, 10.0, stamps).resampled(5).tolist() == [0, 2]
    with pytest.raises(ValueError, match=r"neither time stamps nor a frame rate, which clip\.fps"):
        Timing(4, None, stamps).resampled(5)


def test_false_time_stamps_do_not_ask_for_endless_frames() -> None:
    with pytest.raises(ValueError, match="span 1000000000000 seconds"):
        Timing(2, 25.0, [0.0, 5e11]).resampled(1)
    with pytest.raises(ValueError, match="neither"):
        Timing(2**62, 25.0).resampled(1)


def timing_of(path: Path) -> Timing:
    frames = iter_frames(path, 32, lambda number: ())
    assert list(frames) == []
    return frames.timing


def by_ffmpeg_from_file(path: Path, fps: float) -> list[int]:
    """Return the numbers of the frames of a file of `numbered_frames` that FFmpeg's filter gives for the whole file."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        graph = av.filter.Graph()
        source = graph.add_buffer(stream)
        zero, rate = graph.add("setpts", "PTS-STARTPTS"), graph.add("fps", f"fps={fps}:round=up")
        graph.link_nodes(source, zero, rate, graph.add("buffersink")).configure()
        pixels = []
        for frame in [*container.decode(stream), None]:
            graph.vpush(frame)
            while True:
                try:
                    pixels.append(graph.vpull().to_ndarray(format="rgb24"))
                except (av.error.BlockingIOError, av.error.EOFError):
                    break
    return frame_numbers(np.stack(pixels))


IRREGULAR = [0, 1, 2, 7, 8, 20, 21, 22, 60, 61, 62, 63]


@pytest.mark.parametrize("fps", [5, 12.5])
@pytest.mark.parametrize(
    ("suffix", "codec", "options"),
    [
        ("mp4", "libx264", {}),
        ("mkv", "libx264", {}),
        ("ts", "libx264", {}),
        ("mp4", "mpeg4", {}),
        ("mkv", "mpeg4", {"bf": "2"}),
        ("ts", "mpeg2video", {"bf": "2"}),
        ("webm", "libvpx", {}),
    ],
)
def test_frames_of_files_are_those_of_ffmpeg_to_the_end(
    tmp_path: Path, suffix: str, codec: str, options: dict[str, str], fps: float
) -> None:
    # The decoder holds back the last frames of videos with B-frames until it meets the end of the packets.
    rate = 25 if codec == "mpeg2video" else 10
    path = make_video(tmp_path / f"a.{suffix}", numbered_frames(12), codec, rate, IRREGULAR, **options)
    assert timing_of(path).resampled(fps).tolist() == by_ffmpeg_from_file(path, fps)


@pytest.mark.parametrize("suffix", ["asf", "ts"])
def test_time_stamps_replace_a_missing_average_rate(tmp_path: Path, suffix: str) -> None:
    path = make_video(tmp_path / f"a.{suffix}", numbered_frames(12), rate=25, bf="2")
    timing = timing_of(path)
    assert timing.rate is None
    assert timing.resampled(12.5).tolist() == list(range(0, 12, 2))
