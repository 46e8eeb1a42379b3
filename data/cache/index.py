"""Where every clip's codes lie, read from the shards' records. Nothing in a record is believed before it was checked.

Legend: N videos, V views of one video, C clips (all views of all videos), B clips of a batch, t h w the grid of codes.
"""

import base64
import hashlib
import json
import re
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from xxhash import xxh3_64_digest

from data.cache.spec import FORMAT, code_dtype, key_of
from data.cache.storage import Files, Folder, read_json
from data.clips import ClipSpec, recorded_views
from data.files import sha256_of
from data.shards import DamagedCache, from_npy, npy_header, sample_id

MALFORMED = (KeyError, TypeError, ValueError, AttributeError, OverflowError, RecursionError, IndexError)
"""What comes of JSON that is not what it should be."""


def read_manifest(files: Files) -> dict[str, Any]:
    """The manifest of a finished cache, as it was written.

    Raises:
        DamagedCache: if it is missing, of another format, or was changed.
    """
    where = f"{files.address}/manifest.json"
    manifest = read_json(files, "manifest.json")
    checksum = manifest.pop("checksum", None)
    if manifest.get("format") != FORMAT:
        raise DamagedCache(f"{where}: format {manifest.get('format')!r} is not {FORMAT}")
    if checksum != sha256_of(manifest) or manifest.get("key") != key_of(manifest.get("spec", {})):
        raise DamagedCache(f"{where}: was changed after it was written; its checksum does not fit")
    return manifest


def open_shards(
    files: Files, names: Sequence[str], preimage: dict[str, Any], records: Sequence[str] | None = None
) -> list["ShardIndex"]:
    """The shards of a cache, in order; `records` are the sha256 that their records must have.

    Raises:
        DamagedCache: if one is missing, is not what it should be, or holds a video that is in another too.
    """
    for name in names:
        if not isinstance(name, str) or not re.fullmatch(r"\d{6,12}\.tar", name):
            raise DamagedCache(f"{files.address}/manifest.json: {name!r} is no name of a shard")
    records_of = [f"shards/{name[:-4]}.json" for name in names]
    if isinstance(files, Folder):
        contents = list(map(files.read, records_of))
    else:  # behind an address every record costs a journey
        with ThreadPoolExecutor(16) as pool:
            contents = list(pool.map(files.read, records_of))
    shards = []
    last = -1
    for i, (name, content) in enumerate(zip(names, contents, strict=True)):
        if records is not None and hashlib.sha256(content).hexdigest() != records[i]:
            raise DamagedCache(f"{files.address}/shards/{name[:-4]}.json: is not the record that the manifest names")
        shard = ShardIndex(files, name, content, preimage)
        files.check_size(shard.file, shard.bytes, shard.sha256)
        if len(shard.video_N) and (shard.video_N[0] <= last or (np.diff(shard.video_N) <= 0).any()):
            raise DamagedCache(f"{files.address}/{shard.file}: holds a video twice or out of order")
        last = int(shard.video_N[-1]) if len(shard.video_N) else last
        shards.append(shard)
    return shards


class ShardIndex:
    """The record of one shard.

    Raises:
        DamagedCache: if it cannot be the record of a shard of this cache.
    """

    def __init__(self, files: Files, name: str, record: bytes, preimage: dict[str, Any]) -> None:
        self._files, self.name, self.file = files, name, f"shards/{name}"
        self._record = hashlib.sha256(record).hexdigest()
        self._videos = preimage["videos"]
        self._shape = tuple(preimage["codes_shape"])
        self._vocab_size = preimage["vocab_size"]
        self._dtype = code_dtype(self._vocab_size)
        try:
            content = json.loads(record)
            if content.pop("checksum") != sha256_of(content):
                raise ValueError("was changed after it was written")
            self._read(content)
        except MALFORMED as error:
            where = f"{files.address}/{self.file[:-4]}.json"
            raise DamagedCache(f"{where}: is not a shard record ({type(error).__name__}: {error})") from None

    def _read(self, record: dict[str, Any]) -> None:
        self.bytes, self.sha256, self.skipped = int(record["bytes"]), str(record["sha256"]), record["skipped"]
        self.compared: dict[str, int] = record.get("compared", {"codes": 0, "differ": 0})
        if not 0 <= self.bytes < 2**50:
            raise ValueError("a shard is not as large as that")
        samples = record["samples"]
        self.video_N, self.views_N, self.padded_N, self.frames_N = (
            _whole_numbers(samples[column]) for column in ("video", "views", "padded", "frames")
        )
        count = len(self.video_N)
        if {len(self.views_N), len(self.padded_N), len(self.frames_N)} != {count} or (self.views_N < 1).any():
            raise ValueError("columns differ in length")
        if count and not 0 <= self.video_N.min() <= self.video_N.max() < len(self._videos):
            raise ValueError("names a video that is not in the list")
        self._places = {extension: self._place(place, count) for extension, place in record["members"].items()}
        self.checksum_C = np.frombuffer(base64.b64decode(record["clip_xxh3"], validate=True), "V8")
        if len(self.checksum_C) != sum(self.views_N.tolist()):  # Python's sum does not overflow
            raise ValueError("has not one checksum for each clip")
        self.start_N = self._starts(count)

    def _place(self, place: dict[str, list[int]], count: int) -> np.ndarray:
        """Row, offset, size and crc32 of each member, (4, n), all inside the tar."""
        table = np.stack([_whole_numbers(place[column]) for column in ("row", "offset", "size", "crc")])
        row, offset, size = table[:3]
        if (table < 0).any() or (offset > self.bytes).any() or (size > self.bytes - offset).any():
            raise ValueError("a member reaches beyond the shard")
        if (np.diff(row) <= 0).any() or (row >= count).any():
            raise ValueError("members are out of order")
        return table

    def _starts(self, count: int) -> np.ndarray:
        """Offset of the first code of each video."""
        if not count:
            return np.zeros(0, np.int64)
        row, offset, size, _ = self._places["codes.npy"]
        distinct, which = np.unique(self.views_N, return_inverse=True)
        headers = np.array([len(npy_header(self._dtype.str, (int(views), *self._shape))) for views in distinct])[which]
        if len(row) != count or (size != headers + self.views_N * self.clip_bytes).any():
            raise ValueError("codes are not of the size that the specification says")
        return offset + headers

    @property
    def clip_bytes(self) -> int:
        return self._dtype.itemsize * int(np.prod(self._shape))

    def entry(self) -> dict[str, Any]:
        """What the manifest says of the shard."""
        whole = {"bytes": self.bytes, "sha256": self.sha256, "record": self._record}
        return {"file": self.name, "samples": len(self.video_N), **whole}

    def path(self, row: int) -> str:
        """Of the video, as the source names it."""
        return self._videos[self.video_N[row]][0]

    def key(self, row: int) -> str:
        """Name of the sample in the tar."""
        return sample_id(self.path(row))

    def extensions(self, row: int) -> list[str]:
        """Of the members that a video has."""
        return [extension for extension, place in self._places.items() if row in place[0]]

    def read(self, row: int, extension: str) -> bytes:
        """Bytes of a member, checked against its crc32.

        Raises:
            DamagedCache: if its content has changed, or there is no such member.
        """
        table = self._places.get(extension, np.zeros((4, 0), np.int64))
        i = int(np.searchsorted(table[0], row))
        if i == table.shape[1] or table[0, i] != row:
            raise DamagedCache(f"{self._files.address}/{self.file}: {self._named(row)}: has no {extension}")
        _, offset, size, crc = table[:, i].tolist()
        content = self._files.part(self.file, offset, size)
        if len(content) != size or zlib.crc32(content) != crc:
            raise DamagedCache(f"{self._files.address}/{self.file}: {self._named(row)}, {extension}: is damaged")
        return content

    def codes(self, row: int) -> np.ndarray:
        """Codes of all views of a video, (V, t, h, w).

        Raises:
            DamagedCache: if they fail their checksum or leave the vocabulary.
        """
        codes_Vthw = from_npy(self.read(row, "codes.npy"), self._dtype, (int(self.views_N[row]), *self._shape))
        if codes_Vthw.max() >= self._vocab_size:
            raise DamagedCache(f"{self._files.address}/{self.file}: {self._named(row)}: a code beyond the vocabulary")
        return codes_Vthw

    def facts(self, row: int) -> dict[str, Any]:
        """What is said of a video: path, label, group, split, number of frames and their rate, and its views.

        Raises:
            DamagedCache: if it is not that.
        """
        try:
            if self._places["json"][2].max() > 2**26:
                raise ValueError("it is too long")
            facts = json.loads(self.read(row, "json"))
            if facts["path"] != self.path(row) or len(recorded_views(facts)) != self.views_N[row]:
                raise ValueError("it speaks of another video")
        except DamagedCache:
            raise
        except MALFORMED as error:
            where = f"{self._files.address}/{self.file}: {self._named(row)}"
            raise DamagedCache(f"{where}: is not described ({type(error).__name__}: {error})") from None
        return facts

    def damage(self) -> list[str]:
        """One line for each damaged sample; none if the tar is the one that was written."""
        digest = hashlib.sha256()
        try:
            for chunk in self._files.chunks(self.file):
                digest.update(chunk)
        except DamagedCache as error:
            return [str(error)]
        if digest.hexdigest() == self.sha256:
            return []
        where = f"{self._files.address}/{self.file}"
        lines = []
        for row in range(len(self.video_N)):
            try:
                for extension in self.extensions(row):
                    self.read(row, extension)
            except DamagedCache as error:
                lines.append(str(error))
        return lines or [f"{where}: content has changed since it was written, outside its samples"]

    def verify(self) -> None:
        """Hash the whole tar.

        Raises:
            DamagedCache: for the first damaged sample.
        """
        for line in self.damage():
            raise DamagedCache(line)

    def _named(self, row: int) -> str:
        return f"sample {self.key(row)} ({self.path(row)})"


class ClipIndex:
    """All clips of a cache; light enough to be sent to data workers."""

    def __init__(self, files: Files, shards: Sequence[ShardIndex], preimage: dict[str, Any], checksums: bool) -> None:
        self._files, self._checked = files, checksums
        self._names = [shard.file for shard in shards]
        self._shape = tuple(preimage["codes_shape"])
        self._vocab_size = preimage["vocab_size"]
        self._dtype = code_dtype(self._vocab_size)
        self._clip = ClipSpec(**preimage["clip"])
        self._clip_bytes = self._dtype.itemsize * int(np.prod(self._shape))
        sizes = [len(shard.video_N) for shard in shards]
        self.shard_N = np.repeat(np.arange(len(shards)), sizes)
        self.before = np.cumsum(sizes) - sizes
        self.views_N = np.concatenate([shard.views_N for shard in shards])
        self._frames_N = np.concatenate([shard.frames_N for shard in shards])
        self._start_N = np.concatenate([shard.start_N for shard in shards])
        self._first_N = np.cumsum(self.views_N) - self.views_N
        self._checksum_C = np.concatenate([shard.checksum_C for shard in shards])

    def slices(self, rows_B: np.ndarray, views_B: np.ndarray) -> np.ndarray:
        """Slices of time with codes of frames that the video has, (B,); those behind them repeat its last frame."""
        clip, slices = self._clip, self._shape[0]
        before = views_B * clip.frames if clip.views == "dense" else 0
        frames_B = np.clip((self._frames_N[rows_B] - 1) // clip.stride + 1 - before, 1, clip.frames)
        if _causal(clip.frames, slices):
            return 1 + -(-(frames_B - 1) * (slices - 1) // max(1, clip.frames - 1))
        return -(-frames_B * slices // clip.frames)

    def gather(self, rows_B: np.ndarray, views_B: np.ndarray) -> np.ndarray:
        """Codes of one view each of some videos, (B, t, h, w), in the type that the cache has.

        Raises:
            IndexError: if a video has no such view.
            DamagedCache: if a clip fails its checksum or leaves the vocabulary.
        """
        if ((views_B < 0) | (views_B >= self.views_N[rows_B])).any():
            raise IndexError("no such view")
        size = self._clip_bytes
        offsets = (self._start_N[rows_B] + views_B * size).tolist()
        clips = self._files.parts([self._names[shard] for shard in self.shard_N[rows_B].tolist()], offsets, size)
        content = bytearray().join(clips)  # tensors want memory that can be written to
        if self._checked:
            expected = self._checksum_C[self._first_N[rows_B] + views_B]
            if b"".join(map(xxh3_64_digest, clips)) != expected.tobytes():
                good = [
                    xxh3_64_digest(clip) == checksum.tobytes() for clip, checksum in zip(clips, expected, strict=True)
                ]
                self._refuse(rows_B, views_B, good)
        if len(content) != size * len(rows_B):
            self._refuse(rows_B, views_B, [len(clip) == size for clip in clips])
        codes_Bthw = np.frombuffer(content, self._dtype).reshape(len(rows_B), *self._shape)
        if codes_Bthw.size and codes_Bthw.max() >= self._vocab_size:
            good = codes_Bthw.reshape(len(rows_B), -1).max(1) < self._vocab_size
            self._refuse(rows_B, views_B, good.tolist())
        return codes_Bthw

    def _refuse(self, rows_B: np.ndarray, views_B: np.ndarray, good: list[bool]) -> None:
        i = good.index(False)
        row, view = int(rows_B[i]), int(views_B[i])
        where = f"{self._files.address}/{self._names[self.shard_N[row]]}"
        raise DamagedCache(f"{where}: view {view} of video {row} is damaged; `python -m data.cache verify` names it")


def _causal(frames: int, slices: int) -> bool:
    """Whether the first frame has a slice of its own, and the others one for so many frames as a power of two."""
    if frames % slices:
        return True
    stride, rest = divmod(frames - 1, max(1, slices - 1))
    return slices > 1 and rest == 0 and stride.bit_count() == 1


def _whole_numbers(values: Any) -> np.ndarray:
    """A list of integers as int64."""
    array = np.array(values)
    if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
        raise ValueError("a column does not hold whole numbers")
    return array.astype(np.int64)
