"""TokenCache: a finished cache, open for reading.

Legend: N videos, V views of one video, B clips of a batch, t h w the grid of codes, T H W C pixels.
"""

import hashlib
import math
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load

from data.cache.index import MALFORMED, ClipIndex, ShardIndex, open_shards, read_manifest
from data.cache.storage import Files, Folder, open_files, read_json
from data.clips import ClipSpec, View, recorded_views
from data.pixels import unpack_pixels
from data.shards import DamagedCache, sample_id
from data.sources import Video

JOINED = " + "
"""Between the names of several sources, of a cache that was merged."""


class TokenCache:
    """A finished cache: `len(cache)` videos, `cache.codes(i)` of each. Made by `TokenCache.open`."""

    @classmethod
    def open(cls, address: str | Path, *, checksums: bool = True) -> "TokenCache":
        """Open a cache in a folder, or behind an https, http, s3, gs or hf address.

        Manifest, records and sizes are checked here, the checksum of a clip whenever it is read (unless `checksums` is False),
        whole shards by `verify`, and when they are fetched from an address.

        Raises:
            DamagedCache: if it is no finished cache, or anything in it was changed.
            ValueError: for an address of another scheme.
            OSError: if an address cannot be reached.
        """
        files = open_files(address)
        if isinstance(files, Folder) and not Path(address, "manifest.json").exists():
            unfinished = Path(address, "plan.json").exists()
            what = "is unfinished; run tokenize again" if unfinished else "is no cache: no manifest.json"
            raise DamagedCache(f"{address}: {what}")
        manifest = read_manifest(files)
        try:
            return cls(files, manifest, checksums)
        except MALFORMED as error:
            if isinstance(error, DamagedCache):
                raise
            raise DamagedCache(f"{address}/manifest.json: is no manifest ({type(error).__name__}: {error})") from None

    def __init__(self, files: Files, manifest: dict[str, Any], checksums: bool) -> None:
        self._files, self.manifest = files, manifest
        self.key: str = manifest["key"]
        self.spec: dict[str, Any] = manifest["spec"]
        self.clip = ClipSpec(**self.spec["clip"])
        self.vocab_size: int = self.spec["vocab_size"]
        t, h, w = self.spec["codes_shape"]
        self.codes_shape: tuple[int, int, int] = (t, h, w)
        if not all(isinstance(n, int) and 0 < n < 2**32 for n in (t, h, w, self.vocab_size)) or t * h * w > 2**32:
            raise ValueError("the grid of codes is none")
        if self.spec["keep_pixels"] not in ("none", "raw", "jpeg") or not isinstance(self.spec["tokenizer"], str):
            raise ValueError("the specification is none")
        self.levels = None if self.spec["levels"] is None else tuple(self.spec["levels"])
        if self.levels is not None and math.prod(map(int, self.levels)) != self.vocab_size:
            raise ValueError("the levels of its codes do not make its vocabulary")
        entries = manifest["shards"]
        names, records = [entry["file"] for entry in entries], [entry["record"] for entry in entries]
        self.shards = open_shards(files, names, self.spec, records)
        if [shard.entry() for shard in self.shards] != entries:
            raise ValueError("does not say of its shards what they say of themselves")
        self.clips = ClipIndex(files, self.shards, self.spec, checksums)
        if not len(self) or (len(self), int(self.views_N.sum())) != (manifest["samples"], manifest["clips"]):
            raise ValueError("does not hold as many videos as it says")
        self._codebook_hash: str | None = manifest["codebook"]
        self.videos = [_video(self.spec["videos"][i]) for shard in self.shards for i in shard.video_N.tolist()]

    @property
    def address(self) -> str:
        """Folder or address, as it was opened."""
        return self._files.address

    @property
    def remote(self) -> bool:
        """Whether it is behind an address, so that reading a sample fetches its whole shard."""
        return not isinstance(self._files, Folder)

    @property
    def name(self) -> str:
        return Path(self.address).name

    def __len__(self) -> int:
        return len(self.clips.views_N)

    def _place(self, index: int) -> tuple[ShardIndex, int]:
        """The shard of a video and its row there."""
        if not 0 <= index < len(self):
            raise IndexError(f"{self.address} has no video {index}")
        number = int(self.clips.shard_N[index])
        return self.shards[number], index - int(self.clips.before[number])

    @property
    def views_N(self) -> np.ndarray:  # noqa: N802
        """How many views each video has: the same number of all, unless `--clip.views dense`."""
        return self.clips.views_N

    def codes(self, index: int) -> np.ndarray:
        """Codes of all views of a video, (V, t, h, w).

        Raises:
            DamagedCache: if they fail their checksum or leave the vocabulary.
        """
        shard, row = self._place(index)
        return shard.codes(row)

    def canonical(self, index: int) -> int:
        """The view that stands for a video in evaluation: its middle."""
        return int(self.views_N[index] - 1) // 2 if self.clip.views == "dense" else 0

    def facts(self, index: int) -> dict[str, Any]:
        """What is known of a video: path, label, group, split, number of frames and their rate, and its views."""
        shard, row = self._place(index)
        return shard.facts(row)

    def members(self, index: int) -> tuple[dict[str, bytes], int, bool]:
        """All that is kept of a video besides its codes, each checked; its number of frames; whether a clip is padded."""
        shard, row = self._place(index)
        members = {name: shard.read(row, name) for name in shard.extensions(row) if name != "codes.npy"}
        return members, int(shard.frames_N[row]), bool(shard.padded_N[row])

    def views(self, index: int) -> tuple[View, ...]:
        """Where the clips of a video were cut."""
        return recorded_views(self.facts(index))

    def timeline(self, index: int) -> np.ndarray:
        """What each clip covers: its first frame and the first behind it, in frames of the video, (V, 2).

        Divided by the `rate` of `facts` these are seconds.
        """
        shard, row = self._place(index)
        frames = int(shard.frames_N[row])
        return np.array([(v.start, min(v.start + v.real * v.stride, frames)) for v in self.views(index)])

    def pixels(self, index: int, view: int) -> np.ndarray:
        """Pixels of one view, uint8 (T, H, W, 3).

        Raises:
            ValueError: if the cache was made without `--keep_pixels`.
            IndexError: if the video has no such view.
        """
        keep = self.spec["keep_pixels"]
        if keep == "none":
            raise ValueError(f"{self.address}: holds no pixels; make it with --keep_pixels raw or jpeg")
        if not 0 <= view < self.views_N[index]:
            raise IndexError("no such view")
        shard, row = self._place(index)
        return unpack_pixels(keep, lambda extension: shard.read(row, extension), self.clip, view)

    @property
    def made_with(self) -> dict[str, str]:
        """Where `videos` and `tokenizer` were found the last time, as they were named on the command line."""
        try:
            made_with = read_json(self._files, "made_with.json")
        except DamagedCache:  # no content: a cache is whole without it
            made_with = {}
        return {name: str(made_with.get(name, "unknown")) for name in ("videos", "tokenizer")}

    def codebook(self) -> np.ndarray | None:
        """Vectors of a learned codebook, (vocab_size, C); None if codes are made of digits.

        Raises:
            DamagedCache: if they are missing or were changed.
        """
        if self._codebook_hash is None:
            return None
        content = self._files.read("codebook.safetensors")
        if hashlib.sha256(content).hexdigest() != self._codebook_hash:
            raise DamagedCache(f"{self.address}/codebook.safetensors: was changed")
        try:
            codebook_VC = load(content)["codebook_VC"]
        except (SafetensorError, KeyError, ValueError, TypeError) as error:
            raise DamagedCache(f"{self.address}/codebook.safetensors: holds no codebook ({error})") from None
        if codebook_VC.ndim != 2 or len(codebook_VC) != self.vocab_size:
            raise DamagedCache(f"{self.address}/codebook.safetensors: is not of the shape (vocabulary, width)")
        return codebook_VC

    def verify(self) -> None:
        """Hash all shards.

        Raises:
            DamagedCache: for the first damaged sample.
        """
        for shard in self.shards:
            shard.verify()
        self.codebook()


def _video(row: list) -> Video:
    path, size, label, group, split = row
    # By hand, for there may be millions.
    texts = (label is None or type(label) is str) and (group is None or type(group) is str)
    if not (texts and (split is None or type(split) is str) and type(path) is str and type(size) is int):
        raise ValueError("a video of the list is none")
    if type(row) is not list:
        raise ValueError("a video of the list is none")
    return Video(path, size, label, group, split)


def find_row(cache: TokenCache, wanted: str) -> int:
    """The row of a video named by its path, its sample's id, or the row itself.

    Raises:
        ValueError: if there is none.
    """
    for row, video in enumerate(cache.videos):
        if wanted in (video.path, sample_id(video.path)):
            return row
    if wanted.isdigit() and int(wanted) < len(cache):
        return int(wanted)
    skipped = [entry["reason"] for entry in cache.manifest["skipped"] if entry["path"] == wanted]
    raise ValueError(
        f"{wanted}: " + (f"was skipped: {skipped[0]}" if skipped else f"no such sample in {cache.address}")
    )
