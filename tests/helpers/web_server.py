"""A web server on this machine that serves a folder, and counts and spoils its answers as a test wants."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


class Handler(SimpleHTTPRequestHandler):
    """Answers one request."""

    server: "Server"

    def do_GET(self) -> None:  # noqa: N802
        self.server.requests.append(self.path)
        if not self.server.spoil(self):
            super().do_GET()

    def send(self, content: bytes, status: int = 200, **headers: str) -> bool:
        """An answer of any kind, `Content_Length` only if it is given; True, so that `spoil` may end with it."""
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(content)
        return True

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        pass


class Server(ThreadingHTTPServer):
    """`requests`: paths that were asked for; `spoil`: may answer in the place of the file, and says whether it did."""

    daemon_threads = True
    request_queue_size = 64  # records are asked for by many threads at once

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), lambda *args: Handler(*args, directory=str(folder)))  # type: ignore[arg-type]
        self.requests: list[str] = []
        self.spoil: Callable[[Handler], bool] = lambda handler: False

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def asked_for(self, suffix: str) -> list[str]:
        """Names of the files of a kind that were asked for."""
        return [path.rpartition("/")[2] for path in self.requests if path.endswith(suffix)]

    def handle_error(self, request: object, client_address: object) -> None:
        """Clients that hang up are expected."""


@contextmanager
def serving(folder: Path) -> Iterator[Server]:
    with Server(folder) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
