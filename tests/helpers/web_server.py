"""A local web server for a folder, by http or https. It records requests, and a test can replace its responses."""

import shutil
import ssl
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest


class Handler(SimpleHTTPRequestHandler):
    """Handles one request."""

    server: "Server"

    def do_GET(self) -> None:  # noqa: N802
        self.server.requests.append(self.path)
        if not self.server.respond(self):
            super().do_GET()

    def send(self, content: bytes, status: int = 200, **headers: str) -> bool:
        """Send a response with only the given headers. Returns True, as `Server.respond` must."""
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(content)
        return True

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        pass


class Server(ThreadingHTTPServer):
    """`requests` has the requested paths. `respond` sends a response instead of the file, or returns False to send the file."""

    daemon_threads = True
    # `open_shards` fetches records from many threads.
    request_queue_size = 64

    def __init__(self, folder: Path, certificate: Path | None = None) -> None:
        super().__init__(("127.0.0.1", 0), lambda *args: Handler(*args, directory=str(folder)))  # type: ignore[arg-type]
        self._scheme = "http"
        if certificate is not None:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(certificate)
            # The handshake takes place at the first read, in the thread of the request.
            self.socket = context.wrap_socket(self.socket, server_side=True, do_handshake_on_connect=False)
            self._scheme = "https"
        self.requests: list[str] = []
        self.respond: Callable[[Handler], bool] = lambda handler: False

    @property
    def address(self) -> str:
        return f"{self._scheme}://127.0.0.1:{self.server_address[1]}"

    def requested(self, suffix: str) -> list[str]:
        """Names of the requested files with this suffix."""
        return [path.rpartition("/")[2] for path in self.requests if path.endswith(suffix)]

    def handle_error(self, request: object, client_address: object) -> None:
        """Ignore clients that close the connection."""


def failing(times: int, suffix: str, respond: Callable[[Handler], bool]) -> Callable[[Handler], bool]:
    """Return a function for `Server.respond` that replaces the first responses for files with this suffix."""
    remaining = [times]

    def respond_first(handler: Handler) -> bool:
        if not handler.path.endswith(suffix) or remaining[0] == 0:
            return False
        remaining[0] -= 1
        return respond(handler)

    return respond_first


@contextmanager
def serving(folder: Path, certificate: Path | None = None) -> Iterator[Server]:
    """Serve a folder from a thread until the `with` block ends, by https with a certificate and its key in one file."""
    with Server(folder, certificate) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


def self_signed(folder: Path) -> Path:
    """Make a certificate for 127.0.0.1 and its key, in one file. Skips the test without the openssl program."""
    if shutil.which("openssl") is None:
        pytest.skip("needs the openssl program")
    file, key = folder / "certificate.pem", folder / "key.pem"
    kind = ["-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "36500"]
    names = ["-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1"]
    subprocess.run(
        ["openssl", "req", *kind, *names, "-keyout", str(key), "-out", str(file)], check=True, capture_output=True
    )
    file.write_bytes(file.read_bytes() + key.read_bytes())
    return file
