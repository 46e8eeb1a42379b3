"""Shards: reproducible webdataset tars, written atomically, read by offset and without executing their content.

    000000.tar    samples in the order of the video list: <id>.codes.npy, <id>.json and, if pixels are kept, more
                  members per sample
    000000.json   record of the shard: bytes and sha256 of the tar, and columns with one value per sample: its facts,
                  and the offset, size and crc32 of its members

A shard exists once its tar exists: the tar is written under a temporary name, flushed and hashed, then the record is
written, and finally the tar is renamed.
"""

import functools
import hashlib
import io
import math
import os
import zlib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from data.files import sha256_of, sync_folder, temporary_name, write_json

BLOCK = 512
"""Bytes of a tar header. Contents are padded to a multiple of this size."""


class DamagedCache(ValueError):
    """Error for a file of a cache that is missing or does not match its record."""


def sample_id(path: str) -> str:
    """Return the name of a video's sample, a hash: webdataset cuts names at the first dot, and paths may hold any bytes."""
    return hashlib.sha256(os.fsencode(path)).hexdigest()[:16]


class ShardWriter:
    """Writer of one shard, with `columns` of facts in its record. Leaving `with` without `commit` deletes the shard."""

    def __init__(self, folder: Path, number: int, columns: Sequence[str]) -> None:
        self.tar = folder / f"{number:06d}.tar"
        self._temporary = temporary_name(self.tar)
        self._columns: dict[str, list] = {name: [] for name in columns}
        self._places: dict[str, dict[str, list[int]]] = {}
        self._position = self._rows = 0
        self._committed = False

    def __enter__(self) -> "ShardWriter":
        self._file = _HashingFile(self._temporary)
        import webdataset  # imports torch

        self._writer = webdataset.TarWriter(self._file, encoder=False, mtime=0)
        return self

    def add(self, key: str, members: Mapping[str, bytes], facts: Mapping[str, Any]) -> None:
        """Append a sample with its members by extension and one fact for each column of the record."""
        # webdataset.TarWriter writes the members in this order.
        for extension in sorted(members):
            content = members[extension]
            place = self._places.setdefault(extension, {"row": [], "offset": [], "size": [], "crc": []})
            values = (self._rows, self._position + BLOCK, len(content), zlib.crc32(content))
            for column, value in zip(place.values(), values, strict=True):
                column.append(value)
            self._position += BLOCK + math.ceil(len(content) / BLOCK) * BLOCK
        self._writer.write({"__key__": key, **members})
        for name, column in self._columns.items():
            column.append(facts[name])
        self._rows += 1

    def __exit__(self, *error: object) -> None:
        if self._committed:
            return
        try:
            with suppress(OSError):  # the disk is full; the error that matters has been raised already
                self._writer.close()
                self._file.close()
        finally:
            self._temporary.unlink(missing_ok=True)

    def commit(self, **facts: Any) -> None:
        """Finish the tar and write its record, including `facts` about the whole shard."""
        self._writer.close()
        record = {"bytes": self._file.tell(), "sha256": self._file.digest.hexdigest(), **facts}
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        record |= {"samples": self._columns, "members": self._places}
        write_json(self.tar.with_suffix(".json"), {**record, "checksum": sha256_of(record)})
        os.replace(self._temporary, self.tar)
        self._committed = True
        sync_folder(self.tar.parent)


class _HashingFile(io.BufferedWriter):
    """File that is hashed while it is written."""

    def __init__(self, path: Path) -> None:
        super().__init__(io.FileIO(path, "wb"))
        self.digest = hashlib.sha256()

    def write(self, content: Any) -> int:
        self.digest.update(content)
        return super().write(content)


def to_npy(array: np.ndarray) -> bytes:
    """Encode an array as a .npy file."""
    file = io.BytesIO()
    np.lib.format.write_array(file, np.ascontiguousarray(array), version=(1, 0), allow_pickle=False)
    return file.getvalue()


def from_npy(content: bytes, dtype: np.dtype, shape: tuple[int, ...]) -> np.ndarray:
    """Decode a .npy file of known dtype and shape without parsing its header. Raises DamagedCache if dtype or shape differ."""
    header = npy_header(dtype.str, shape)
    if not content.startswith(header) or len(content) != len(header) + dtype.itemsize * int(np.prod(shape)):
        raise DamagedCache(f"an array in the cache is not {dtype} of shape {shape}")
    return np.frombuffer(content, dtype, offset=len(header)).reshape(shape)


@functools.lru_cache(maxsize=4096)
def npy_header(dtype: str, shape: tuple[int, ...]) -> bytes:
    """Return the header of a .npy file with this dtype (in NumPy's notation) and shape."""
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": dtype, "fortran_order": False, "shape": shape})
    return file.getvalue()
