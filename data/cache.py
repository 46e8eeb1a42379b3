"""The token cache: codes made once, found again by what made them, read by every later experiment.

    caches/<name>-<first 12 of key>/
      manifest.json           written last; without it the folder is unfinished work that the next run completes
      made_with.json          where the videos and the tokenizer were, the last time they were looked at
  plan.json               what is being made: the preimage of the key and the shard size
      codebook.safetensors    the tokenizer's code vectors, if it has a learned codebook
      shards/                 data/shards.py

The key is a sha256 over content only: tokenizer, clips, numeric policy, decoder, kept pixels and the list of videos.
Folders, processes, shard size and dates are not in it.

Legend: V views, t h w the grid of codes.
"""

import hashlib
import json
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors.torch import load, save

from data.clips import ClipSpec
from data.decoding import VERSION
from data.pixels import JPEG_QUALITY, KeepPixels, unpack_pixels
from data.shards import (
    DamagedCache,
    ShardReader,
    ShardWriter,
    from_npy,
    remove_left_overs,
    to_npy,
    write_bytes,
    write_json,
)
from data.sources import Video

FORMAT = "arvideo-cache-1"
CUTTING = f"clips-1 digits-1 jpeg-{JPEG_QUALITY}"
"""Version of the code that makes pixels of a specification; a change of it makes other caches."""


@dataclass(frozen=True, kw_only=True)
class CacheSpec:
    """Everything that decides what is in a cache."""

    tokenizer: str
    """Fingerprint of the tokenizer."""
    codes_shape: tuple[int, int, int]
    vocab_size: int
    levels: tuple[int, ...] | None
    """Values of each digit of a code, lowest first (FSQ, LFQ); None if codes are rows of a codebook."""
    clip: ClipSpec
    precision: Literal["fp32", "bf16"]
    encode_batch: int
    """Clips that go through the tokenizer together, always the same number."""
    keep_pixels: KeepPixels
    videos: tuple[Video, ...]

    def preimage(self) -> dict[str, Any]:
        """What the key is the hash of, in JSON form."""
        videos = [[v.path, v.size, v.label, v.group, v.split] for v in self.videos]
        return json.loads(
            json.dumps({"format": FORMAT, "decoder": VERSION, "cutting": CUTTING, **asdict(self), "videos": videos})
        )

    @property
    def dtype(self) -> np.dtype:
        return np.dtype("<u2" if self.vocab_size <= 2**16 else "<u4")


def key_of(preimage: dict[str, Any]) -> str:
    return _sha256_of(preimage)


def _sha256_of(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


class CacheWriter:
    """Fills one cache, shard by shard; any number of processes may do so together, each its own shards."""

    def __init__(self, caches: Path, name: str, spec: CacheSpec, shard_size: int) -> None:
        self.spec, self.preimage = spec, spec.preimage()
        self.key = key_of(self.preimage)
        found = sorted(caches.glob(f"*-{self.key[:12]}"))
        short = name.encode(errors="surrogateescape")[:200].decode(errors="ignore")  # file names end at 255 bytes
        self.folder = found[0] if found else caches / f"{short}-{self.key[:12]}"
        self.shards = self.folder / "shards"
        self._wanted_size = shard_size

    @property
    def finished(self) -> bool:
        return (self.folder / "manifest.json").exists()

    def begin(self) -> None:
        """Make the folder and write down the plan. An unfinished run's shard size wins over the one asked for."""
        self.shards.mkdir(parents=True, exist_ok=True)
        if not (self.folder / "plan.json").exists():
            write_json(self.folder / "plan.json", {"spec": self.preimage, "shard_size": self._wanted_size})

    @cached_property
    def shard_size(self) -> int:
        return int(_read_json(self.folder / "plan.json")["shard_size"])

    def missing(self) -> list[int]:
        """Numbers of the shards that do not exist yet."""
        count = -(-len(self.spec.videos) // self.shard_size)
        return [n for n in range(count) if not (self.shards / f"{n:06d}.json").exists()]

    def videos(self, shard: int) -> tuple[Video, ...]:
        """The videos that belong to a shard."""
        return self.spec.videos[shard * self.shard_size : (shard + 1) * self.shard_size]

    def open_shard(self, shard: int) -> ShardWriter:
        return ShardWriter(self.shards, shard)

    def pack(self, codes_VTHW: np.ndarray) -> bytes:
        """The codes of a video as a member of a shard.

        Raises:
            ValueError: if they leave the vocabulary.
        """
        if codes_VTHW.min() < 0 or codes_VTHW.max() >= self.spec.vocab_size:
            raise ValueError(f"the tokenizer gave codes beyond its {self.spec.vocab_size}")
        return to_npy(codes_VTHW.astype(self.spec.dtype))

    def note(self, made_with: dict[str, str]) -> None:
        """Write down where videos and tokenizer were found this time: no content, so not in the manifest."""
        write_json(self.folder / "made_with.json", made_with)

    def finish(self, codebook_VC: torch.Tensor | None) -> None:
        """Check every shard, count the codes, and write the manifest.

        Raises:
            ValueError: if not one video could be used.
            DamagedCache: if a shard is not what its record says.
        """
        remove_left_overs(self.shards)
        if self.missing():
            raise DamagedCache(f"{self.shards}: {len(self.missing())} shards are missing")
        readers = [ShardReader(path) for path in sorted(self.shards.glob("*.tar"))]
        counts = np.zeros(self.spec.vocab_size, np.int64)
        shape = (self.spec.clip.views, *self.spec.codes_shape)
        for reader in readers:
            reader.verify()
            for row in range(len(reader.samples)):
                codes = from_npy(reader.read(row, "codes.npy"), self.spec.dtype, shape)
                if codes.max() >= self.spec.vocab_size:
                    raise DamagedCache(f"{reader.tar}: sample {reader.samples[row]['id']} leaves the vocabulary")
                counts += np.bincount(codes.ravel(), minlength=self.spec.vocab_size)
        samples = sum(len(reader.samples) for reader in readers)
        skipped = [entry for reader in readers for entry in reader.facts["skipped"]]
        if samples == 0:
            first = skipped[0]
            raise ValueError(
                f"none of the {len(skipped)} videos can be used; the first, {first['path']}: {first['reason']}"
            )
        codebook = None
        if codebook_VC is not None:
            content = save({"codebook_VC": codebook_VC.detach().cpu().contiguous()})
            write_bytes(self.folder / "codebook.safetensors", content)
            codebook = hashlib.sha256(content).hexdigest()
        share = counts[counts > 0] / counts.sum()
        manifest = {
            "format": FORMAT,
            "key": self.key,
            "spec": self.preimage,
            "shards": [_entry(reader) for reader in readers],
            "samples": samples,
            "padded": sum(sample["padded"] for reader in readers for sample in reader.samples),
            "skipped": skipped,
            "clips": samples * shape[0],
            "codes": int(counts.sum()),
            "codes_used": int((counts > 0).sum()),
            "unigram_bits": float(-(share * np.log2(share)).sum()),
            "codebook": codebook,
        }
        write_json(self.folder / "manifest.json", {**manifest, "checksum": _sha256_of(manifest)})


def _entry(reader: ShardReader) -> dict[str, Any]:
    record = hashlib.sha256(reader.record_bytes).hexdigest()
    return {
        "file": reader.tar.name,
        "samples": len(reader.samples),
        "record": record,
        **{k: reader.facts[k] for k in ("bytes", "sha256")},
    }


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise DamagedCache(f"{path}: missing") from None
    except (ValueError, RecursionError) as error:
        raise DamagedCache(f"{path}: is not JSON ({error})") from None
    if not isinstance(content, dict):
        raise DamagedCache(f"{path}: is not a JSON object")
    return content


class TokenCache:
    """A finished cache, open for reading: `len(cache)` videos, `cache.codes(i)` of each.

    Sizes and records are checked here, the crc of a sample whenever it is read, whole shards by `verify`.

    Raises:
        DamagedCache: if the folder is no finished cache, or anything in it was changed.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        if not (folder / "manifest.json").exists():
            unfinished = (folder / "plan.json").exists()
            raise DamagedCache(
                f"{folder}: " + ("is unfinished; run tokenize again" if unfinished else "is no cache: no manifest.json")
            )
        manifest = _read_json(folder / "manifest.json")
        checksum = manifest.pop("checksum", None)
        if manifest.get("format") != FORMAT:
            raise DamagedCache(f"{folder / 'manifest.json'}: format {manifest.get('format')!r} is not {FORMAT}")
        if checksum != _sha256_of(manifest) or manifest.get("key") != key_of(manifest.get("spec", {})):
            raise DamagedCache(
                f"{folder / 'manifest.json'}: was changed after it was written; its checksum does not fit"
            )
        try:
            self._read(manifest)
        except (KeyError, TypeError, ValueError, IndexError) as error:
            if isinstance(error, DamagedCache):
                raise
            raise DamagedCache(
                f"{folder / 'manifest.json'}: is no manifest ({type(error).__name__}: {error})"
            ) from None

    def _read(self, manifest: dict[str, Any]) -> None:
        self.manifest = manifest
        self.key: str = manifest["key"]
        self.spec: dict[str, Any] = manifest["spec"]
        self.codes_shape: tuple[int, int, int] = tuple(self.spec["codes_shape"])
        self.vocab_size: int = self.spec["vocab_size"]
        self.levels = None if self.spec["levels"] is None else tuple(self.spec["levels"])
        self.clip = ClipSpec(**self.spec["clip"])
        self._dtype = np.dtype("<u2" if self.vocab_size <= 2**16 else "<u4")
        self._shards = [self._open(entry) for entry in manifest["shards"]]
        self._places = [(shard, row) for shard in self._shards for row in range(len(shard.samples))]
        self.videos = [_video(shard.samples[row]) for shard, row in self._places]

    def _open(self, entry: dict[str, Any]) -> ShardReader:
        reader = ShardReader(self.folder / "shards" / Path(entry["file"]).name)
        if hashlib.sha256(reader.record_bytes).hexdigest() != entry["record"]:
            raise DamagedCache(f"{reader.tar.with_suffix('.json')}: is not the record that the manifest names")
        return reader

    def __len__(self) -> int:
        return len(self._places)

    def codes(self, index: int) -> np.ndarray:
        """Codes of all views of a video, (V, t, h, w).

        Raises:
            DamagedCache: if they fail their checksum or leave the vocabulary.
        """
        shard, row = self._places[index]
        codes = from_npy(shard.read(row, "codes.npy"), self._dtype, (self.clip.views, *self.codes_shape))
        if codes.max() >= self.vocab_size:
            raise DamagedCache(f"{shard.tar}: sample {shard.samples[row]['id']} has a code beyond the vocabulary")
        return codes

    def pixels(self, index: int) -> np.ndarray:
        """Pixels of all views, uint8 (V, T, H, W, 3).

        Raises:
            ValueError: if the cache was made without `--keep_pixels`.
        """
        if self.spec["keep_pixels"] == "none":
            raise ValueError(f"{self.folder}: holds no pixels; make it with --keep_pixels raw or jpeg")
        shard, row = self._places[index]
        return unpack_pixels(self.spec["keep_pixels"], lambda extension: shard.read(row, extension), self.clip)

    @property
    def made_with(self) -> dict[str, str]:
        """Where `videos` and `tokenizer` were found the last time, as they were named on the command line."""
        return _read_json(self.folder / "made_with.json")

    def codebook(self) -> torch.Tensor | None:
        """Vectors of a learned codebook, (vocab_size, C); None if codes are made of digits.

        Raises:
            DamagedCache: if they are missing or were changed.
        """
        if self.manifest["codebook"] is None:
            return None
        path = self.folder / "codebook.safetensors"
        content = path.read_bytes() if path.exists() else b""
        if hashlib.sha256(content).hexdigest() != self.manifest["codebook"]:
            raise DamagedCache(f"{path}: is missing or was changed")
        return load(content)["codebook_VC"]

    def verify(self) -> None:
        """Hash all shards.

        Raises:
            DamagedCache: for the first that was changed.
        """
        for shard in self._shards:
            shard.verify()


def _video(sample: dict[str, Any]) -> Video:
    return Video(sample["path"], sample["size"], sample["label"], sample["group"], sample["split"])


def find_cache(caches: Path, wanted: str | None) -> Path:
    """The folder of a cache: one given as such, the only one whose name or key begins with `wanted`, or the newest.

    Raises:
        ValueError: if there is none, or more than one.
    """
    if wanted and Path(wanted, "manifest.json").exists():
        return Path(wanted)
    finished = [path.parent for path in caches.glob("*/manifest.json")]
    if wanted:
        finished = [path for path in finished if path.name.startswith(wanted) or _key_in(path).startswith(wanted)]
    if not finished:
        what = f"no cache {wanted!r}" if wanted else "no finished cache"
        raise ValueError(f"{what} in {caches}; make one with pipelines/tokenize.py")
    if wanted and len(finished) > 1:
        raise ValueError(
            f"{wanted!r} fits {len(finished)} caches in {caches}: {', '.join(sorted(p.name for p in finished))}"
        )
    return max(finished, key=lambda path: (path / "manifest.json").stat().st_mtime)


def _key_in(folder: Path) -> str:
    return str(_read_json(folder / "manifest.json").get("key"))


def hold_out(videos: Iterable[Video]) -> tuple[list[int], list[int]]:
    """Rows to train on and rows to validate on.

    Videos of a split other than train are held out. Where no video has a split, every tenth group is, chosen by hash;
    a video without a group is its own.
    """
    videos = list(videos)
    if any(v.split not in (None, "train") for v in videos):
        held = [v.split not in (None, "train") for v in videos]
    else:
        groups = sorted(
            {v.group or v.path for v in videos},
            key=lambda g: hashlib.sha256(g.encode(errors="surrogateescape")).digest(),
        )
        chosen = set(groups[: math.ceil(len(groups) / 10)]) if len(groups) > 1 else set()
        held = [(v.group or v.path) in chosen for v in videos]
    return [i for i, h in enumerate(held) if not h], [i for i, h in enumerate(held) if h]
