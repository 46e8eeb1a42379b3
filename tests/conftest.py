"""Fixtures shared by the tests of several packages: tiny videos and caches."""

from pathlib import Path

import pytest

from tests.helpers import caches, videos
from tests.helpers.caches import MakeCache
from tests.helpers.videos import MakeVideo


@pytest.fixture(scope="session")
def make_video() -> MakeVideo:
    """The function `make_video` of tests/helpers/videos.py."""
    return videos.make_video


@pytest.fixture(scope="session")
def video_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Read-only folder of classes `left` and `right`, three videos each (mp4, mkv, avi): 20 frames, 64 x 48 pixels."""
    root = tmp_path_factory.mktemp("videos")
    for label, direction in (("left", -1), ("right", 1)):
        (root / label).mkdir()
        for number, (suffix, codec) in enumerate((("mp4", "libx264"), ("mkv", "libx264"), ("avi", "mpeg4"))):
            frames = videos.moving_square(direction, 11 * number)
            videos.make_video(root / label / f"clip {number}.{suffix}", frames, codec=codec)
    return root


@pytest.fixture(scope="session")
def make_cache() -> MakeCache:
    """The function `make_cache` of tests/helpers/caches.py."""
    return caches.make_cache
