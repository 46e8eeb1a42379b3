"""Fetch of whole files from a server, within limits of size and time, because a server may be slow or hostile."""

import http.client
import socket
import threading
import time
import urllib.error
import urllib.parse
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any
from urllib import request

from data.shards import DamagedCache

MINIMUM_RATE = 2**16
"""Bytes that a server must send per second, on average after its patience is used up."""
_SMALL_FILE = 2**13  # bytes that a smaller file counts as, because every request takes time
_ATTEMPTS = 4
_TIMEOUT = 30.0  # seconds without receiving data
_PIECE = 2**16
_UNESCAPED = "%/:=&?~#+!$,;'@()*[]"  # kept in an address; spaces and non-ASCII characters are percent-encoded


class TooLarge(DamagedCache):
    """Error for a file with more bytes than are allowed."""


class Pace:
    """Time limit of one or several fetches: `patience` seconds, plus the time that their bytes take at `MINIMUM_RATE`."""

    def __init__(self, patience: float) -> None:
        self._patience, self._start, self._bytes = patience, time.monotonic(), 0

    def left(self) -> float:
        """Return the seconds that are left, below 0 after the end."""
        return self._start + self._patience + self._bytes / MINIMUM_RATE - time.monotonic()

    def add(self, received: int) -> None:
        self._bytes += received

    def check(self) -> None:
        """Raise TimeoutError after the end."""
        if self.left() <= 0:
            seconds = time.monotonic() - self._start
            limit = f"allowed are {self._patience:.0f} s and {MINIMUM_RATE >> 10} KiB/s"
            raise TimeoutError(f"the server is too slow: {self._bytes} bytes in {seconds:.0f} s, {limit}")


def fetch(address: str, limit: int, pace: Pace) -> bytearray:
    """Fetch a file of at most `limit` bytes. Transient failures are retried while time is left.

    Raises TooLarge for a larger file, DamagedCache if the file does not exist, and OSError if the server cannot be reached,
    keeps failing or is too slow.
    """
    fetch_once = _fetch_http if address.startswith("http") else _fetch_fsspec
    for attempt in range(_ATTEMPTS):
        try:
            content = fetch_once(address, limit, pace)
            pace.add(max(0, _SMALL_FILE - len(content)))
            return content
        except FileNotFoundError:
            raise DamagedCache(f"{address}: missing") from None
        except (OSError, http.client.HTTPException) as error:
            permanent = isinstance(error, (PermissionError, http.client.InvalidURL))
            wait = 0.25 * 4**attempt
            if permanent or attempt + 1 == _ATTEMPTS or pace.left() < wait:
                raise OSError(f"{address}: cannot be read: {error or type(error).__name__}") from None
        time.sleep(wait)
    raise AssertionError


def _fetch_http(address: str, limit: int, pace: Pace) -> bytearray:
    # fsspec's HTTP backend is not used: it adds eight packages, returns short reads before the end of the file, decompresses
    # bodies, retries by itself and reports malformed responses as status 400.
    url, timeout = urllib.parse.quote(address, safe=_UNESCAPED), max(0.1, min(_TIMEOUT, pace.left()))
    with _watching(pace) as watch:
        # With these handlers a redirect to file:, ftp: or data: fails.
        opener = request.OpenerDirector()
        transport = (request.ProxyHandler(), _Handler(watch), request.UnknownHandler())
        results = (request.HTTPDefaultErrorHandler(), request.HTTPRedirectHandler(), request.HTTPErrorProcessor())
        for handler in transport + results:
            opener.add_handler(handler)
        try:
            with opener.open(request.Request(url), timeout=timeout) as response:
                declared = _declared_size(response)
                content = _read(response.read1, address, limit, declared, pace)
        except urllib.error.HTTPError as error:
            if error.code in (404, 410):
                raise FileNotFoundError(address) from None
            # Among client errors, only a timeout, "too early" and "too many requests" are transient.
            if error.code < 500 and error.code not in (408, 425, 429):
                raise PermissionError(f"{error.code} {error.reason}") from None
            raise
        except (OSError, http.client.HTTPException):
            # A connection that was closed because its time is over fails in many ways.
            pace.check()
            raise
    if declared is not None and len(content) < declared:
        raise OSError(f"the connection ended after {len(content)} of {declared} bytes")
    return content


def _declared_size(response: http.client.HTTPResponse) -> int | None:
    size = response.headers.get("Content-Length", "")
    return int(size) if size.isascii() and size.isdigit() and len(size) < 20 else None


def _fetch_fsspec(address: str, limit: int, pace: Pace) -> bytearray:
    scheme = address.partition(":")[0]
    try:
        import fsspec

        with fsspec.filesystem(scheme).open(address, "rb") as file:
            return _read(file.read, address, limit, getattr(file, "size", None), pace)
    except ImportError as error:
        raise ValueError(f"{address}: reading {scheme} addresses requires another package: {error}") from None
    except (OSError, DamagedCache):
        raise
    except Exception as error:
        # The packages of the stores raise exceptions that have no common base class.
        raise OSError(f"{type(error).__name__}: {error}") from None


def _read(read: Callable[[int], bytes], address: str, limit: int, declared: int | None, pace: Pace) -> bytearray:
    """Read a file to its end in pieces. Raises TooLarge, before reading if the declared size is too large."""
    if declared is not None and declared > limit:
        raise TooLarge(f"{address}: has {declared} bytes, at most {limit} bytes are allowed")
    content = bytearray()
    while piece := read(_PIECE):
        content += piece
        pace.add(len(piece))
        pace.check()
        if len(content) > limit:
            raise TooLarge(f"{address}: has more than the {limit} bytes that are allowed")
    pace.check()
    return content


# A timeout of a socket begins anew with every byte, so a server that sends single bytes could keep a reader for ever.
class _Watch:
    """Thread that shuts the connections of a fetch down when its time is over, which ends every wait for the server."""

    def __init__(self, pace: Pace) -> None:
        self._pace, self._done = pace, threading.Event()
        self._sockets: list[socket.socket] = []
        self._thread = threading.Thread(target=self._run, daemon=True)

    def add(self, connected: socket.socket) -> None:
        # TLS detaches the socket from its object. The duplicate stays valid.
        self._sockets.append(connected.dup())

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._done.set()
        self._thread.join()
        for connected in self._sockets:
            connected.close()

    def _run(self) -> None:
        while not self._done.wait(max(0.0, self._pace.left())):
            if self._pace.left() <= 0:
                for connected in self._sockets:
                    with suppress(OSError):
                        connected.shutdown(socket.SHUT_RDWR)
                self._done.wait(0.1)  # again, because a redirect may have made a new connection


@contextmanager
def _watching(pace: Pace) -> Iterator[_Watch]:
    watch = _Watch(pace)
    watch.start()
    try:
        yield watch
    finally:
        watch.stop()


class _Watched(http.client.HTTPConnection):
    """Connection that a `_Watch` knows from its first byte."""

    def __init__(self, host: str, *, watch: _Watch, **settings: Any) -> None:
        super().__init__(host, **settings)
        self._watch = watch

    def connect(self) -> None:
        super().connect()
        self._watch.add(self.sock)


class _WatchedTLS(http.client.HTTPSConnection, _Watched):
    """The same for https, whose `connect` calls `_Watched.connect` before TLS begins."""


class _Handler(request.AbstractHTTPHandler):
    """Handler of http and https addresses with connections that a `_Watch` knows."""

    def __init__(self, watch: _Watch) -> None:
        super().__init__()
        self._watch = watch

    def http_open(self, req: request.Request) -> http.client.HTTPResponse:
        return self.do_open(partial(_Watched, watch=self._watch), req)  # type: ignore[arg-type]

    def https_open(self, req: request.Request) -> http.client.HTTPResponse:
        return self.do_open(partial(_WatchedTLS, watch=self._watch), req)  # type: ignore[arg-type]

    http_request = https_request = request.AbstractHTTPHandler.do_request_
