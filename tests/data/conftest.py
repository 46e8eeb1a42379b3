"""A finished cache, shared by the tests that read it."""

import shutil
from pathlib import Path

import pytest

from data.cache import TokenCache
from tests.conftest import MakeCache


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory, make_cache: MakeCache) -> TokenCache:
    """Ten videos in three shards, with raw pixels."""
    return TokenCache(make_cache(tmp_path_factory.mktemp("caches"), keep_pixels="raw"))


@pytest.fixture
def copy(cache: TokenCache, tmp_path: Path) -> Path:
    return shutil.copytree(cache.folder, tmp_path / cache.folder.name)
