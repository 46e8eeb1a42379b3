"""Fixtures that packages share: tiny videos and caches."""

from pathlib import Path

import pytest

from tests.helpers import caches, videos
from tests.helpers.caches import MakeCache
from tests.helpers.videos import MakeVideo


@pytest.fixture(scope="session")
def make_video() -> MakeVideo:
    """make_video(path, frames, codec="mpeg4", rate=10, ...) -> path; see tests/helpers/videos.py."""
    return videos.make_video


@pytest.fixture(scope="session")
def video_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of two classes, `left` and `right`, of three videos each: 20 frames of 64 x 48 in mp4, mkv, avi. Read only."""
    root = tmp_path_factory.mktemp("videos")
    for label, direction in (("left", -1), ("right", 1)):
        (root / label).mkdir()
        for number, (suffix, codec) in enumerate((("mp4", "libx264"), ("mkv", "libx264"), ("avi", "mpeg4"))):
            videos.make_video(
                root / label / f"clip {number}.{suffix}", videos.moving_square(direction, 11 * number), codec=codec
            )
    return root


@pytest.fixture(scope="session")
def make_cache() -> MakeCache:
    """make_cache(caches, ...) -> folder of a finished cache of random codes; see tests/helpers/caches.py."""
    return caches.make_cache
