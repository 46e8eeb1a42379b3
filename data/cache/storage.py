"""File access for caches: a local folder or a remote address.

This module reads only file names that this project generates, and never runs an external program. A remote shard is
fetched whole and checked against the size and sha256 in its record before it is used. It stays in memory until newer
shards need the space.
"""

import hashlib
import os
import resource
import stat
import threading
from collections import OrderedDict, deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any
from weakref import WeakSet

from data.cache.fetch import Pace, TooLarge, check_web_address, fetch
from data.json_text import parse_json
from data.shards import DamagedCache

SCHEMES = ("https", "http", "s3", "gs", "hf")
"""Schemes of remote caches. s3, gs and hf need fsspec and the package of that store."""
MEMORY = 2**29
"""Bytes of remote shards that a process keeps in memory."""
PATIENCE = 8.0
"""Seconds that a server may take for a manifest, for all records or for a codebook, beyond the time of their bytes at
`data.cache.fetch.MINIMUM_RATE`."""
SHARD_PATIENCE = 60.0
"""The same for one shard. It is longer, because an interrupted training run costs more than a cache that cannot be opened."""
_LIMIT = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
# Half of the limit leaves file descriptors to the rest of the process.
_MAX_OPEN_FILES = 2**15 if _LIMIT == resource.RLIM_INFINITY else min(_LIMIT // 2, 2**15)
_MAX_SHARD_BYTES = 2**34  # for remote shards, which are held in memory
_MAX_FILE_BYTES = 2**28  # for remote manifests and codebooks: lists of about 5 million videos
_MAX_RECORD_BYTES = 2**24  # for remote records: shards of about 150,000 videos
_SMALL_RECORD_BYTES = 2**20  # records that are fetched at the same time
_REQUESTS = 16


class Folder:
    """Files of a local folder. Shards are read with pread instead of mmap, so that resident memory stays constant."""

    def __init__(self, path: Path) -> None:
        self.address = str(path)
        self._open: OrderedDict[str, _OpenFile] = OrderedDict()
        with _LOCK:
            _FOLDERS.add(self)

    def read(self, name: str) -> bytes:
        """Read a whole file. Raises DamagedCache if it is missing."""
        return b"".join(self.chunks(name))

    def read_records(self, names: Iterable[str]) -> Generator[bytes | bytearray]:
        """Read whole files one after another, in order."""
        for name in names:
            yield self.read(name)

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
        parts = []
        for name, offset in zip(names, offsets, strict=True):
            # The local reference keeps the file open if another thread drops it from self._open.
            file = self._open.get(name) or self._opened(name)
            parts.append(os.pread(file.descriptor, size, offset))
        return parts

    def chunks(self, name: str) -> Iterator[bytes]:
        """Read a whole file piece by piece."""
        file = _OpenFile(self.address, name)
        while chunk := os.read(file.descriptor, 2**20):
            yield chunk

    def _opened(self, name: str) -> "_OpenFile":
        """Open a file and keep it open. Beyond `_MAX_OPEN_FILES` of all folders, drop the oldest of the folder with most."""
        file = _OpenFile(self.address, name)
        with _LOCK:
            self._open[name] = file
            while sum(len(folder._open) for folder in _FOLDERS) > _MAX_OPEN_FILES:
                max(_FOLDERS, key=lambda folder: len(folder._open))._open.popitem(last=False)
        return file

    # Data workers that are not forked receive the folder by pickle, without open files.
    def __reduce__(self) -> tuple[type["Folder"], tuple[Path]]:
        return Folder, (Path(self.address),)


_FOLDERS: WeakSet[Folder] = WeakSet()
"""All folders of this process, which share the limit of open files."""
_LOCK = threading.Lock()


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
        self._shards: OrderedDict[str, bytearray] = OrderedDict()

    def read(self, name: str) -> bytearray:
        return fetch(f"{self.address}/{name}", _MAX_FILE_BYTES, Pace(PATIENCE))

    def read_records(self, names: Iterable[str]) -> Generator[bytes | bytearray]:
        """Fetch files in order. Threads hide the latency of small ones; a larger one is fetched alone, which bounds memory."""
        pace = Pace(PATIENCE)
        waiting: deque[tuple[str, Future[bytearray]]] = deque()

        def first() -> bytearray:
            address, small = waiting.popleft()
            try:
                return small.result()
            except TooLarge:
                return fetch(address, _MAX_RECORD_BYTES, pace)

        pool = ThreadPoolExecutor(_REQUESTS)
        try:
            for name in names:
                address = f"{self.address}/{name}"
                waiting.append((address, pool.submit(fetch, address, _SMALL_RECORD_BYTES, pace)))
                if len(waiting) == _REQUESTS:
                    yield first()
            while waiting:
                yield first()
        finally:
            pool.shutdown(cancel_futures=True)

    def check_size(self, name: str, size: int, sha256: str) -> None:
        """Store size and sha256 of a shard, for the check after its download."""
        self._expected[name] = (size, sha256)

    def parts(self, names: Iterable[str], offsets: Iterable[int], size: int) -> list[bytes]:
        places = list(zip(names, offsets, strict=True))
        # Sorted, so that each shard is fetched at most once even if only one fits into memory.
        content = {(name, offset): self._part(name, offset, size) for name, offset in sorted(set(places))}
        return [content[place] for place in places]

    def chunks(self, name: str) -> Iterator[bytearray]:
        yield self._shard(name)

    def _part(self, name: str, offset: int, size: int) -> bytes:
        return bytes(memoryview(self._shard(name))[offset : offset + size])

    def _shard(self, name: str) -> bytearray:
        """Return the content of a shard, from memory or fetched and checked."""
        if name not in self._shards:
            where, (size, sha256) = f"{self.address}/{name}", self._expected[name]
            if size > _MAX_SHARD_BYTES:
                raise DamagedCache(f"{where}: has {size} bytes in its record, at most {_MAX_SHARD_BYTES} are allowed")
            content = fetch(where, size, Pace(SHARD_PATIENCE))
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
    """Return the files of a folder or of a remote address.

    Raises ValueError if the scheme, in upper or lower case, is not in `SCHEMES`, or a web address has no valid host.
    """
    text = str(address)
    if not is_address(text):
        return Folder(Path(address))
    scheme = text.partition(":")[0].lower()
    if scheme not in SCHEMES:
        raise ValueError(f"{text}: unsupported scheme {scheme!r}, expected one of {', '.join(SCHEMES)}")
    address = f"{scheme}{text[len(scheme) :].rstrip('/')}"
    if scheme in ("http", "https"):
        check_web_address(address)
        # A server never receives a fragment.
        if "#" in address:
            raise ValueError(f"{text}: an address with a fragment (#) is not supported")
    return Remote(address)


def is_address(name: str) -> bool:
    """Return whether a name is an address. This includes webdataset's `pipe:` (a shell command), which `open_files` refuses."""
    return "://" in name or name.startswith("pipe:")


def json_object(content: bytes | bytearray, where: str) -> dict[str, Any]:
    """Parse JSON text that must be an object, such as a file or one line of a .jsonl file.

    Raises ValueError if the text is not JSON, is nested too deeply, would take too much memory, or is not an object. The message
    starts with `where`.
    """
    try:
        value = parse_json(content)
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
