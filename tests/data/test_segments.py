"""Parts of videos: rows with start and end are read as videos of their own, with the frames that are on display in the part."""

from pathlib import Path

import numpy as np
import pytest

from data.clip_spec import ClipSpec
from data.clips import ClipCuts, iter_clips, iter_test_views, read_clip
from data.decoding import DamagedVideo
from data.segments import Segment, split_path
from data.sources import Source, Video, hold_out, load_source
from data.timing import Timing
from tests.helpers.videos import MakeVideo, frame_numbers, numbered_frames

HEADER = "path,label,group,start,end\n"


@pytest.fixture
def listed(tmp_path: Path, make_video: MakeVideo):  # type: ignore[no-untyped-def]
    """Function (rows of a CSV file) -> source. `video.mp4` has 24 numbered frames, 8 per second: 3 seconds."""
    make_video(tmp_path / "video.mp4", numbered_frames(24), codec="libx264", rate=8)

    def read(rows: str) -> Source:
        (tmp_path / "list.csv").write_text(HEADER + rows)
        return load_source(str(tmp_path / "list.csv"))

    return read


def test_parts_of_a_video_are_rows_of_their_own(listed) -> None:  # type: ignore[no-untyped-def]
    source = listed("video.mp4,a,,0,1\nvideo.mp4,b,g,1,2.5\nvideo.mp4,c,,2.25,\nvideo.mp4,d,,,0.5\nvideo.mp4,e,,,\n")
    size = source.videos[0].size
    assert sorted(source.videos, key=lambda video: str(video.label)) == [
        Video("video.mp4#t=0,1", size, "a", group="video.mp4"),
        Video("video.mp4#t=1,2.5", size, "b", group="g"),
        Video("video.mp4#t=2.25,", size, "c", group="video.mp4"),
        Video("video.mp4#t=0,0.5", size, "d", group="video.mp4"),
        Video("video.mp4", size, "e"),
    ]
    assert any("4 of 5 rows are parts of videos" in note for note in source.notes)
    train, held_out = hold_out(source.videos)
    assert {source.videos[row].group for row in train}.isdisjoint(source.videos[row].group for row in held_out)


@pytest.mark.parametrize(
    "part, spec, expected",
    [
        ("1,2", {"frames": 8}, list(range(8, 16))),
        ("1,2", {"frames": 4, "stride": 2}, [8, 10, 12, 14]),
        ("1,2", {"frames": 4, "span": "video"}, [8, 10, 12, 14]),
        ("1,2", {"frames": 2, "fps": 4.0}, [10, 12]),
        ("2.5,", {"frames": 4}, [20, 21, 22, 23]),
        ("2.5,99", {"frames": 4}, [20, 21, 22, 23]),
        # A frame is on display from 1/8 s before the next one.
        ("1.06,1.07", {"frames": 2}, [8, 8]),
        ("1.5,1.75", {"frames": 4}, [12, 13, 13, 13]),
    ],
)
def test_clips_show_the_frames_of_the_part(listed, part: str, spec: dict, expected: list[int]) -> None:  # type: ignore[no-untyped-def]
    source = listed(f"video.mp4,a,,{part}\n")
    assert frame_numbers(read_clip(source, source.videos[0], ClipSpec(size=16, **spec), 0)) == expected


def test_dense_and_test_views_stay_in_the_part(listed) -> None:  # type: ignore[no-untyped-def]
    source = listed("video.mp4,a,,1,2.25\n")
    *clips, cuts = iter_clips(source, source.videos[0], ClipSpec(frames=4, size=16, views="dense"))
    assert [frame_numbers(clip) for clip in clips] == [[8, 9, 10, 11], [12, 13, 14, 15], [16, 17, 17, 17]]  # type: ignore[arg-type]
    assert isinstance(cuts, ClipCuts) and cuts.frames == 10 and [view.start for view in cuts.views] == [0, 4, 8]
    *clips, _ = iter_clips(source, source.videos[0], ClipSpec(frames=2, size=16, views="dense", stride=3))
    assert [frame_numbers(clip) for clip in clips] == [[8, 11], [14, 17]]  # type: ignore[arg-type]
    *clips, _ = iter_test_views(source, source.videos[0], ClipSpec(frames=4, size=16), 2, 1)
    assert [frame_numbers(clip) for clip in clips] == [[8, 9, 10, 11], [14, 15, 16, 17]]  # type: ignore[arg-type]


def test_parts_of_other_names_draw_other_views(listed) -> None:  # type: ignore[no-untyped-def]
    source = listed("video.mp4,a,,0,1.5\nvideo.mp4,b,,1.5,3\n")
    spec = ClipSpec(frames=2, size=16, views=4)
    starts = []
    for video in source.videos:
        *_, cuts = iter_clips(source, video, spec)
        starts.append([view.start for view in cuts.views])  # type: ignore[union-attr]
        assert max(starts[-1]) <= 10
    assert starts[0] != starts[1]


@pytest.mark.parametrize(
    "rows, message",
    [
        ("video.mp4,a,,2,1\n", "line 2: end must be above start 2, got 1"),
        ("video.mp4,a,,1,1\n", "line 2: end must be above start 1, got 1"),
        ("video.mp4,a,,-1,1\n", "line 2: start must be a number of seconds, at least 0, got '-1'"),
        ("video.mp4,a,,0,1:30\n", "line 2: end must be a number of seconds, at least 0, got '1:30'"),
        ("video.mp4,a,,nan,\n", "line 2: start must be a number"),
        ("video.mp4,a,,0,1e300\n", "line 2: end must be a number"),
        ("video.mp4,a,,0,1\nvideo.mp4,b,,0,1.0\n", "line 3: lists video.mp4 more than once, first in line 2"),
    ],
)
def test_invalid_parts_are_refused_with_their_line(listed, rows: str, message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=message):
        listed(rows)


def test_a_part_after_the_end_is_damage(listed) -> None:  # type: ignore[no-untyped-def]
    source = listed("video.mp4,a,,3.5,4\n")
    for views in (1, "dense"):
        with pytest.raises(DamagedVideo, match=r"ends at 3\.000 s, before the start of the part at 3\.5 s"):
            list(iter_clips(source, source.videos[0], ClipSpec(frames=4, size=16, views=views)))


def test_a_file_may_be_named_like_a_part(tmp_path: Path, make_video: MakeVideo) -> None:
    make_video(tmp_path / "video#t=1,2.mp4", numbered_frames(8))
    make_video(tmp_path / "a.mp4", numbered_frames(8))
    (tmp_path / "a.mp4").rename(tmp_path / "a.mp4#t=1,2")
    source = load_source(str(tmp_path))
    assert [video.path for video in source.videos] == ["video#t=1,2.mp4"]
    assert frame_numbers(read_clip(source, source.videos[0], ClipSpec(frames=8, size=16), 0)) == list(range(8))


def test_paths_of_parts_are_read_as_they_are_written() -> None:
    for segment in (Segment(0, 1), Segment(0.5, None), Segment(12345.678, 99999.5)):
        assert split_path(segment.path("a/b#t=1,2.mp4")) == ("a/b#t=1,2.mp4", segment)
    assert split_path("a.mp4#t=,") == ("a.mp4#t=,", None) and split_path("a#t=x,1") == ("a#t=x,1", None)


def test_parts_by_irregular_time_stamps() -> None:
    timing = Timing(5, 1.0, [0.0, 0.1, 0.2, 5.0, 6.0], last=1.0)
    for start, end, first, total in ((0, 1, 0, 3), (4.9, 6, 2, 2), (5, 6, 3, 1), (5, 6.5, 3, 2), (0.15, None, 1, 4)):
        part, number = timing.part(start, end)
        assert (number, part.total) == (first, total), (start, end)
    with pytest.raises(ValueError, match="neither time stamps nor a frame rate"):
        Timing(5, None).part(0, 1)
    part, _ = Timing(100, 10.0).part(2, 4)
    assert part.total == 20 and np.allclose(part.seconds(), np.arange(20) / 10)  # type: ignore[arg-type]
