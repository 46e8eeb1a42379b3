"""File access for caches: a local folder or a remote address.

This module reads only file names that this project generates, and never runs an external program. A remote shard is
fetched whole and checked against the size and sha256 in its record before it is used. It stays in memory until newer
shards need the space.
"""

import hashlib
import http.client
import json
import os
import resource
import stat
import threading
import time
import urllib.error
import urllib.parse
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any
from urllib import request

from data.shards import DamagedCache

SCHEMES = ("https", "http", "s3", "gs", "hf")
"""Schemes of remote caches. s3, gs and hf need fsspec and the package of that store."""
MEMORY = 2**29
"""Bytes of remote shards that a process keeps in memory."""
# Half of the limit leaves file descriptors to the rest of the process.
_MAX_OPEN_FILES = resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2
_MAX_SHARD_BYTES = 2**34  # for remote shards, which are held in memory
_MAX_FILE_BYTES = 2**28  # for remote manifests, records and codebooks
_ATTEMPTS = 4
_TIMEOUT = 30.0  # seconds without receiving data
_UNESCAPED = "%/:=&?~#+!$,;'@()*[]"  # kept in an address; spaces and non-ASCII characters are percent-encoded


class Folder:
    """Files of a local folder. Shards are read with pread instead of mmap, so that resident memory stays constant."""

    def __init__(self, path: Path) -> None:
        self.address = str(path)
        self._open: OrderedDict[str, _OpenFile] = OrderedDict()
        self._lock = threading.Lock()

    def read(self, name: str) -> bytes:
        """Read a whole file. Raises DamagedCache if it is missing."""
        return b"".join(self.chunks(name))

    def check_size(self, name: str, size: int, sha256: str) -> None:
        """Check the size of a shard. `ShardIndex.verify` checks the content."""
        try:
            actual = os.stat(os.path.join(self.address, name)).st_size
        except FileNotFoundError:
            raise DamagedCache(f"{self.address}/{name}: missing") from None
        if actual != size:
            raise DamagedCache(f"{self.address}/{name}: has {actual} bytes, expected {size} as in its record")

    def parts(self, names: Iterable[str], offsets: Iterable[int], size: int) -> list[bytes]:
        """Read parts of equal size from several shards. A part at the end of a shard may be shorter."""
        # The local references keep the files open if another thread drops them from self._open.
        files = [self._open.get(name) or self._opened(name) for name in names]
        return [os.pread(file.descriptor, size, offset) for file, offset in zip(files, offsets, strict=True)]

    def chunks(self, name: str) -> Iterator[bytes]:
        """Read a whole file piece by piece."""
        file = _OpenFile(self.address, name)
        while chunk := os.read(file.descriptor, 2**20):
            yield chunk

    def _opened(self, name: str) -> "_OpenFile":
        """Open a file and keep it open. Beyond `_MAX_OPEN_FILES`, drop the file that was opened first."""
        file = _OpenFile(self.address, name)
        with self._lock:
            self._open[name] = file
            while len(self._open) > _MAX_OPEN_FILES:
                self._open.popitem(last=False)
        return file

    # Data workers that are not forked receive the folder by pickle, without open files.
    def __reduce__(self) -> tuple[type["Folder"], tuple[Path]]:
        return Folder, (Path(self.address),)


class _OpenFile:
    """An open file, closed with its last reference. With O_NONBLOCK, `os.open` does not block on a named pipe."""

    def __init__(self, folder: str, name: str) -> None:
        try:
            self.descriptor = os.open(os.path.join(folder, name), os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except FileNotFoundError:
            raise DamagedCache(f"{folder}/{name}: missing") from None
        if not stat.S_ISREG(os.fstat(self.descriptor).st_mode):
            raise DamagedCache(f"{folder}/{name}: is not a regular file")

    def __del__(self) -> None:
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)


class Remote:
    """Files at a remote address, with the same methods as `Folder`."""

    def __init__(self, address: str) -> None:
        self.address = address
        self._expected: dict[str, tuple[int, str]] = {}
        self._shards: OrderedDict[str, bytes] = OrderedDict()

    def read(self, name: str) -> bytes:
        return _fetch(f"{self.address}/{name}", _MAX_FILE_BYTES)

    def check_size(self, name: str, size: int, sha256: str) -> None:
        """Store size and sha256 of a shard, for the check after its download."""
        self._expected[name] = (size, sha256)

    def parts(self, names: Iterable[str], offsets: Iterable[int], size: int) -> list[bytes]:
        places = list(zip(names, offsets, strict=True))
        # Sorted, so that each shard is fetched at most once even if only one fits into memory.
        content = {(name, offset): self._shard(name)[offset : offset + size] for name, offset in sorted(set(places))}
        return [content[place] for place in places]

    def chunks(self, name: str) -> Iterator[bytes]:
        yield self._shard(name)

    def _shard(self, name: str) -> bytes:
        """Return the content of a shard, from memory or fetched and checked."""
        if name not in self._shards:
            where, (size, sha256) = f"{self.address}/{name}", self._expected[name]
            if size > _MAX_SHARD_BYTES:
                raise DamagedCache(f"{where}: has {size} bytes in its record, at most {_MAX_SHARD_BYTES} are allowed")
            content = _fetch(where, size)
            if len(content) != size:
                raise DamagedCache(f"{where}: does not have the {size} bytes in its record")
            if hashlib.sha256(content).hexdigest() != sha256:
                raise DamagedCache(f"{where}: content has changed since it was written")
            while self._shards and sum(map(len, self._shards.values())) + size > MEMORY:
                self._shards.popitem(last=False)
            self._shards[name] = content
        self._shards.move_to_end(name)
        return self._shards[name]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_shards": OrderedDict()}


Files = Folder | Remote


def open_files(address: str | Path) -> Files:
    """Return the files of a folder or of a remote address. Raises ValueError if the scheme is not in `SCHEMES`."""
    text = str(address)
    if not is_address(text):
        return Folder(Path(address))
    scheme = text.partition(":")[0].lower()
    if scheme not in SCHEMES:
        raise ValueError(f"{text}: unsupported scheme {scheme!r}, expected one of {', '.join(SCHEMES)}")
    return Remote(text.rstrip("/"))


def is_address(name: str) -> bool:
    """Return whether a name is an address. This includes webdataset's `pipe:` (a shell command), which `open_files` refuses."""
    return "://" in name or name.startswith("pipe:")


def json_object(content: bytes, where: str) -> dict[str, Any]:
    """Parse JSON text that must be an object, such as a file or one line of a .jsonl file.

    Raises ValueError if the text is not JSON, is nested too deeply, or is not an object. The message starts with `where`.
    """
    try:
        value = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: is not JSON ({error})") from None
    if not isinstance(value, dict):
        raise ValueError(f"{where}: is not a JSON object")
    return value


def read_json(files: Files, name: str) -> dict[str, Any]:
    """Read a JSON object from a file of a cache. Raises DamagedCache if the file is missing or is not a JSON object."""
    content = files.read(name)
    try:
        return json_object(content, f"{files.address}/{name}")
    except ValueError as error:
        raise DamagedCache(str(error)) from None


def _fetch(address: str, size: int) -> bytes:
    """Fetch at most `size` + 1 bytes from an address. Transient failures are retried.

    Raises DamagedCache if the file does not exist, and OSError if the server cannot be reached or keeps failing.
    """
    for attempt in range(_ATTEMPTS):
        try:
            return _fetch_http(address, size) if address.startswith("http") else _fetch_fsspec(address, size)
        except FileNotFoundError:
            raise DamagedCache(f"{address}: missing") from None
        except (OSError, http.client.HTTPException) as error:
            permanent = isinstance(error, (PermissionError, http.client.InvalidURL))
            if permanent or attempt + 1 == _ATTEMPTS:
                raise OSError(f"{address}: cannot be read: {error or type(error).__name__}") from None
        time.sleep(0.25 * 4**attempt)
    raise AssertionError


def _fetch_http(address: str, size: int) -> bytes:
    # fsspec's HTTP backend is not used: it adds eight packages, returns short reads before the end of the file, decompresses
    # bodies, retries by itself and reports malformed responses as status 400.
    # With these handlers a redirect to file:, ftp: or data: fails.
    opener = request.OpenerDirector()
    transport = (request.ProxyHandler(), request.HTTPHandler(), request.HTTPSHandler(), request.UnknownHandler())
    results = (request.HTTPDefaultErrorHandler(), request.HTTPRedirectHandler(), request.HTTPErrorProcessor())
    for handler in transport + results:
        opener.add_handler(handler)
    try:
        with opener.open(request.Request(urllib.parse.quote(address, safe=_UNESCAPED)), timeout=_TIMEOUT) as response:
            content = response.read(size + 1)
            declared = response.headers.get("Content-Length")
    except urllib.error.HTTPError as error:
        if error.code in (404, 410):
            raise FileNotFoundError(address) from None
        # Among client errors, only a timeout, "too early" and "too many requests" are transient.
        if error.code < 500 and error.code not in (408, 425, 429):
            raise PermissionError(f"{error.code} {error.reason}") from None
        raise
    if declared is not None and declared.isdigit() and len(content) < min(int(declared), size + 1):
        raise OSError(f"the connection ended after {len(content)} of {declared} bytes")
    return content


def _fetch_fsspec(address: str, size: int) -> bytes:
    scheme = address.partition(":")[0]
    try:
        import fsspec

        with fsspec.filesystem(scheme).open(address, "rb") as file:
            return file.read(size + 1)
    except ImportError as error:
        raise ValueError(f"{address}: reading {scheme} addresses requires another package: {error}") from None
    except OSError:
        raise
    except Exception as error:
        # The packages of the stores raise exceptions that have no common base class.
        raise OSError(f"{type(error).__name__}: {error}") from None
