"""TokenCache: read a finished cache.

Legend: N videos, V views of one video, B clips of a batch, t h w the grid of places, G codes of a place, T H W C pixels. With one
code per place, codes have no axis G.
"""

import hashlib
import math
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load

from data.cache.index import ClipIndex, ShardIndex, open_shards, read_manifest
from data.cache.layout import CodeLayout
from data.cache.manifest import MadeWith, refuse_malformed
from data.cache.storage import Files, Folder, open_files, read_json
from data.clip_spec import ClipSpec
from data.clips import View, recorded_views
from data.pixels import unpack_pixels
from data.schema import conform
from data.shards import DamagedCache, sample_id
from data.sources import Video

JOINED = " + "
"""Separator between the sources of a merged cache, in made_with.json."""
_TEXT = {str, type(None)}


class TokenCache:
    """A finished cache of `len(cache)` videos, opened by `TokenCache.open`.

    `address`: folder or address that was opened; `remote`: true for an address, where reading a sample fetches its whole
    shard; `name`: name of the folder; `manifest`, `spec`: see docs/cache.md; `videos`: path, size, label, group and split
    of each video that is not skipped; `views_N`: its number of views, equal for all videos unless views are dense;
    `clips`: index that reads batches; `layout`: grid, codes per place and vocabularies of the codes.
    """

    @classmethod
    def open(cls, address: str | Path, *, checksums: bool = True) -> "TokenCache":
        """Open a cache in a folder or at an https, http, s3, gs or hf address.

        This checks manifest, records and file sizes. The checksum of a clip is checked whenever the clip is read, unless
        `checksums` is False. The hash of a whole shard is checked by `verify`, and when a remote shard is fetched.

        Raises DamagedCache if this is not a finished cache or a file was changed, ValueError for an address of another
        scheme, and OSError if an address cannot be read.
        """
        files = open_files(address)
        if isinstance(files, Folder) and not Path(address, "manifest.json").exists():
            unfinished = Path(address, "plan.json").exists()
            problem = "is unfinished; run tokenize again" if unfinished else "is not a cache: manifest.json is missing"
            raise DamagedCache(f"{address}: {problem}")
        manifest = read_manifest(files)
        with refuse_malformed(f"{address}/manifest.json: is not a valid manifest"):
            return cls(files, manifest, checksums)

    def __init__(self, files: Files, manifest: dict[str, Any], checksums: bool) -> None:
        self._files, self.manifest = files, manifest
        self.address, self.remote, self.name = files.address, not isinstance(files, Folder), Path(files.address).name
        self.key: str = manifest["key"]
        self.spec: dict[str, Any] = manifest["spec"]
        self.clip = ClipSpec(**self.spec["clip"])
        self.layout = CodeLayout.of(self.spec)
        entries = manifest["shards"]
        names, records = [entry["file"] for entry in entries], [entry["record"] for entry in entries]
        self.shards = open_shards(files, names, self.spec, records)
        if [shard.entry() for shard in self.shards] != entries:
            raise ValueError("an entry of a shard differs from the shard's record")
        self.clips = ClipIndex(files, self.shards, self.spec, checksums)
        self.views_N = self.clips.views_N
        if self.clip.views != "dense" and (self.views_N != self.clip.views).any():
            raise ValueError(f"a video does not have the {self.clip.views} views of the clips")
        clips = int(self.views_N.sum())
        counts = (len(self), clips, clips * math.prod(self.layout.shape))
        if not len(self) or counts != (manifest["samples"], manifest["clips"], manifest["codes"]):
            raise ValueError("samples, clips or codes differ from the shards' records, or there are none")
        self._codebook_hash: str | None = manifest["codebook"]
        listed = list(map(_video, self.spec["videos"]))
        self.videos = [listed[i] for shard in self.shards for i in shard.video_N.tolist()]

    def __len__(self) -> int:
        return len(self.views_N)

    def _place(self, index: int) -> tuple[ShardIndex, int]:
        """Return the shard of a video and its row in that shard."""
        if not 0 <= index < len(self):
            raise IndexError(f"{self.address}: has {len(self)} videos, got index {index}")
        number = int(self.clips.shard_N[index])
        return self.shards[number], index - int(self.clips.first_row[number])

    def codes(self, index: int) -> np.ndarray:
        """Read the codes of a video, (V, t, h, w) or (V, t, h, w, G), uint16 or uint32. Raises DamagedCache if they changed."""
        shard, row = self._place(index)
        return shard.codes(row)

    def canonical(self, index: int) -> int:
        """Return the number of the view that evaluation uses, from the middle of the video."""
        return int(self.views_N[index] - 1) // 2 if self.clip.views == "dense" else 0

    def facts(self, index: int) -> dict[str, Any]:
        """Read the json member of a video: path, size, label, group, split, frames, frame rate, and its views."""
        shard, row = self._place(index)
        return shard.facts(row)

    def members(self, index: int) -> tuple[dict[str, bytes], int, bool]:
        """Return a video's members except its codes, by extension, its number of frames, and whether a clip is padded."""
        shard, row = self._place(index)
        members = {name: shard.read(row, name) for name in shard.extensions(row) if name != "codes.npy"}
        return members, int(shard.frames_N[row]), bool(shard.padded_N[row])

    def views(self, index: int) -> tuple[View, ...]:
        """Return the positions of the clips in a video."""
        return recorded_views(self.facts(index))

    def timeline(self, index: int) -> np.ndarray:
        """Return the first frame of each clip and the frame after its last, (V, 2). `facts` has the frames per second."""
        shard, row = self._place(index)
        frames = int(shard.frames_N[row])
        return np.array([(v.start, min(v.start + v.real * v.stride, frames)) for v in self.views(index)])

    def pixels(self, index: int, view: int) -> np.ndarray:
        """Read the pixels of one view, uint8 (T, H, W, 3).

        Raises ValueError if the cache was made without `--keep_pixels`, and IndexError if the video has no such view.
        """
        keep = self.spec["keep_pixels"]
        if keep == "none":
            raise ValueError(f"{self.address}: has no pixels; run tokenize with --keep_pixels raw or jpeg")
        if not 0 <= view < self.views_N[index]:
            raise IndexError(f"no such view: video {index} has {self.views_N[index]} views, got {view}")
        shard, row = self._place(index)
        return unpack_pixels(keep, lambda extension: shard.read(row, extension), self.clip, view)

    @property
    def made_with(self) -> dict[str, str]:
        """Arguments `videos` and `tokenizer` of the last tokenize run, "unknown" if made_with.json is missing."""
        made_with = self._made_with()
        return {name: str(made_with.get(name, "unknown")) for name in ("videos", "tokenizer")}

    @property
    def root(self) -> str | None:
        """Folder of the videos in the last tokenize run, see `recorded_root` of data/cache/earlier.py; None if it is unknown."""
        return self._made_with().get("root")

    def _made_with(self) -> MadeWith:
        with suppress(ValueError):  # the file is information only
            return conform(read_json(self._files, "made_with.json"), MadeWith, "made_with.json")
        return {}

    def codebook(self) -> np.ndarray | None:
        """Read the vectors of learned codebooks, (V, C): one codebook per code of a place, one after the other.

        Return None if the tokenizer has no learned codebook (FSQ, LFQ).
        Raises DamagedCache if the file is missing or was changed.
        """
        if self._codebook_hash is None:
            return None
        content, where = self._files.read("codebook.safetensors"), f"{self.address}/codebook.safetensors"
        if hashlib.sha256(content).hexdigest() != self._codebook_hash:
            raise DamagedCache(f"{where}: was changed after it was written")
        try:
            codebook_VC = load(bytes(content))["codebook_VC"]
        except (SafetensorError, KeyError, ValueError, TypeError) as error:
            raise DamagedCache(f"{where}: is not a codebook ({error})") from None
        if codebook_VC.ndim != 2 or len(codebook_VC) != sum(self.layout.vocabularies):
            expected = f"({sum(self.layout.vocabularies)}, C)"
            raise DamagedCache(f"{where}: has shape {codebook_VC.shape}, expected {expected}")
        return codebook_VC

    def verify(self) -> None:
        """Check the hashes of all shards and of the codebook. Raises DamagedCache for the first damaged sample."""
        for shard in self.shards:
            shard.verify()
        self.codebook()


def _video(row: list) -> Video:
    path, size, label, group, split = row
    # Exact types are faster than isinstance, and a list may have millions of videos.
    texts = {type(label), type(group), type(split)} <= _TEXT
    if not (texts and type(path) is str and type(size) is int and type(row) is list):
        raise ValueError(f"expected [path, size, label, group, split] of a video, got {row!r:.80}")
    return Video(path, size, label, group, split)


def find_row(cache: TokenCache, name: str) -> int:
    """Return the row of a video, given its path, its sample id, or the row. Raises ValueError if there is no such video."""
    for row, video in enumerate(cache.videos):
        if name in (video.path, sample_id(video.path)):
            return row
    if name.isdigit() and int(name) < len(cache):
        return int(name)
    for entry in cache.manifest["skipped"]:
        if entry["path"] == name:
            raise ValueError(f"{name}: was skipped: {entry['reason']}")
    raise ValueError(f"{name}: no such sample in {cache.address}")
