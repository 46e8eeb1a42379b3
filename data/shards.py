"""Shards: webdataset tars written atomically and byte for byte alike, read by offset and without running anything.

    000000.tar    samples in the order of the video list; <id>.codes.npy, <id>.json and, if pixels are kept, more
                  members per sample
    000000.json   the shard's record: bytes and sha256 of the tar, and per sample its facts and the offset, size and
                  crc32 of each member

A shard exists once its record does: the tar is written under another name, flushed, hashed, renamed; the record last.
"""

import functools
import hashlib
import io
import json
import mmap
import os
import platform
import time
import zlib
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import psutil
import webdataset


class DamagedCache(ValueError):
    """A file of a cache is missing or not what its record says."""


def sample_id(path: str) -> str:
    """Name of a video's sample. A hash, because webdataset cuts names at their first dot and paths hold anything."""
    return hashlib.sha256(os.fsencode(path)).hexdigest()[:16]


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file at once or not at all."""
    text = json.dumps(content, sort_keys=True, indent=1, allow_nan=False) + "\n"
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file at once or not at all."""
    temporary = path.with_name(path.name + _temporary())
    with open(temporary, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def _temporary() -> str:
    """Ending of a file that this process is writing."""
    return f".tmp-{platform.node()}-{os.getpid()}"


def remove_left_overs(folder: Path) -> None:
    """Delete what killed processes of this machine were writing, and what is a day old."""
    for path in folder.glob("*.tmp-*-*"):
        machine, _, process = path.name.partition(".tmp-")[2].rpartition("-")
        dead = machine == platform.node() and process.isdigit() and not psutil.pid_exists(int(process))
        if dead or time.time() - path.stat().st_mtime > 86_400:
            path.unlink(missing_ok=True)


class ShardWriter:
    """Writes one shard; leaving the `with` block without `commit` leaves nothing behind."""

    def __init__(self, folder: Path, number: int) -> None:
        self.tar = folder / f"{number:06d}.tar"
        self.record = self.tar.with_suffix(".json")
        self._temporary = self.tar.with_name(self.tar.name + _temporary())
        self._samples: list[dict] = []
        self._position = 0
        self._committed = False

    def __enter__(self) -> "ShardWriter":
        self._file = open(self._temporary, "wb")  # noqa: SIM115 - closed in __exit__
        self._writer = webdataset.TarWriter(self._file, encoder=False, mtime=0)
        return self

    def add(self, key: str, members: Mapping[str, bytes], facts: Mapping[str, Any]) -> None:
        """Append a sample: its members by extension, and what the record says of it."""
        places = {}
        for extension in sorted(members):  # the writer's own order
            content = members[extension]
            places[extension] = [self._position + 512, len(content), zlib.crc32(content)]
            self._position += 512 + -(-len(content) // 512) * 512
        self._writer.write({"__key__": key, **members})
        self._samples.append({"id": key, **facts, "members": places})

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._committed:
            return
        try:
            self._writer.close()
            self._file.close()
        except OSError:  # the disk is full: what matters has been raised already
            pass
        finally:
            self._temporary.unlink(missing_ok=True)

    def commit(self, **facts: Any) -> None:
        """Finish the tar and write its record, with `facts` of the whole shard."""
        self._writer.close()
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        content = self._temporary.read_bytes()
        os.replace(self._temporary, self.tar)
        self._committed = True
        digest = hashlib.sha256(content).hexdigest()
        write_json(self.record, {"bytes": len(content), "sha256": digest, "samples": self._samples, **facts})


class ShardReader:
    """Random access to the members of a finished shard.

    Raises:
        DamagedCache: if the record or the tar is missing, unreadable, or of the wrong size.
    """

    def __init__(self, tar: Path) -> None:
        self.tar = tar
        try:
            self.record_bytes = tar.with_suffix(".json").read_bytes()
            record = json.loads(self.record_bytes)
            self.samples: list[dict] = record["samples"]
            self.facts = {k: v for k, v in record.items() if k != "samples"}
            expected, actual = record["bytes"], tar.stat().st_size
        except FileNotFoundError as error:
            raise DamagedCache(f"{error.filename}: missing") from None
        except (ValueError, KeyError, TypeError) as error:
            raise DamagedCache(f"{tar.with_suffix('.json')}: is not a shard record ({error})") from None
        if expected != actual:
            raise DamagedCache(f"{tar}: has {actual} bytes, its record says {expected}")
        self._map: mmap.mmap | None = None

    def read(self, row: int, extension: str) -> bytes:
        """Bytes of a member, checked against its crc32.

        Raises:
            KeyError: if the sample has no such member.
            DamagedCache: if its content has changed.
        """
        offset, size, crc = self.samples[row]["members"][extension]
        content = self._mapped()[offset : offset + size]
        if len(content) != size or zlib.crc32(content) != crc:
            raise DamagedCache(f"{self.tar}: sample {self.samples[row]['id']}.{extension} is damaged")
        return content

    def verify(self) -> None:
        """Hash the whole tar.

        Raises:
            DamagedCache: if it is not the one that was written.
        """
        if hashlib.sha256(self._mapped()).hexdigest() != self.facts["sha256"]:
            raise DamagedCache(f"{self.tar}: content has changed since it was written")

    def _mapped(self) -> mmap.mmap:
        if self._map is None:
            with open(self.tar, "rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        return self._map

    def __getstate__(self) -> dict:  # for data workers that are started afresh
        return {**self.__dict__, "_map": None}


def to_npy(array: np.ndarray) -> bytes:
    """The array as a .npy file."""
    file = io.BytesIO()
    np.lib.format.write_array(file, np.ascontiguousarray(array), version=(1, 0), allow_pickle=False)
    return file.getvalue()


def from_npy(content: bytes, dtype: np.dtype, shape: tuple[int, ...]) -> np.ndarray:
    """The array of a .npy file of known type and shape; its header is compared, never trusted.

    Raises:
        DamagedCache: if the header says anything else.
    """
    header = _npy_header(np.dtype(dtype).str, shape)
    if not content.startswith(header) or len(content) != len(header) + np.dtype(dtype).itemsize * int(np.prod(shape)):
        raise DamagedCache(f"an array in the cache is not {dtype} of shape {shape}")
    return np.frombuffer(content, dtype, offset=len(header)).reshape(shape)


@functools.lru_cache(maxsize=64)
def _npy_header(dtype: str, shape: tuple[int, ...]) -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": dtype, "fortran_order": False, "shape": shape})
    return file.getvalue()
