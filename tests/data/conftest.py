"""Fixtures shared by the tests of data: a finished cache, and a copy of it."""

import multiprocessing
import shutil
from pathlib import Path

import pytest

from data.cache import TokenCache
from tests.helpers.caches import MakeCache

# Data workers are forked from a server; each starts ten times faster if the server has imported torch.
multiprocessing.set_forkserver_preload(["data.loading"])


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory, make_cache: MakeCache) -> TokenCache:
    """Cache of ten videos in three shards, with raw pixels."""
    return TokenCache.open(make_cache(tmp_path_factory.mktemp("caches"), keep_pixels="raw"))


@pytest.fixture
def copy(cache: TokenCache, tmp_path: Path) -> Path:
    """Copy of the cache folder that a test may damage."""
    return shutil.copytree(cache.address, tmp_path / cache.name)
