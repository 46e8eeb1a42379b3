"""Filling a cache, shard by shard; any number of processes on any number of machines that share the folder may do so.

Each claims shards of its own, and whoever comes last writes the manifest. What a shard holds depends on the specification
and the shard size only, so it does not matter who made it, or when.

Legend: V views, t h w the grid of codes.
"""

import base64
import threading
import time
from collections.abc import Iterator, Mapping
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from xxhash import xxh3_64_digest

from data.cache.index import MALFORMED, ShardIndex, open_shards, read_manifest
from data.cache.spec import FORMAT, CacheSpec, key_of
from data.cache.storage import Folder, read_json
from data.clips import ClipCuts, describe
from data.files import SIGN_OF_LIFE, Claim, compact, remove_left_overs, sha256_of, write_bytes, write_first, write_json
from data.shards import DamagedCache, ShardWriter, sample_id, to_npy
from data.sources import Video


class CacheWriter:
    """Fills one cache."""

    def __init__(self, caches: Path, name: str, spec: CacheSpec, shard_size: int) -> None:
        self.spec, self.preimage = spec, spec.preimage()
        self.key = key_of(self.preimage)
        found = sorted(caches.glob(f"*-{self.key[:12]}"), key=lambda p: (not (p / "manifest.json").exists(), p.name))
        short = name.encode(errors="surrogateescape")[:200].decode(errors="ignore")  # file names end at 255 bytes
        self.folder = found[0] if found else caches / f"{short}-{self.key[:12]}"
        self.shards = self.folder / "shards"
        self._wanted_size = shard_size
        self._held: dict[int, Claim] = {}
        self._read: tuple[tuple[int, int], dict[str, Any]] = ((0, 0), {})
        self._idle = threading.Event()
        self._idle.set()

    def begin(self) -> None:
        """Make the folder and write down the plan; that of the process that began first holds, with its shard size."""
        self.shards.mkdir(parents=True, exist_ok=True)
        if not (self.folder / "manifest.json").exists():
            plan = {"shard_size": self._wanted_size, "spec": self.preimage}
            write_first(self.folder / "plan.json", compact(plan).encode())
        remove_left_overs(self.shards)
        for number in self._damaged():
            for suffix in (".tar", ".json"):
                (self.shards / f"{number:06d}{suffix}").unlink(missing_ok=True)

    def _damaged(self) -> list[int]:
        """Numbers of shards that are there but have lost their record or their length; they must be made again."""
        files, damaged = Folder(self.folder), []
        for number in range(-(-len(self.spec.videos) // self.shard_size)):
            if self.has(number):
                try:
                    open_shards(files, [f"{number:06d}.tar"], self.preimage)
                except DamagedCache:
                    damaged.append(number)
        return damaged

    @cached_property
    def shard_size(self) -> int:
        finished = (self.folder / "manifest.json").exists()
        size = (self._manifest() if finished else read_json(Folder(self.folder), "plan.json")).get("shard_size")
        if not isinstance(size, int) or size < 1:
            raise DamagedCache(f"{self.folder}: does not say how large a shard is")
        return size

    def missing(self) -> list[int]:
        """Numbers of the shards that do not exist yet."""
        count = -(-len(self.spec.videos) // self.shard_size)
        return [n for n in range(count) if not self.has(n)]

    def has(self, shard: int) -> bool:
        """Whether a shard exists; one that has lost its tar or its record is made again."""
        tar = self.shards / f"{shard:06d}.tar"
        return tar.exists() and tar.with_suffix(".json").exists()

    def videos(self, shard: int) -> tuple[Video, ...]:
        """The videos that belong to a shard."""
        return self.spec.videos[shard * self.shard_size : (shard + 1) * self.shard_size]

    def claims(self, first: int = 0) -> Iterator[int]:
        """Missing shards that nobody else is making, each claimed when it is reached, from the `first` missing one on.

        `commit` of the shard releases the claim; after an error `release_all` does.
        """
        missing = self.missing()
        for number in missing[first:] + missing[:first]:
            claim = Claim(self.shards / f"{number:06d}.claim")
            if not self.has(number) and claim.take():
                self._held[number] = claim
                self._stay_alive()
                if self.has(number):  # it was finished between the two looks
                    self.release(number)
                else:
                    yield number

    def _stay_alive(self) -> None:
        """Show now and then that the claims are held, from a thread, for one video may take hours."""
        if not self._idle.is_set():
            return
        self._idle.clear()

        def show() -> None:
            while not self._idle.wait(SIGN_OF_LIFE):
                for claim in list(self._held.values()):
                    claim.keep()

        threading.Thread(target=show, daemon=True).start()

    def release(self, shard: int) -> None:
        claim = self._held.pop(shard, None)
        if claim is not None:
            claim.release()

    def release_all(self) -> None:
        self._idle.set()
        for shard in list(self._held):
            self.release(shard)

    def open_shard(self, number: int) -> "CodeShard":
        return CodeShard(self, number)

    def note(self, made_with: dict[str, str]) -> None:
        """Write down where videos and tokenizer were found this time: no content, so not in the manifest."""
        write_json(self.folder / "made_with.json", made_with)
        remove_left_overs(self.folder)
        remove_left_overs(self.shards)

    def finish(self, codebook_VC: np.ndarray | None) -> None:
        """Check every shard, count the codes, and write the manifest; of several processes one does.

        Raises:
            ValueError: if not one video could be used.
            DamagedCache: if a shard is not what its record says.
        """
        claim = Claim(self.folder / "manifest.claim")
        while not self.finished:
            if not claim.take():
                time.sleep(0.5)
                continue
            self._held[-1] = claim
            self._stay_alive()
            try:
                self._finish(codebook_VC)
            finally:
                self.release(-1)

    def _manifest(self) -> dict[str, Any]:
        """The manifest that is there now; read again when it has changed."""
        status = (self.folder / "manifest.json").stat()
        version = (status.st_mtime_ns, status.st_size)
        if self._read[0] != version:
            self._read = (version, read_manifest(Folder(self.folder)))
        return self._read[1]

    @property
    def finished(self) -> bool:
        """Whether nothing is left to do: there is a manifest, and the shards are those that it names."""
        try:
            return all(
                sha256(tar.with_suffix(".json").read_bytes()).hexdigest() == entry["record"]
                and tar.stat().st_size == entry["bytes"]
                for entry in self._manifest()["shards"]
                for tar in [self.shards / entry["file"]]
            )
        except (*MALFORMED, OSError):
            return False

    def _finish(self, codebook_VC: np.ndarray | None) -> None:
        remove_left_overs(self.shards)
        if self.missing():
            raise DamagedCache(f"{self.shards}: {len(self.missing())} shards are missing")
        names = [f"{n:06d}.tar" for n in range(-(-len(self.spec.videos) // self.shard_size))]
        shards = open_shards(Folder(self.folder), names, self.preimage)
        for number, shard in enumerate(shards):
            self._check_incomplete(number, shard)
        counts = sum(
            (_count(shard, self.spec.vocab_size) for shard in shards), np.zeros(self.spec.vocab_size, np.int64)
        )
        samples = sum(len(shard.video_N) for shard in shards)
        skipped = [entry for shard in shards for entry in shard.skipped]
        if samples == 0:
            first = skipped[0]
            raise ValueError(
                f"none of the {len(skipped)} videos can be used; the first, {first['path']}: {first['reason']} "
                f"(delete {self.folder} to try them again)"
            )
        share = counts[counts > 0] / counts.sum()
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
            "unigram_bits": float(-(share * np.log2(share)).sum()),
            "codebook": self._write_codebook(codebook_VC),
            "bf16": _compared(shards) if self.spec.precision == "bf16" else None,
        }
        write_json(self.folder / "plan.json", {"shard_size": self.shard_size})  # the rest is in the manifest
        write_json(self.folder / "manifest.json", {**manifest, "checksum": sha256_of(manifest)})

    def _check_incomplete(self, number: int, shard: ShardIndex) -> None:
        """A shard must hold its videos, all of them: as codes, or with the reason why not."""
        told = sorted([*map(shard.path, range(len(shard.video_N))), *(entry["path"] for entry in shard.skipped)])
        if told != sorted(video.path for video in self.videos(number)):
            raise DamagedCache(f"{self.shards / shard.name}: does not hold the videos that belong to it; delete it")

    def _write_codebook(self, codebook_VC: np.ndarray | None) -> str | None:
        if codebook_VC is None:
            return None
        from safetensors.numpy import save

        content = save({"codebook_VC": np.ascontiguousarray(codebook_VC)})
        write_bytes(self.folder / "codebook.safetensors", content)
        return sha256(content).hexdigest()


def _count(shard: ShardIndex, vocab_size: int) -> np.ndarray:
    """How often each code occurs in a shard that is what its record says."""
    shard.verify()
    counts = np.zeros(vocab_size, np.int64)
    for row in range(len(shard.video_N)):
        counts += np.bincount(shard.codes(row).ravel(), minlength=vocab_size)
    return counts


def _compared(shards: list[ShardIndex]) -> dict[str, Any]:
    """How many of the codes that were made in fp32 too came out differently."""
    codes, differ = (sum(shard.compared[key] for shard in shards) for key in ("codes", "differ"))
    return {"codes": codes, "differ": differ, "rate": differ / codes if codes else None}


class CodeShard:
    """One shard while it is made; leaving the `with` block without `commit` leaves nothing behind."""

    def __init__(self, writer: CacheWriter, number: int) -> None:
        self._cache, self._number, self._spec = writer, number, writer.spec
        self._writer = ShardWriter(writer.shards, number, ("video", "views", "padded", "frames"))
        self._row = {video.path: number * writer.shard_size + i for i, video in enumerate(writer.videos(number))}
        self._checksums: list[bytes] = []
        self._skipped: list[dict[str, str]] = []
        self._compared = {"codes": 0, "differ": 0}

    def __enter__(self) -> "CodeShard":
        self._writer.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._writer.__exit__(kind, error, trace)

    def skip(self, video: Video, reason: str) -> None:
        """Say why a video has no codes."""
        self._skipped.append({"path": video.path, "reason": reason})

    def add(self, video: Video, codes_Vthw: np.ndarray, cuts: ClipCuts, pixels: Mapping[str, bytes]) -> None:
        """Append a video: its codes, where its clips were cut, the members that keep their pixels.

        Raises:
            ValueError: if the codes leave the vocabulary or are not those of the specification.
        """
        facts = {k: getattr(video, k) for k in ("path", "size", "label", "group", "split")}
        facts |= {"frames": cuts.frames, "rate": cuts.rate, **describe(cuts.views, self._spec.clip)}
        padded = any(view.real < self._spec.clip.frames for view in cuts.views)
        self.add_members(video, codes_Vthw, {"json": compact(facts).encode(), **pixels}, cuts.frames, padded)

    def add_members(
        self, video: Video, codes_Vthw: np.ndarray, members: Mapping[str, bytes], frames: int, padded: bool
    ) -> None:
        """Append a video whose other members are there already, from another cache."""
        spec = self._spec
        if codes_Vthw.shape[1:] != tuple(spec.codes_shape) or len(codes_Vthw) < 1:
            raise ValueError(f"codes of shape {codes_Vthw.shape[1:]} do not belong into a cache of {spec.codes_shape}")
        if codes_Vthw.min() < 0 or codes_Vthw.max() >= spec.vocab_size:
            raise ValueError(f"the tokenizer gave codes beyond its {spec.vocab_size}")
        packed_Vthw = np.ascontiguousarray(codes_Vthw.astype(spec.dtype))
        self._checksums += [xxh3_64_digest(clip) for clip in packed_Vthw]
        self._writer.add(
            sample_id(video.path),
            {"codes.npy": to_npy(packed_Vthw), **members},
            {"video": self._row[video.path], "views": len(packed_Vthw), "padded": int(padded), "frames": frames},
        )

    def compare(self, codes: int, differ: int) -> None:
        """Count codes that were made in fp32 too, and those of them that came out differently."""
        self._compared["codes"] += codes
        self._compared["differ"] += differ

    def commit(self) -> None:
        """Finish the tar and write its record."""
        checksums = base64.b64encode(b"".join(self._checksums)).decode()
        facts: dict[str, Any] = {"clip_xxh3": checksums, "skipped": self._skipped}
        if self._spec.precision == "bf16":
            facts["compared"] = self._compared
        if not self._cache.has(self._number):  # unless somebody was faster: what is there stays
            self._writer.commit(**facts)
        self._cache.release(self._number)
