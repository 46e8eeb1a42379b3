"""Held-out clips come from held-out videos as long as one of them can be used."""

import numpy as np
import pytest

from data.clip_spec import ClipSpec
from data.decoding import DamagedVideo
from data.source_clips import held_out_clips, nothing_held_out
from data.sources import Source, Video, hold_out

VIDEOS = tuple(Video(f"{i:02}", 1, split="train" if i < 5 else "test") for i in range(15))
SOURCE = Source("toy", None, VIDEOS)


@pytest.mark.parametrize("usable", [[4, 9], [2], [6, 7]])
def test_training_videos_are_used_only_if_all_held_out_videos_are_damaged(
    monkeypatch: pytest.MonkeyPatch, usable: list[int]
) -> None:
    read: list[int] = []

    def read_clip(source: Source, video: Video, spec: ClipSpec, view: int) -> np.ndarray:
        read.append(int(video.path))
        if read[-1] not in usable:
            raise DamagedVideo("damaged for the test")
        return np.full((1, 2, 2, 3), read[-1], np.uint8)

    monkeypatch.setattr("data.source_clips.read_clip", read_clip)
    skipped: dict[str, str] = {}
    clips_BTHWC = held_out_clips(SOURCE, ClipSpec(), 3, skipped)
    held_out = [row for row in usable if row in hold_out(VIDEOS)[1]]
    assert clips_BTHWC[:, 0, 0, 0, 0].tolist() == (held_out or usable)[:3]
    assert nothing_held_out(SOURCE, skipped) == (not held_out)
    assert len(read) == len(set(read))
    assert skipped.keys() == {f"{row:02}" for row in read if row not in usable}
