"""Fixtures shared by the tests of several packages: tiny videos and caches."""

import functools
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from docstring_parser.attrdoc import AttributeDocstrings

from tests.helpers import caches, videos
from tests.helpers.caches import MakeCache
from tests.helpers.videos import MakeVideo


@pytest.fixture(scope="session", autouse=True)
def ctrl_c() -> None:
    """Let Ctrl-C interrupt the commands that tests start. A shell starts background jobs and their children with it ignored."""
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def fork_server(ctrl_c: None) -> None:
    """Start the server that forks programs, if a collected test may need it. It imports while the first tests run."""
    if forked := sys.modules.get("tests.helpers.forked"):
        forked.start_server()


@pytest.fixture(scope="session", autouse=True)
def sources_read_once() -> Iterator[None]:
    """Keep the docstrings of settings, which jsonargparse reads anew from the source for every command line, in 0.2 to 0.6 s."""
    read = AttributeDocstrings.get_attr_docs
    docs_of = functools.cache(lambda component: read(AttributeDocstrings(), component))

    def get_attr_docs(self: AttributeDocstrings, component: Any) -> Any:
        return docs_of(component)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(AttributeDocstrings, "get_attr_docs", get_attr_docs)
        yield


@pytest.fixture(scope="session", autouse=True)
def share_of_the_cores() -> None:
    """Use a share of the cores if pytest-xdist runs several test processes: on busy cores, threads of tiny steps mostly wait."""
    processes = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    torch.set_num_threads(max(1, torch.get_num_threads() // processes))


@pytest.fixture
def two_threads() -> Iterator[None]:
    """Compute in two threads, for tests whose result could depend on how work is divided among threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)


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
