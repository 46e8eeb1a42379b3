"""Caches at https addresses: they are read like others, every wait ends, and an unknown certificate is one error."""

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from data.cache import TokenCache, fetch, storage
from tests.data.cache.test_fetch import SLOW
from tests.helpers.cache_contents import all_codes
from tests.helpers.web_server import Handler, Server, self_signed, serving


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return self_signed(tmp_path_factory.mktemp("certificate"))


@pytest.fixture
def trusted(certificate: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Trust the certificate, and no other."""
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    fetch._trust.cache_clear()
    yield
    fetch._trust.cache_clear()


@pytest.fixture
def server(folder: Path, certificate: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with serving(folder, certificate) as server:
        yield server


@pytest.mark.usefixtures("trusted")
def test_cache_is_read_by_https(server: Server, folder: Path) -> None:
    cache = TokenCache.open(server.address)
    assert np.array_equal(all_codes(cache), all_codes(TokenCache.open(folder)))
    cache.verify()


@pytest.mark.usefixtures("trusted")
@pytest.mark.parametrize("kind", ["body", "header", "status line", "silent"])
def test_slow_server_is_given_up(server: Server, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    monkeypatch.setattr(storage, "PATIENCE", 0.4)
    server.respond = SLOW[kind]
    start = time.monotonic()
    with pytest.raises(OSError, match=f"{server.address}/manifest.json: .*too slow"):
        TokenCache.open(server.address)
    assert time.monotonic() - start < 1.5


@contextmanager
def answering(answer: bytes) -> Iterator[int]:
    """Listen on a port: send an answer to each connection at once, then a byte every 50 ms."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            while True:
                try:
                    connection, _ = listener.accept()
                    connection.sendall(answer)
                    for _ in range(60):
                        connection.sendall(b"\0")
                        time.sleep(0.05)
                except OSError:
                    if listener.fileno() < 0:
                        return

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield listener.getsockname()[1]
        listener.shutdown(socket.SHUT_RDWR)
    thread.join(5)


# The header of a handshake record of 16,000 bytes, which follow one by one.
@pytest.mark.parametrize("answer", [b"", b"\x16\x03\x03\x3e\x80"])
def test_slow_handshake_is_given_up(monkeypatch: pytest.MonkeyPatch, answer: bytes) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(storage, "PATIENCE", 0.4)
    start = time.monotonic()
    with answering(answer) as port, pytest.raises(OSError, match="manifest.json: ") as caught:
        TokenCache.open(f"https://127.0.0.1:{port}")
    assert time.monotonic() - start < 1.5
    assert len(str(caught.value).splitlines()) == 1


def test_slow_proxy_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "PATIENCE", 0.4)
    with answering(b"HTTP/1.1 200 OK\r\nX: ") as port:
        monkeypatch.setenv("https_proxy", f"http://127.0.0.1:{port}")
        start = time.monotonic()
        with pytest.raises(OSError, match=r"https://host\.example/manifest\.json: .*too slow"):
            TokenCache.open("https://host.example")
    assert time.monotonic() - start < 1.5


@pytest.mark.usefixtures("trusted")
@pytest.mark.parametrize("first_is_tls", [True, False])
def test_redirect_between_http_and_https_is_followed(folder: Path, certificate: Path, first_is_tls: bool) -> None:
    certificates = (certificate, None) if first_is_tls else (None, certificate)
    with serving(folder, certificates[0]) as first, serving(folder, certificates[1]) as second:
        first.respond = lambda handler: handler.send(b"", 302, Location=second.address + handler.path)
        cache = TokenCache.open(first.address)
        assert np.array_equal(all_codes(cache), all_codes(TokenCache.open(folder)))
        assert len(first.requests) == len(second.requests) == 5


def test_unknown_certificate_is_one_error_and_not_tried_again(server: Server) -> None:
    start = time.monotonic()
    with pytest.raises(OSError, match=f"{server.address}/manifest.json: .*certificate.*self-signed") as caught:
        TokenCache.open(server.address)
    assert len(str(caught.value).splitlines()) == 1
    assert time.monotonic() - start < 2
    assert server.requests == []


@pytest.mark.usefixtures("trusted")
def test_redirect_to_a_server_with_another_name_is_refused(server: Server) -> None:
    target = server.address.replace("127.0.0.1", "localhost")

    def respond(handler: Handler) -> bool:
        return handler.send(b"", 302, Location=target + handler.path)

    server.respond = respond
    with pytest.raises(OSError, match="certificate.*localhost"):
        TokenCache.open(server.address)
