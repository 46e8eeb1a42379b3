"""Caches and shards with given content, and small functions that several test files share."""

import base64
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from xxhash import xxh3_64_digest

from data.cache import CacheSpec, CacheWriter, TokenCache, key_of
from data.cache.layout import CodeLayout
from data.cache.spec import sha256_of
from data.clip_spec import ClipSpec
from data.clips import ClipCuts, View
from data.files import write_json
from data.shards import sample_id
from data.sources import Video

VIDEOS = (Video("a.mp4", 5, "run", "g", "train"), Video("b.mp4", 6, "jump", "h", "test"))
SPEC = CacheSpec(
    tokenizer="fingerprint",
    codes=CodeLayout(grid=(2, 3, 3), vocab_size=64, levels=((8, 8),)),
    clip=ClipSpec(frames=4, size=8, views=2),
    precision="fp32",
    encode_batch=2,
    keep_pixels="none",
    videos=VIDEOS,
)


def files_of(folder: Path) -> dict[str, bytes]:
    """All files of a folder and its sub-folders: relative path -> content."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def all_codes(cache: TokenCache) -> np.ndarray:
    """Codes of all videos, (N, V, t, h, w)."""
    return np.stack([cache.codes(i) for i in range(len(cache))])


def expected_codes(path: str, views: int = 2, vocab_size: int = 64) -> np.ndarray:
    """The codes that make_cache writes for a video."""
    rng = np.random.default_rng(int(sample_id(path), 16))
    return rng.integers(vocab_size, size=(views, *SPEC.codes.shape))


def find_clip(cache: TokenCache, row: int, view: int = 0) -> tuple[Path, int, int]:
    """Tar, offset and size of a clip's codes, found by searching for its content."""
    clip = cache.codes(row)[view].tobytes()
    tar = Path(cache.address, cache.shards[cache.clips.shard_N[row]].file)
    content = tar.read_bytes()
    assert content.count(clip) == 1
    return tar, content.index(clip), len(clip)


def flip_bit(file: Path, offset: int, bit: int = 0) -> None:
    """Flip one bit of a file."""
    content = bytearray(file.read_bytes())
    content[offset] ^= 1 << bit
    file.write_bytes(content)


def damage_clip(folder: str | Path, row: int, view: int = 0) -> None:
    """Flip one bit of a clip's codes."""
    tar, offset, _ = find_clip(TokenCache.open(folder), row, view)
    flip_bit(tar, offset)


def some_cuts(views: int, real: int = 4) -> ClipCuts:
    """Consecutive clips of four frames, of which `real` are valid."""
    clips = [View(start=4 * v, stride=1, real=real, top=0, left=0, size=8, flip=False) for v in range(views)]
    return ClipCuts(tuple(clips), 4 * views, 25.0)


def equal_cuts(views: int) -> ClipCuts:
    """Views that are all the same cut, as in a square video of the length of a clip."""
    view = View(start=0, stride=1, real=4, top=0, left=0, size=8, flip=False)
    return ClipCuts((view,) * views, 4, 25.0)


def written_by_hand(
    caches: Path, spec: CacheSpec, codes_N: Sequence[np.ndarray] | np.ndarray, shards: int | None = None
) -> CacheWriter:
    """Write the first shards of an unfinished cache of given codes, one video per shard. The first video is padded."""
    writer = CacheWriter(caches, "hand", spec, 1)
    writer.begin()
    for number in writer.missing()[:shards]:
        with writer.open_shard(number) as shard:
            for video in writer.videos(number):
                codes_Vthw = np.asarray(codes_N[number])
                shard.add(video, codes_Vthw, some_cuts(len(codes_Vthw), real=3 if number == 0 else 4), {})
            shard.commit()
    return writer


def filled(caches: Path, spec: CacheSpec, codes_N: Sequence[np.ndarray], codebook_VC: np.ndarray | None = None) -> Path:
    """Write and finish a cache of given codes, one video per shard. The writer claims each shard, like tokenize."""
    writer = CacheWriter(caches, "filled", spec, 1)
    writer.begin()
    try:
        while writer.missing():
            for number in writer.claims():
                with writer.open_shard(number) as shard:
                    (video,) = writer.videos(number)
                    shard.add(video, codes_N[number], some_cuts(len(codes_N[number])), {})
                    shard.commit()
    finally:
        writer.release_all()
    writer.finish(codebook_VC)
    return writer.folder


def clip_checksums(codes_N: Sequence[np.ndarray]) -> dict[str, str]:
    """The entry of a shard's record with the checksums of its clips."""
    sums = [xxh3_64_digest(clip.tobytes()) for codes_Vthw in codes_N for clip in codes_Vthw]
    return {"clip_xxh3": base64.b64encode(b"".join(sums)).decode()}


def rewritten_manifest(folder: Path, **changes: Any) -> None:
    """Change a manifest, and update its key and checksum."""
    manifest = {**json.loads((folder / "manifest.json").read_text()), **changes}
    manifest.pop("checksum")
    manifest["key"] = key_of(manifest["spec"])
    write_json(folder / "manifest.json", {**manifest, "checksum": sha256_of(manifest)})


class Child:
    """A forked process."""

    def __init__(self, pid: int) -> None:
        self.pid = pid

    def wait(self) -> int:
        """Wait for the process; return its exit code, or minus the number of the signal that killed it."""
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


def in_a_child(work: Callable[[], object]) -> Child:
    """Run a function in a forked process, whose exit code is 1 after an exception."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    return Child(pid)
