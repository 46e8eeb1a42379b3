"""Index of the codes of all clips, read from the records of the shards. Every value of a record is checked before use.

Legend: N videos, V views of one video, C clips (all views of all videos), B clips of a batch, t h w the grid of places. With
several codes per place, codes have a last axis of them.
"""

import base64
import hashlib
import re
import zlib
from collections.abc import Sequence
from contextlib import closing
from typing import Any, NoReturn

import numpy as np
from xxhash import xxh3_64_digest

from data.cache.layout import CodeLayout, valid_slices
from data.cache.manifest import Facts, Manifest, refuse_malformed
from data.cache.spec import FORMAT, key_of
from data.cache.storage import Files, read_json
from data.clip_spec import ClipSpec
from data.clips import recorded_views
from data.files import sha256_of
from data.json_text import parse_json
from data.schema import conform, short
from data.shards import DamagedCache, from_npy, npy_header, sample_id

# The dense views of a video of many hours need less.
_MAX_JSON_BYTES = 2**26
# Sums of offsets must not overflow int64.
_MAX_TAR_BYTES = 2**50


def read_manifest(files: Files) -> dict[str, Any]:
    """Read a `Manifest`. Raises DamagedCache if it is missing, has another format or other fields, or was changed."""
    where = f"{files.address}/manifest.json"
    manifest = read_json(files, "manifest.json")
    checksum = manifest.pop("checksum", None)
    if manifest.get("format") != FORMAT:
        raise DamagedCache(f"{where}: format is {short(manifest.get('format'))}, expected {FORMAT!r}")
    with refuse_malformed(f"{where}: is not a valid manifest"):
        if checksum != sha256_of(manifest) or manifest.get("key") != key_of(manifest.get("spec", {})):
            raise DamagedCache(f"{where}: was changed after it was written (checksum or key differs)")
        conform(manifest, Manifest, "manifest")
    return manifest


def open_shards(
    files: Files, names: Sequence[str], preimage: dict[str, Any], records: Sequence[str] | None = None
) -> list["ShardIndex"]:
    """Open the shards of a cache, in order.

    `names`: tars; `preimage`: `CacheSpec.preimage`; `records`: expected sha256 of each record, or None to skip this check.
    Raises DamagedCache if a shard or its record is missing or invalid, or videos are repeated or out of order.
    """
    for name in names:
        if not isinstance(name, str) or not re.fullmatch(r"[0-9]{6,12}\.tar", name):
            problem = f"invalid shard name {name!r}, expected 6 to 12 digits and .tar"
            raise DamagedCache(f"{files.address}/manifest.json: {problem}")
    shards = []
    last = -1
    record_names = [f"shards/{name[:-4]}.json" for name in names]
    # A record is checked as soon as it is read, so that memory holds no more than a few.
    with closing(files.read_records(record_names)) as contents:
        for i, content in enumerate(contents):
            if records is not None and hashlib.sha256(content).hexdigest() != records[i]:
                raise DamagedCache(f"{files.address}/{record_names[i]}: sha256 differs from the manifest")
            shard = ShardIndex(files, names[i], content, preimage)
            files.check_size(shard.file, shard.bytes, shard.sha256)
            if len(shard.video_N) and (shard.video_N[0] <= last or (np.diff(shard.video_N) <= 0).any()):
                raise DamagedCache(f"{files.address}/{shard.file}: videos are repeated or out of order")
            last = int(shard.video_N[-1]) if len(shard.video_N) else last
            shards.append(shard)
    return shards


class ShardIndex:
    """Record of one shard: the videos in the tar, and the positions of their members.

    `video_N`: row of each video in the list of videos; `views_N`, `frames_N`: its numbers of clips and frames; `padded_N`: 1
    if one of its clips is padded; `start_N`: offset of its first code in bytes; `checksum_C`: xxh3 of each clip.

    Raises DamagedCache if the content is not a valid record of a shard of this cache.
    """

    def __init__(self, files: Files, name: str, record: bytes | bytearray, preimage: dict[str, Any]) -> None:
        self._files, self.name, self.file = files, name, f"shards/{name}"
        self._record = hashlib.sha256(record).hexdigest()
        self._videos = preimage["videos"]
        self._layout = CodeLayout.of(preimage)
        with refuse_malformed(f"{files.address}/{self.file[:-4]}.json: is not a shard record"):
            content = parse_json(record)
            if content.pop("checksum") != sha256_of(content):
                raise ValueError("was changed after it was written: checksum differs")
            self._read(content)

    def _read(self, record: dict[str, Any]) -> None:
        self.bytes, self.sha256 = int(record["bytes"]), str(record["sha256"])
        self.skipped: list[dict[str, str]] = record["skipped"]
        self.compared: dict[str, int] = record.get("compared", {"codes": 0, "differ": 0})
        if not 0 <= self.bytes < _MAX_TAR_BYTES:
            raise ValueError(f"a tar cannot have {self.bytes} bytes")
        samples = record["samples"]
        self.video_N, self.views_N, self.padded_N, self.frames_N = (
            _integers(samples[column]) for column in ("video", "views", "padded", "frames")
        )
        count = len(self.video_N)
        if {len(self.views_N), len(self.padded_N), len(self.frames_N)} != {count} or (self.views_N < 1).any():
            raise ValueError("columns differ in length, or a video has no view")
        if count and not 0 <= self.video_N.min() <= self.video_N.max() < len(self._videos):
            raise ValueError("refers to a video that is not in the list")
        self._members = {extension: self._member(columns, count) for extension, columns in record["members"].items()}
        self.checksum_C = np.frombuffer(base64.b64decode(record["clip_xxh3"], validate=True), "V8")
        # Python's sum, because NumPy's sum could overflow.
        if len(self.checksum_C) != sum(self.views_N.tolist()):
            raise ValueError("the number of checksums is not the number of clips")
        self.start_N = self._starts(count)

    def _member(self, columns: dict[str, list[int]], count: int) -> np.ndarray:
        """Return row, offset, size and crc32 of the members of one extension, (4, n). Raises ValueError for invalid values."""
        table = np.stack([_integers(columns[name]) for name in ("row", "offset", "size", "crc")])
        row, offset, size = table[:3]
        if (table < 0).any() or (offset > self.bytes).any() or (size > self.bytes - offset).any():
            raise ValueError("a member extends beyond the end of the tar")
        if (np.diff(row) <= 0).any() or (row >= count).any():
            raise ValueError("members are out of order")
        return table

    def _starts(self, count: int) -> np.ndarray:
        """Return the offset of the first code of each video, after the header of its .npy member."""
        if not count:
            return np.zeros(0, np.int64)
        row, offset, size, _ = self._members["codes.npy"]
        distinct, inverse_N = np.unique(self.views_N, return_inverse=True)
        layout = self._layout
        headers = [len(npy_header(layout.dtype.str, (int(views), *layout.shape))) for views in distinct]
        header_N = np.array(headers)[inverse_N]
        if len(row) != count or (size != header_N + self.views_N * layout.clip_bytes).any():
            raise ValueError("the size of codes.npy differs from the specification")
        return offset + header_N

    def entry(self) -> dict[str, Any]:
        """Return the manifest's entry of this shard."""
        checks = {"bytes": self.bytes, "sha256": self.sha256, "record": self._record}
        return {"file": self.name, "samples": len(self.video_N), **checks}

    def path(self, row: int) -> str:
        """Return the path of a video, relative to its source."""
        return self._videos[self.video_N[row]][0]

    def key(self, row: int) -> str:
        """Return the name of the sample of a video in the tar."""
        return sample_id(self.path(row))

    def extensions(self, row: int) -> list[str]:
        """Return the extensions of the members of a video."""
        return [extension for extension, table in self._members.items() if row in table[0]]

    def read(self, row: int, extension: str) -> bytes:
        """Read a member. Raises DamagedCache if its crc32 differs, or the video has no such member."""
        table = self._members.get(extension, np.zeros((4, 0), np.int64))
        i = int(np.searchsorted(table[0], row))
        if i == table.shape[1] or table[0, i] != row:
            raise DamagedCache(f"{self._sample(row)}: has no {extension}")
        _, offset, size, crc = table[:, i].tolist()
        (content,) = self._files.parts([self.file], [offset], size)
        if len(content) != size or zlib.crc32(content) != crc:
            raise DamagedCache(f"{self._sample(row)}, {extension}: is damaged")
        return content

    def codes(self, row: int) -> np.ndarray:
        """Read the codes of a video, (V, t, h, w) or (V, t, h, w, G).

        Raises DamagedCache if they changed or a code is not in its vocabulary.
        """
        layout = self._layout
        codes_Vthw = from_npy(self.read(row, "codes.npy"), layout.dtype, (int(self.views_N[row]), *layout.shape))
        if problem := layout.outside(codes_Vthw):
            raise DamagedCache(f"{self._sample(row)}: {problem}")
        return codes_Vthw

    def facts(self, row: int) -> dict[str, Any]:
        """Read the json member of a video (see `TokenCache.facts`). Raises DamagedCache if it belongs to another video."""
        with refuse_malformed(f"{self._sample(row)}: invalid json member"):
            if self._members["json"][2].max() > _MAX_JSON_BYTES:
                raise ValueError(f"larger than {_MAX_JSON_BYTES} bytes")
            facts = conform(parse_json(self.read(row, "json")), Facts, "facts")
            if facts["rate"] is not None and facts["rate"] <= 0:
                raise ValueError(f"rate is {facts['rate']}, expected frames per second above 0")
            if facts["path"] != self.path(row) or len(recorded_views(facts)) != self.views_N[row]:
                raise ValueError("describes another video")
        return facts

    def damage(self) -> list[str]:
        """Hash the whole tar and return one line for each damaged sample, or an empty list if nothing has changed."""
        digest = hashlib.sha256()
        try:
            for chunk in self._files.chunks(self.file):
                digest.update(chunk)
        except DamagedCache as error:
            return [str(error)]
        if digest.hexdigest() == self.sha256:
            return []
        lines = []
        for row in range(len(self.video_N)):
            try:
                for extension in self.extensions(row):
                    self.read(row, extension)
            except DamagedCache as error:
                lines.append(str(error))
        return lines or [f"{self._files.address}/{self.file}: has changed outside its samples"]

    def verify(self) -> None:
        """Hash the whole tar. Raises DamagedCache for the first damaged sample."""
        if lines := self.damage():
            raise DamagedCache(lines[0])

    def _sample(self, row: int) -> str:
        """Return tar, sample and video for messages."""
        return f"{self._files.address}/{self.file}: sample {self.key(row)} ({self.path(row)})"


class ClipIndex:
    """Offsets and checksums of all clips of a cache. It omits the list of videos, so that sending it to workers is cheap.

    `shard_N`: shard of each video; `views_N`: its number of clips; `first_row`: number of videos before each shard.
    """

    def __init__(self, files: Files, shards: Sequence[ShardIndex], preimage: dict[str, Any], checksums: bool) -> None:
        self._files, self._checksums = files, checksums
        self._names = [shard.file for shard in shards]
        self._layout = CodeLayout.of(preimage)
        self._clip = ClipSpec(**preimage["clip"])
        sizes = [len(shard.video_N) for shard in shards]
        self.shard_N = np.repeat(np.arange(len(shards)), sizes)
        self.first_row = np.cumsum(sizes) - sizes
        self.views_N = np.concatenate([shard.views_N for shard in shards])
        self._frames_N = np.concatenate([shard.frames_N for shard in shards])
        self._start_N = np.concatenate([shard.start_N for shard in shards])
        self._first_N = np.cumsum(self.views_N) - self.views_N
        self._checksum_C = np.concatenate([shard.checksum_C for shard in shards])

    def slices(self, rows_B: np.ndarray, views_B: np.ndarray) -> np.ndarray:
        """Return the number of time slices with valid frames, (B,). Later slices contain only padding."""
        clip, slices = self._clip, self._layout.grid[0]
        earlier_B = views_B * clip.frames if clip.views == "dense" else 0
        frames_B = np.clip((self._frames_N[rows_B] - 1) // clip.stride + 1 - earlier_B, 1, clip.frames)
        return valid_slices(frames_B, clip.frames, slices)

    def gather(self, rows_B: np.ndarray, views_B: np.ndarray) -> np.ndarray:
        """Read one view of each video of a batch: codes (B, t, h, w) or (B, t, h, w, G) in the dtype of the cache, writable.

        Raises IndexError if a video has no such view, and DamagedCache if a checksum differs or a code is not in its vocabulary.
        """
        missing_B = (views_B < 0) | (views_B >= self.views_N[rows_B])
        if missing_B.any():
            i = int(missing_B.argmax())
            raise IndexError(f"no such view: video {rows_B[i]} has {self.views_N[rows_B[i]]} views, got {views_B[i]}")
        layout, size = self._layout, self._layout.clip_bytes
        offsets = (self._start_N[rows_B] + views_B * size).tolist()
        clips = self._files.parts([self._names[shard] for shard in self.shard_N[rows_B].tolist()], offsets, size)
        # A bytearray, because torch.from_numpy needs writable memory.
        content = bytearray().join(clips)
        if self._checksums:
            expected_B = self._checksum_C[self._first_N[rows_B] + views_B]
            checksums = [xxh3_64_digest(clip) for clip in clips]
            if b"".join(checksums) != expected_B.tobytes():
                self._refuse(rows_B, views_B, np.array(checksums, "V8") != expected_B)
        if len(content) != size * len(rows_B):
            self._refuse(rows_B, views_B, np.array([len(clip) != size for clip in clips]))
        codes_Bthw = np.frombuffer(content, layout.dtype).reshape(len(rows_B), *layout.shape)
        if layout.outside(codes_Bthw):
            self._refuse(rows_B, views_B, np.array([layout.outside(codes_thw) is not None for codes_thw in codes_Bthw]))
        return codes_Bthw

    def _refuse(self, rows_B: np.ndarray, views_B: np.ndarray, damaged_B: np.ndarray) -> NoReturn:
        """Raise DamagedCache for the first damaged clip."""
        i = int(damaged_B.argmax())
        row, view = int(rows_B[i]), int(views_B[i])
        where = f"{self._files.address}/{self._names[self.shard_N[row]]}"
        raise DamagedCache(f"{where}: view {view} of video {row} is damaged; see `python -m data.cache verify`")


def _integers(values: Any) -> np.ndarray:
    """Convert a list of integers to int64."""
    array = np.array(values)
    if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
        raise ValueError("a column is not a list of integers")
    return array.astype(np.int64)
