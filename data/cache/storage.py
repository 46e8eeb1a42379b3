"""Where the files of a cache are: a folder, or an address. Nothing here runs a program, and names are those of this project.

Remote shards are fetched whole, checked against the size and sha256 in the manifest before one byte of them is used, and
kept in memory as long as there is room.
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
import urllib.request
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol

from data.shards import DamagedCache

SCHEMES = ("https", "http", "s3", "gs", "hf")
"""Addresses that may be opened; the last three through fsspec and the package of that store."""
MEMORY = 2**29
"""Bytes of remote shards that a process keeps."""
_OPEN_FILES = resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2
_LARGEST = 2**34  # bytes of a remote shard
_TRIES = 4
_SAFE = "%/:=&?~#+!$,;'@()*[]"  # what stays as it is in an address; blanks and letters beyond ASCII are escaped
_PATIENCE = 30.0  # seconds without a byte


class Files(Protocol):
    """The files of one cache, by names that this project chose."""

    address: str

    def read(self, name: str) -> bytes: ...
    def check_size(self, name: str, size: int, sha256: str) -> None: ...
    def part(self, name: str, offset: int, size: int) -> bytes: ...
    def parts(self, names: Iterable[str], offsets: Iterable[int], size: int) -> list[bytes]: ...
    def chunks(self, name: str) -> Iterator[bytes]: ...


def open_files(address: str | Path) -> Files:
    """The files of a folder or behind an address.

    Raises:
        ValueError: for an address of any scheme but `SCHEMES`.
    """
    text = str(address)
    if "://" not in text and not text.startswith("pipe:"):
        return Folder(Path(address))
    scheme = text.partition(":")[0].lower()
    if scheme not in SCHEMES:
        raise ValueError(f"{text}: {scheme}: is no scheme that caches are read from ({', '.join(SCHEMES)})")
    return Remote(text.rstrip("/"))


def is_address(wanted: str) -> bool:
    """Whether a user's word for a cache is an address, not the name of a folder."""
    return "://" in wanted or wanted.startswith("pipe:")


def read_json(files: Files, name: str) -> dict[str, Any]:
    """A JSON object.

    Raises:
        DamagedCache: if it is missing or anything else.
    """
    text = files.read(name)
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DamagedCache(f"{files.address}/{name}: is not JSON ({error})") from None
    if not isinstance(content, dict):
        raise DamagedCache(f"{files.address}/{name}: is not a JSON object")
    return content


class Folder:
    """Files of a local folder. Parts are read, not mapped, so that memory stays flat however large the cache is."""

    def __init__(self, path: Path) -> None:
        self.address = str(path)
        self._open: OrderedDict[str, _Handle] = OrderedDict()
        self._lock = threading.Lock()

    def read(self, name: str) -> bytes:
        return b"".join(self.chunks(name))

    def check_size(self, name: str, size: int, sha256: str) -> None:
        """Refuse a file of another size; its content is left to `ShardIndex.verify`."""
        try:
            actual = os.stat(os.path.join(self.address, name)).st_size
        except FileNotFoundError:
            raise DamagedCache(f"{self.address}/{name}: missing") from None
        if actual != size:
            raise DamagedCache(f"{self.address}/{name}: has {actual} bytes, its record says {size}")

    def part(self, name: str, offset: int, size: int) -> bytes:
        handle = self._open.get(name) or self._handle(name)  # held here, so that no other thread closes it meanwhile
        return os.pread(handle.number, size, offset)

    def parts(self, names: Iterable[str], offsets: Iterable[int], size: int) -> list[bytes]:
        """Parts of one size, of several files."""
        known, pread = self._open.get, os.pread
        handles = [known(name) or self._handle(name) for name in names]
        return [pread(handle.number, size, offset) for handle, offset in zip(handles, offsets, strict=True)]

    def chunks(self, name: str) -> Iterator[bytes]:
        handle = _Handle(self.address, name)
        while chunk := os.read(handle.number, 2**20):
            yield chunk

    def _handle(self, name: str) -> "_Handle":
        """Open a file, and let go of the one that was opened longest ago where too many are."""
        handle = _Handle(self.address, name)
        with self._lock:
            self._open[name] = handle
            while len(self._open) > _OPEN_FILES:
                self._open.popitem(last=False)
        return handle

    def __getstate__(self) -> dict[str, Any]:  # for data workers that are started afresh
        return {"address": self.address}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(Path(state["address"]))  # type: ignore[misc]


class _Handle:
    """An open file; closed when nobody holds it any more. Anything that is no plain file is refused, not waited for."""

    def __init__(self, folder: str, name: str) -> None:
        try:
            self.number = os.open(os.path.join(folder, name), os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except FileNotFoundError:
            raise DamagedCache(f"{folder}/{name}: missing") from None
        if not stat.S_ISREG(os.fstat(self.number).st_mode):
            raise DamagedCache(f"{folder}/{name}: is no plain file")

    def __del__(self) -> None:
        if hasattr(self, "number"):
            os.close(self.number)


class Remote:
    """Files behind an address."""

    def __init__(self, address: str) -> None:
        self.address = address
        self._expected: dict[str, tuple[int, str]] = {}
        self._kept: OrderedDict[str, bytes] = OrderedDict()

    def read(self, name: str) -> bytes:
        return _fetch(f"{self.address}/{name}")

    def check_size(self, name: str, size: int, sha256: str) -> None:
        """Remember what the file must be; it is held against that when it is fetched."""
        self._expected[name] = (size, sha256)

    def part(self, name: str, offset: int, size: int) -> bytes:
        return self.whole(name)[offset : offset + size]

    def parts(self, names: Iterable[str], offsets: Iterable[int], size: int) -> list[bytes]:
        wanted = list(zip(names, offsets, strict=True))
        found = {place: self.part(*place, size) for place in sorted(set(wanted))}  # each file once
        return [found[place] for place in wanted]

    def chunks(self, name: str) -> Iterator[bytes]:
        yield self.whole(name)

    def whole(self, name: str) -> bytes:
        """A shard, fetched unless it is at hand."""
        if name not in self._kept:
            size, sha256 = self._expected[name]
            if size > _LARGEST:
                raise DamagedCache(f"{self.address}/{name}: {size} bytes are more than a shard may have")
            content = _fetch(f"{self.address}/{name}", size)
            if len(content) != size:
                raise DamagedCache(f"{self.address}/{name}: has not the {size} bytes that its record says")
            if hashlib.sha256(content).hexdigest() != sha256:
                raise DamagedCache(f"{self.address}/{name}: content has changed since it was written")
            while self._kept and sum(map(len, self._kept.values())) + size > MEMORY:
                self._kept.popitem(last=False)
            self._kept[name] = content
        self._kept.move_to_end(name)
        return self._kept[name]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_kept": OrderedDict()}


def _fetch(address: str, size: int = 2**28) -> bytes:
    """Content behind an address, at most one byte more than `size`; what fails for a moment is tried again.

    Raises:
        DamagedCache: if there is no such file.
        OSError: if the server cannot be reached or keeps failing.
    """
    for attempt in range(_TRIES):
        try:
            return _fetch_http(address, size) if address.startswith("http") else _fetch_fsspec(address, size)
        except FileNotFoundError:
            raise DamagedCache(f"{address}: missing") from None
        except (OSError, http.client.HTTPException) as error:
            hopeless = isinstance(error, (PermissionError, http.client.InvalidURL))
            if attempt + 1 == _TRIES or hopeless:
                raise OSError(f"{address}: cannot be read: {error or type(error).__name__}") from None
        time.sleep(0.25 * 4**attempt)
    raise AssertionError


def _fetch_http(address: str, size: int) -> bytes:
    # An opener of these handlers only: a redirection to file: or ftp: finds nobody to follow it.
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler(),
        urllib.request.HTTPHandler(),
        urllib.request.HTTPSHandler(),
        urllib.request.HTTPDefaultErrorHandler(),
        urllib.request.HTTPRedirectHandler(),
        urllib.request.HTTPErrorProcessor(),
        urllib.request.UnknownHandler(),
    ):
        opener.add_handler(handler)
    try:
        request = urllib.request.Request(urllib.parse.quote(address, safe=_SAFE))
        with opener.open(request, timeout=_PATIENCE) as response:
            content = response.read(size + 1)
            declared = response.headers.get("Content-Length")
    except urllib.error.HTTPError as error:
        if error.code in (404, 410):
            raise FileNotFoundError(address) from None
        if error.code < 500 and error.code not in (408, 425, 429):  # asking again changes nothing
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
        raise ValueError(f"{address}: {scheme} addresses need another package: {error}") from None
    except OSError:
        raise
    except Exception as error:  # every store has errors of its own kind
        raise OSError(f"{type(error).__name__}: {error}") from None
