"""Slow and hostile servers: every wait ends, memory is bounded, and a file that is too large is named with its size."""

import gzip
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from data.cache import DamagedCache, TokenCache, fetch, storage
from data.cache.fetch import Pace
from data.cache.storage import Remote
from tests.helpers.caches import MakeCache
from tests.helpers.web_server import Handler, Server, serving


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with serving(tmp_path) as server:
        yield server


def drip(handler: Handler, start: bytes) -> bool:
    """Send the start of a response, and then a byte every 50 ms until the client closes the connection."""
    handler.wfile.write(start)
    for _ in range(200):
        handler.wfile.write(b" ")
        time.sleep(0.05)
    return True


def silent(handler: Handler) -> bool:
    time.sleep(3)
    handler.close_connection = True
    return True


def redirect_to_itself_slowly(handler: Handler) -> bool:
    time.sleep(0.2)
    return handler.send(b"", 302, Location=f"{handler.path}x", Content_Length="0")


SLOW: dict[str, Callable[[Handler], bool]] = {
    "body": lambda handler: drip(handler, b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n"),
    "body without length": lambda handler: drip(handler, b"HTTP/1.1 200 OK\r\n\r\n{"),
    "size of a chunk": lambda handler: drip(handler, b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2"),
    "header": lambda handler: drip(handler, b"HTTP/1.1 200 OK\r\nX: "),
    "status line": lambda handler: drip(handler, b"HTTP/1.1"),
    "silent": silent,
    "redirects": redirect_to_itself_slowly,
}


@pytest.mark.parametrize("kind", SLOW)
def test_slow_server_is_given_up_after_the_patience(server: Server, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    monkeypatch.setattr(storage, "PATIENCE", 0.4)
    server.respond = SLOW[kind]
    start = time.monotonic()
    with pytest.raises(OSError, match=f"{server.address}/manifest.json: .*") as caught:
        TokenCache.open(server.address)
    assert time.monotonic() - start < 1.5
    assert len(str(caught.value).splitlines()) == 1
    if kind != "redirects":
        assert "too slow" in str(caught.value)


def test_patience_grows_with_the_bytes_that_arrive(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """A slow connection that keeps the minimum rate is read to the end."""
    monkeypatch.setattr(fetch, "MINIMUM_RATE", 1000)

    def respond(handler: Handler) -> bool:
        handler.send(b"", Content_Length="2000")
        for _ in range(10):
            handler.wfile.write(bytes(200))
            time.sleep(0.08)
        return True

    server.respond = respond
    assert len(fetch.fetch(f"{server.address}/file", 2000, Pace(0.3))) == 2000
    monkeypatch.setattr(fetch, "MINIMUM_RATE", 10**6)
    with pytest.raises(OSError, match="too slow"):
        fetch.fetch(f"{server.address}/file", 2000, Pace(0.3))


@pytest.mark.parametrize("declared", [True, False])
def test_file_that_is_too_large_is_named_with_its_size_and_not_cut(
    server: Server, monkeypatch: pytest.MonkeyPatch, declared: bool
) -> None:
    monkeypatch.setattr(storage, "_MAX_FILE_BYTES", 5000)
    content = b'{"format": "' + bytes(6000) + b'"}'
    length = {"Content_Length": str(len(content))} if declared else {}
    server.respond = lambda handler: handler.send(content, **length)
    with pytest.raises(DamagedCache, match=rf"manifest.json: has {len(content) if declared else 'more than'}.*5000"):
        TokenCache.open(server.address)
    assert len(server.requests) == 1


def endless(handler: Handler) -> bool:
    handler.send(b"")
    while True:
        handler.wfile.write(bytes(2**20))


@pytest.mark.soak
@pytest.mark.parametrize("kind", [*SLOW, "endless"])
def test_hostile_server_takes_at_most_ten_seconds_and_512_mib(server: Server, kind: str) -> None:
    """The same with the real limits."""
    server.respond = endless if kind == "endless" else SLOW[kind]
    start, most = time.monotonic(), []
    reader = ThreadPoolExecutor(1)
    opened = reader.submit(TokenCache.open, server.address)
    while not opened.done():
        most.append(psutil.Process().memory_info().rss)
        time.sleep(0.01)
    with pytest.raises((OSError, DamagedCache)):
        opened.result()
    assert time.monotonic() - start < 10
    assert max(most) - most[0] < 2**29


def test_endless_file_takes_no_more_memory_than_the_limit(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "_MAX_FILE_BYTES", 2**24)
    server.respond = endless
    before = psutil.Process().memory_info().rss
    with pytest.raises(DamagedCache, match="more than the 16777216 bytes"):
        TokenCache.open(server.address)
    assert psutil.Process().memory_info().rss - before < 3 * 2**24


def test_manifest_of_many_small_lists_is_refused_before_it_is_parsed(server: Server) -> None:
    content = b'{"format": [' + b"[]," * 2**19 + b"0]}"
    server.respond = lambda handler: handler.send(content)
    with pytest.raises(DamagedCache, match="manifest.json: .*would take more than 46 MiB"):
        TokenCache.open(server.address)


def test_redirect_takes_no_memory_for_its_body(server: Server, tmp_path: Path, make_cache: MakeCache) -> None:
    """The body of a redirect may be endless; it is not read."""
    folder = make_cache(tmp_path, 4)
    sent: list[int] = []

    def respond(handler: Handler) -> bool:
        if handler.path.startswith("/moved"):
            handler.path = handler.path.removeprefix("/moved")
            return False
        handler.send(b"", 302, Location=f"/moved/{folder.name}{handler.path}")
        for _ in range(2**8):
            sent.append(handler.wfile.write(bytes(2**20)))
        return True

    server.respond = respond
    assert len(TokenCache.open(server.address)) == 4
    assert sum(sent) < 2**25


@pytest.mark.parametrize("encoding", ["gzip", "br", "x" * 5000])
def test_compressed_body_is_refused_with_its_encoding(server: Server, encoding: str) -> None:
    server.respond = lambda handler: handler.send(gzip.compress(b"{}"), Content_Encoding=encoding)
    with pytest.raises(OSError, match=f"manifest.json: .*encoding '{encoding[:30]}") as caught:
        TokenCache.open(server.address)
    assert len(str(caught.value)) < 300
    assert len(server.requests) == 1


def test_file_is_requested_without_compression(server: Server, tmp_path: Path, make_cache: MakeCache) -> None:
    folder = make_cache(tmp_path, 4)
    asked: list[str | None] = []

    def respond(handler: Handler) -> bool:
        asked.append(handler.headers["Accept-Encoding"])
        handler.path = f"/{folder.name}{handler.path}"
        return False

    server.respond = respond
    TokenCache.open(server.address)
    assert set(asked) == {"identity"}


def test_records_are_checked_while_they_are_read(
    server: Server, tmp_path: Path, make_cache: MakeCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first changed record ends the opening, whatever number of records the manifest names."""
    folder = make_cache(tmp_path, 60, shard_size=1)
    (folder / "shards" / "000000.json").write_bytes(b"{}")
    monkeypatch.setattr(storage, "_REQUESTS", 4)
    with pytest.raises(DamagedCache, match=r"shards/000000\.json: sha256 differs"):
        TokenCache.open(f"{server.address}/{folder.name}")
    assert len(server.requested(".json")) <= 1 + 4 + 4, "the manifest, the window, and requests that had begun"


def test_large_records_are_fetched_one_at_a_time(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in "abc":
        (tmp_path / name).write_bytes(name.encode() * (5000 if name == "b" else 50))
    monkeypatch.setattr(storage, "_SMALL_RECORD_BYTES", 100)
    assert [len(content) for content in Remote(server.address).read_records("abc")] == [50, 5000, 50]
    monkeypatch.setattr(storage, "_MAX_RECORD_BYTES", 4999)
    with pytest.raises(DamagedCache, match="/b: has 5000 bytes, at most 4999"):
        list(Remote(server.address).read_records("abc"))
