"""Fetch of whole files from a server, within limits of size and time, because a server may be slow or hostile."""

import http.client
import re
import socket
import ssl
import threading
import time
import urllib.error
import urllib.parse
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache, partial
from typing import IO, Any
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


class _Permanent(OSError):
    """Failure that another attempt would repeat."""


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


def check_web_address(address: str) -> None:
    """Raise ValueError if an http or https address has no valid host and port, or has a user name."""
    authority = re.sub(r"^\w+:/*|[/?#].*", "", address, flags=re.DOTALL)
    # The text before the last @ may be a password, which a message must not repeat.
    shown = address.replace(f"{authority.rpartition('@')[0]}@", "") if "@" in authority else address
    try:
        if "@" in authority:
            raise ValueError("an address with a user name or password is not supported")
        parts = urllib.parse.urlsplit(address)
        host = parts.hostname or ""
        if not host or not authority.isprintable() or " " in authority:
            raise ValueError("the address has no valid host")
        try:
            host.encode("idna")
        except UnicodeError:
            raise ValueError(f"{host:.80} is not a valid host name") from None
        if parts.port == 0:
            raise ValueError("Port out of range 0-65535")
    except ValueError as error:
        raise ValueError(f"{shown}: {error}") from None


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
            permanent = isinstance(error, (_Permanent, PermissionError, http.client.InvalidURL))
            wait = 0.25 * 4**attempt
            if permanent or attempt + 1 == _ATTEMPTS or pace.left() < wait:
                raise OSError(f"{address}: cannot be read: {error or type(error).__name__}") from None
        time.sleep(wait)
    raise AssertionError


def _fetch_http(address: str, limit: int, pace: Pace) -> bytearray:
    # fsspec's HTTP backend is not used: it adds eight packages, returns short reads before the end of the file, decompresses
    # bodies, retries by itself and reports malformed responses as status 400.
    url = urllib.parse.quote(address, safe=_UNESCAPED, errors="surrogateescape")
    with _watching(pace) as watch:
        # With these handlers a redirect to file:, ftp: or data: fails.
        opener = request.OpenerDirector()
        transport = (request.ProxyHandler(), _Handler(watch), request.UnknownHandler())
        results = (request.HTTPDefaultErrorHandler(), _Redirects(), request.HTTPErrorProcessor())
        for handler in transport + results:
            opener.add_handler(handler)
        try:
            with opener.open(request.Request(url), timeout=_TIMEOUT) as response:
                _refuse_encoded(response)
                declared = _declared_size(response)
                content = _read(response.read1, address, limit, declared, pace)
        except urllib.error.HTTPError as error:
            if error.code in (404, 410):
                raise FileNotFoundError(address) from None
            # Among client errors, only a timeout, "too early" and "too many requests" are transient.
            if error.code < 500 and error.code not in (408, 425, 429):
                raise _Permanent(f"{error.code} {error.reason}") from None
            raise
        except (OSError, http.client.HTTPException) as error:
            # A connection that was closed because its time is over fails in many ways.
            pace.check()
            reason = getattr(error, "reason", None)
            if isinstance(reason, ssl.SSLCertVerificationError):
                raise _Permanent(f"the server's certificate is not trusted: {reason.verify_message}") from None
            raise
        except DamagedCache:
            raise
        except ValueError as error:
            raise _Permanent(f"invalid address of a redirect or a proxy: {error}") from None
    if declared is not None and len(content) < declared:
        raise OSError(f"the connection ended after {len(content)} of {declared} bytes")
    return content


def _refuse_encoded(response: http.client.HTTPResponse) -> None:
    """Raise an error if a body is compressed, although `http.client` asks for the identity encoding."""
    encoding = response.headers.get("Content-Encoding", "identity").strip()
    if encoding.lower() not in ("identity", ""):
        raise _Permanent(f"the server sends the encoding {encoding!r:.40}, expected the file as it is")


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

    def connect(self, address: tuple[str, int], timeout: float, source: None = None) -> socket.socket:
        """Connect to a host, as `socket.create_connection` does, which would give each of its addresses the whole timeout."""
        failure = OSError("the host has no address")
        for *_, place in socket.getaddrinfo(*address, type=socket.SOCK_STREAM):
            self._pace.check()
            host, port = str(place[0]), int(place[1])
            try:
                connected = socket.create_connection((host, port), max(0.1, min(timeout, self._pace.left())))
            except OSError as error:
                failure = error
            else:
                # TLS detaches the socket from its object. The duplicate stays valid.
                self._sockets.append(connected.dup())
                return connected
        raise failure

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
    """Connection that a `_Watch` knows before its first byte, thus also during a proxy's reply and the TLS handshake."""

    def __init__(self, host: str, *, watch: _Watch, **settings: Any) -> None:
        super().__init__(host, **settings)
        self._create_connection = watch.connect


class _WatchedTLS(_Watched, http.client.HTTPSConnection):
    """The same for https."""


@cache
def _trust() -> ssl.SSLContext:
    """Return the settings of TLS, which hold the certificates of the system. Reading these takes a tenth of a second."""
    context = ssl.create_default_context()
    context.set_alpn_protocols(["http/1.1"])
    return context


class _Redirects(request.HTTPRedirectHandler):
    """Redirects without their bodies, which may have any length."""

    def redirect_request(
        self, req: request.Request, fp: IO[bytes], code: int, msg: str, headers: http.client.HTTPMessage, newurl: str
    ) -> request.Request | None:
        check_web_address(newurl)
        # The base class reads a body to its end. A closed one is empty.
        fp.close()
        return super().redirect_request(req, fp, code, msg, headers, newurl)


class _Handler(request.AbstractHTTPHandler):
    """Handler of http and https addresses with connections that a `_Watch` knows."""

    def __init__(self, watch: _Watch) -> None:
        super().__init__()
        self._watch = watch

    def http_open(self, req: request.Request) -> http.client.HTTPResponse:
        return self.do_open(partial(_Watched, watch=self._watch), req)  # type: ignore[arg-type]

    def https_open(self, req: request.Request) -> http.client.HTTPResponse:
        return self.do_open(partial(_WatchedTLS, watch=self._watch, context=_trust()), req)  # type: ignore[arg-type]

    http_request = https_request = request.AbstractHTTPHandler.do_request_
