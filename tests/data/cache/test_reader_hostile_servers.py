"""Servers that redirect to other places or send too much are refused, and nothing is read beyond what was recorded."""

import socket
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from data.cache import DamagedCache, TokenCache, fetch
from tests.helpers.cache_contents import expected_codes
from tests.helpers.forged_caches import Forgery
from tests.helpers.web_server import Handler, failing, serving


@pytest.fixture
def no_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Retry without waiting."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(fetch, "time", SimpleNamespace(sleep=lambda seconds: None, monotonic=time.monotonic))


@pytest.mark.parametrize("target", ["file:///etc/passwd", "ftp://127.0.0.1:1/x", "data:,{}", "http://127.0.0.1:abc/"])
@pytest.mark.parametrize("file", ["manifest.json", "000000.tar"])
def test_redirect_to_another_scheme_is_not_followed(folder: Path, no_waits: None, target: str, file: str) -> None:
    with serving(folder) as server:
        server.respond = failing(1000, file, lambda handler: handler.send(b"", 302, Location=target))
        with pytest.raises(OSError, match=file) as caught:
            TokenCache.open(server.address).codes(0)
    assert "root:" not in str(caught.value)


def test_redirect_to_another_web_server_is_followed(folder: Path, no_waits: None) -> None:
    with serving(folder) as target, serving(folder) as server:
        server.respond = lambda handler: handler.send(b"", 302, Location=target.address + handler.path)
        assert (TokenCache.open(server.address).codes(0) == expected_codes("0/000.mp4")).all()


def endless(sent: list[int], declared: str | None) -> Callable[[Handler], bool]:
    """Respond with 128 MiB instead of a shard. `sent` collects the numbers of bytes that the client accepted."""

    def respond(handler: Handler) -> bool:
        if not handler.path.endswith("000000.tar"):
            return False
        handler.send(b"", **({"Content_Length": declared} if declared else {}))
        handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2**16)
        for _ in range(2**7):
            sent.append(handler.wfile.write(bytes(2**20)))
        return True

    return respond


@pytest.mark.parametrize("declared", [None, str(2**50)])
def test_body_that_is_longer_than_recorded_is_refused_without_reading_it(
    folder: Path, no_waits: None, declared: str | None
) -> None:
    sent: list[int] = []
    size = (folder / "shards" / "000000.tar").stat().st_size
    with serving(folder) as server:
        server.respond = endless(sent, declared)
        with pytest.raises(DamagedCache, match=rf"000000\.tar: .*{size} bytes"):
            TokenCache.open(server.address).codes(0)
    assert sum(sent) < 2**24


def test_shard_of_negative_size_is_refused_without_reading_it(folder: Path, tmp_path: Path, no_waits: None) -> None:
    forgery = Forgery(folder, tmp_path / "canary")
    sent: list[int] = []
    forgery.empty(-2)
    forgery.seal()
    with serving(folder) as server:
        server.respond = endless(sent, None)
        with pytest.raises(DamagedCache, match=r"000000\.(tar|json): "):
            TokenCache.open(server.address).verify()
    assert sum(sent) < 2**24
