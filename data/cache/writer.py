"""Fill a cache shard by shard, from any number of processes on any number of machines that share the folder.

Each process claims shards that no other process is writing, and one process writes the manifest at the end. The content of
a shard depends only on the specification and the shard size, not on the process or the time.

Legend: V views, t h w the grid of places. With several codes per place, codes have a last axis of them.
"""

import base64
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save
from xxhash import xxh3_64_digest

from data.cache.index import ShardIndex, open_shards, read_manifest
from data.cache.manifest import MALFORMED
from data.cache.spec import FORMAT, CacheSpec, key_of
from data.cache.storage import Folder, read_json
from data.clips import ClipCuts, describe
from data.files import SIGN_OF_LIFE, Claim, compact, remove_left_overs, sha256_of, write_bytes, write_first, write_json
from data.shards import DamagedCache, ShardWriter, sample_id, to_npy
from data.sources import Video


class CacheWriter:
    """Writer of one cache. It reuses a folder with the same key, even with another name, and prefers a finished cache."""

    def __init__(self, caches: Path, name: str, spec: CacheSpec, shard_size: int) -> None:
        self.spec, self.preimage = spec, spec.preimage()
        self.key = key_of(self.preimage)
        folders = sorted(caches.glob(f"*-{self.key[:12]}"), key=lambda p: (not (p / "manifest.json").exists(), p.name))
        # File systems allow names of at most 255 bytes.
        short = name.encode(errors="surrogateescape")[:200].decode(errors="ignore")
        self.folder = folders[0] if folders else caches / f"{short}-{self.key[:12]}"
        self.shards = self.folder / "shards"
        self._requested_size = shard_size
        self._claims: dict[int, Claim] = {}
        self._manifest_read: tuple[tuple[int, int], dict[str, Any]] = ((0, 0), {})
        self._idle = threading.Event()
        self._idle.set()

    def begin(self) -> None:
        """Create the folder and the plan, and delete damaged shards. All processes use the plan of the first process."""
        self.shards.mkdir(parents=True, exist_ok=True)
        if not (self.folder / "manifest.json").exists():
            plan = {"shard_size": self._requested_size, "spec": self.preimage}
            write_first(self.folder / "plan.json", compact(plan).encode())
        remove_left_overs(self.shards)
        for tar in [self._tar(number) for number in range(self._shard_count) if self.has(number)]:
            try:
                open_shards(Folder(self.folder), [tar.name], self.preimage)
            except DamagedCache:
                tar.unlink(missing_ok=True)
                tar.with_suffix(".json").unlink(missing_ok=True)

    @cached_property
    def shard_size(self) -> int:
        """Number of videos of a shard, from the manifest or the plan."""
        finished = (self.folder / "manifest.json").exists()
        size = (self._manifest() if finished else read_json(Folder(self.folder), "plan.json")).get("shard_size")
        if not isinstance(size, int) or size < 1:
            raise DamagedCache(f"{self.folder}: shard_size must be an integer of at least 1, got {size!r}")
        return size

    @property
    def _shard_count(self) -> int:
        return -(-len(self.spec.videos) // self.shard_size)

    def _tar(self, shard: int) -> Path:
        return self.shards / f"{shard:06d}.tar"

    def missing(self) -> list[int]:
        """Return the numbers of the shards that do not exist yet."""
        return [number for number in range(self._shard_count) if not self.has(number)]

    def has(self, shard: int) -> bool:
        """Return whether both the tar and the record of a shard exist. If one is missing, the shard is written again."""
        tar = self._tar(shard)
        return tar.exists() and tar.with_suffix(".json").exists()

    def videos(self, shard: int) -> tuple[Video, ...]:
        """Return the videos of a shard."""
        return self.spec.videos[shard * self.shard_size : (shard + 1) * self.shard_size]

    def claims(self, first: int = 0) -> Iterator[int]:
        """Claim and yield the missing shards that no other process has claimed, starting with missing shard `first`.

        `CodeShard.commit` releases the claim. After an error, `release_all` releases it.
        """
        missing = self.missing()
        for number in missing[first:] + missing[:first]:
            claim = Claim(self._tar(number).with_suffix(".claim"))
            if not self.has(number) and claim.take():
                self._hold(number, claim)
                # Another process may have finished the shard between the check and the claim.
                if self.has(number):
                    self.release(number)
                else:
                    yield number

    def _hold(self, number: int, claim: Claim) -> None:
        """Refresh the claim's timestamp in a thread until the claim is released, because one video may take hours."""
        self._claims[number] = claim
        if not self._idle.is_set():
            return
        self._idle.clear()

        def refresh() -> None:
            while not self._idle.wait(SIGN_OF_LIFE):
                for claim in list(self._claims.values()):
                    claim.keep()

        threading.Thread(target=refresh, daemon=True).start()

    def release(self, shard: int) -> None:
        """Release the claim of a shard, if this process holds it."""
        if claim := self._claims.pop(shard, None):
            claim.release()

    def release_all(self) -> None:
        """Release all claims of this process."""
        self._idle.set()
        for shard in list(self._claims):
            self.release(shard)

    @contextmanager
    def open_shard(self, number: int) -> Iterator["CodeShard"]:
        """Begin a shard. Leaving the `with` block without `CodeShard.commit` deletes it."""
        with ShardWriter(self.shards, number, ("video", "views", "padded", "frames")) as tar:
            yield CodeShard(self, number, tar)

    def note(self, made_with: dict[str, str]) -> None:
        """Write made_with.json: the locations of `videos`, `tokenizer` and the `root` of the videos in this run."""
        write_json(self.folder / "made_with.json", made_with)
        remove_left_overs(self.folder)
        remove_left_overs(self.shards)

    def finish(self, codebook_VC: np.ndarray | None) -> None:
        """Check every shard, count the codes, and write the manifest. If several processes call this, one of them writes.

        `codebook_VC`: vectors of learned codebooks, as from `TokenCache.codebook`. Raises ValueError if no video can be used, and
        DamagedCache if a shard differs from its record.
        """
        claim = Claim(self.folder / "manifest.claim")
        while not self.finished:
            if not claim.take():
                time.sleep(0.5)
                continue
            self._hold(-1, claim)
            try:
                self._finish(codebook_VC)
            finally:
                self.release(-1)

    def _manifest(self) -> dict[str, Any]:
        """Return the manifest, read again if the file has changed."""
        status = (self.folder / "manifest.json").stat()
        version = (status.st_mtime_ns, status.st_size)
        if self._manifest_read[0] != version:
            self._manifest_read = (version, read_manifest(Folder(self.folder)))
        return self._manifest_read[1]

    @property
    def finished(self) -> bool:
        """True if the manifest exists and the records and sizes of all shards match it."""
        try:
            for entry in self._manifest()["shards"]:
                tar = self.shards / entry["file"]
                record = sha256(tar.with_suffix(".json").read_bytes()).hexdigest()
                if record != entry["record"] or tar.stat().st_size != entry["bytes"]:
                    return False
        except (*MALFORMED, OSError):
            return False
        return True

    def _finish(self, codebook_VC: np.ndarray | None) -> None:
        remove_left_overs(self.shards)
        if self.missing():
            raise DamagedCache(f"{self.shards}: {len(self.missing())} shards are missing")
        names = [self._tar(number).name for number in range(self._shard_count)]
        shards = open_shards(Folder(self.folder), names, self.preimage)
        for number, shard in enumerate(shards):
            self._check_videos(number, shard)
        layout = self.spec.codes
        counts = np.zeros(sum(layout.vocabularies), np.int64)
        for shard in shards:
            shard.verify()
            for row in range(len(shard.video_N)):
                counts += np.bincount(layout.numbered(shard.codes(row)).ravel(), minlength=len(counts))
        samples = sum(len(shard.video_N) for shard in shards)
        skipped = [entry for shard in shards for entry in shard.skipped]
        if samples == 0:
            first = f"the first, {skipped[0]['path']}: {skipped[0]['reason']}"
            raise ValueError(f"none of the {len(skipped)} videos can be used (delete {self.folder} to retry); {first}")
        share = counts[counts > 0] / counts.sum()
        compared, differ = (sum(shard.compared[key] for shard in shards) for key in ("codes", "differ"))
        bf16 = {"codes": compared, "differ": differ, "rate": differ / compared if compared else None}
        manifest = {
            "format": FORMAT,
            "key": self.key,
            "spec": self.preimage,
            "shard_size": self.shard_size,
            "shards": [shard.entry() for shard in shards],
            "samples": samples,
            "padded": sum(int(shard.padded_N.sum()) for shard in shards),
            "skipped": skipped,
            "clips": sum(int(shard.views_N.sum()) for shard in shards),
            "codes": int(counts.sum()),
            "codes_used": int((counts > 0).sum()),
            # The entropy of a code, averaged over the codes of a place: each has the same share of the counts.
            "unigram_bits": float(-(share * np.log2(share)).sum() - np.log2(layout.codes_per_place)),
            "codebook": self._write_codebook(codebook_VC),
            "bf16": bf16 if self.spec.precision == "bf16" else None,
        }
        # The manifest contains the specification, so the plan no longer needs it.
        write_json(self.folder / "plan.json", {"shard_size": self.shard_size})
        write_json(self.folder / "manifest.json", {**manifest, "checksum": sha256_of(manifest)})
        # If the manifest could not be read, `finish` would never end.
        self._manifest()

    def _check_videos(self, number: int, shard: ShardIndex) -> None:
        """Check that a shard lists each of its videos once, either with codes or as skipped."""
        paths = [shard.path(row) for row in range(len(shard.video_N))] + [entry["path"] for entry in shard.skipped]
        if sorted(paths) != sorted(video.path for video in self.videos(number)):
            raise DamagedCache(f"{self.shards / shard.name}: contains the videos of another shard; delete it")

    def _write_codebook(self, codebook_VC: np.ndarray | None) -> str | None:
        if codebook_VC is None:
            return None
        content = save({"codebook_VC": np.ascontiguousarray(codebook_VC)})
        write_bytes(self.folder / "codebook.safetensors", content)
        return sha256(content).hexdigest()


class CodeShard:
    """A shard that is being written, from `CacheWriter.open_shard`."""

    def __init__(self, writer: CacheWriter, number: int, tar: ShardWriter) -> None:
        self._cache, self._number, self._spec, self._writer = writer, number, writer.spec, tar
        self._row = {video.path: number * writer.shard_size + i for i, video in enumerate(writer.videos(number))}
        self._checksums: list[bytes] = []
        self._skipped: list[dict[str, str]] = []
        self._compared = {"codes": 0, "differ": 0}

    def skip(self, video: Video, reason: str) -> None:
        """Record a video without codes, with the reason."""
        self._skipped.append({"path": video.path, "reason": reason})

    def add(self, video: Video, codes_Vthw: np.ndarray, cuts: ClipCuts, pixels: Mapping[str, bytes]) -> None:
        """Append a video: its codes, the positions of its clips, and the members with their pixels.

        Raises ValueError if a code is not in the vocabulary, or the shape differs from the specification.
        """
        facts = {k: getattr(video, k) for k in ("path", "size", "label", "group", "split")}
        facts |= {"frames": cuts.frames, "rate": cuts.rate, **describe(cuts.views, self._spec.clip)}
        padded = any(view.real < self._spec.clip.frames for view in cuts.views)
        self.add_members(video, codes_Vthw, {"json": compact(facts).encode(), **pixels}, cuts.frames, padded)

    def add_members(
        self, video: Video, codes_Vthw: np.ndarray, members: Mapping[str, bytes], frames: int, padded: bool
    ) -> None:
        """Append a video whose other members exist already, for example in another cache. Raises the same errors as `add`."""
        layout = self._spec.codes
        if codes_Vthw.shape[1:] != layout.shape or len(codes_Vthw) < 1:
            expected = ", ".join(map(str, layout.shape))
            raise ValueError(f"codes must have shape (V, {expected}) with V of at least 1, got {codes_Vthw.shape}")
        if problem := layout.outside(codes_Vthw):
            raise ValueError(problem)
        packed_Vthw = np.ascontiguousarray(codes_Vthw.astype(layout.dtype))
        self._checksums += [xxh3_64_digest(clip) for clip in packed_Vthw]
        self._writer.add(
            sample_id(video.path),
            {"codes.npy": to_npy(packed_Vthw), **members},
            {"video": self._row[video.path], "views": len(packed_Vthw), "padded": int(padded), "frames": frames},
        )

    def compare(self, codes: int, differ: int) -> None:
        """Add the number of codes that were also computed in fp32, and the number of codes that differ."""
        self._compared["codes"] += codes
        self._compared["differ"] += differ

    def commit(self) -> None:
        """Finish the tar, write its record and release the claim. A shard that exists already is not replaced."""
        checksums = base64.b64encode(b"".join(self._checksums)).decode()
        compared = {"compared": self._compared} if self._spec.precision == "bf16" else {}
        if not self._cache.has(self._number):
            self._writer.commit(clip_xxh3=checksums, skipped=self._skipped, **compared)
        self._cache.release(self._number)
