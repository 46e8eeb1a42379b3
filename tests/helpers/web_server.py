"""A local web server for a folder. It records requests, and a test can replace its responses."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


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

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), lambda *args: Handler(*args, directory=str(folder)))  # type: ignore[arg-type]
        self.requests: list[str] = []
        self.respond: Callable[[Handler], bool] = lambda handler: False

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

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
def serving(folder: Path) -> Iterator[Server]:
    """Serve a folder from a thread until the `with` block ends."""
    with Server(folder) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
