"""A cache that tests of hostile content damage."""

import shutil
from pathlib import Path

import pytest

from tests.helpers.caches import MakeCache


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory, make_cache: MakeCache) -> Path:
    """Four videos in two shards, with raw pixels."""
    return make_cache(tmp_path_factory.mktemp("caches"), 4, shard_size=2, keep_pixels="raw")


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    return shutil.copytree(original, tmp_path / "caches" / original.name)
