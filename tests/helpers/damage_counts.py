"""Counts how much damage of a shard TokenCache detects. pipelines/benchmarks/cache_damage.py compares TokenCache with webdataset.

Every function takes the path of a shard of a finished cache, and damages only copies of it.
"""

import io
import random
import shutil
import tarfile
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data.cache import TokenCache
from data.shards import DamagedCache


@dataclass(frozen=True)
class Span:
    """Position of the content of a member in a tar."""

    key: str
    first: int
    end: int
    codes: int | None
    """Offset of the first code, if this member contains codes."""


def count_cuts(shard: Path, step: int = 64) -> Counter[str]:
    """Truncate a shard after every `step` bytes.

    Counts:
        cuts: all truncations.
        refused: those that raise DamagedCache when the cache is opened.
    """
    counts, content = Counter[str](), shard.read_bytes()
    with _copied(shard) as (folder, tar):
        for length in range(0, len(content), step):
            tar.write_bytes(content[:length])
            counts["cuts"] += 1
            counts["refused"] += _refused(lambda: TokenCache.open(folder))
    return counts


def count_flips(shard: Path, flips: int, seed: int = 0) -> Counter[str]:
    """Flip one random bit of a shard, `flips` times.

    Counts:
        flips: all flips.
        verified: those for which `TokenCache.verify` raises DamagedCache.
        in_samples: flips inside a member.
        named: those in_samples for which `damage` returns one line with the sample's key.
        outside: flips outside all members.
        reported: those outside for which `damage` reports this and all codes can be read.
        in_codes: flips inside codes.
        codes, gather: those in_codes that `TokenCache.codes` and `ClipIndex.gather` refuse.
    """
    counts, spans, draw = Counter[str](), spans_of(shard), random.Random(seed)
    content = bytearray(shard.read_bytes())
    with _copied(shard) as (folder, tar):
        for _ in range(flips):
            place, bit = draw.randrange(len(content)), 1 << draw.randrange(8)
            content[place] ^= bit
            tar.write_bytes(content)
            content[place] ^= bit
            counts["flips"] += 1
            cache = TokenCache.open(folder)
            counts["verified"] += _refused(cache.verify)
            counts.update(_when_read(cache, shard.name, place, spans))
    return counts


def count_metadata_flips(folder: Path, flips: int, seed: int = 0) -> Counter[str]:
    """Flip one random bit of a cache's manifest or of one of its records, `flips` times.

    Counts:
        flips: all flips.
        refused: those that raise DamagedCache when the cache is opened.
    """
    draw, counts = random.Random(seed), Counter[str]()
    with tempfile.TemporaryDirectory() as temporary:
        copy = Path(shutil.copytree(folder, Path(temporary, folder.name)))
        files = [copy / "manifest.json", *sorted((copy / "shards").glob("*.json"))]
        for _ in range(flips):
            path = draw.choices(files, [file.stat().st_size for file in files])[0]
            content = path.read_bytes()
            changed = bytearray(content)
            changed[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
            path.write_bytes(changed)
            counts["flips"] += 1
            counts["refused"] += _refused(lambda: TokenCache.open(copy))
            path.write_bytes(content)
    return counts


def spans_of(shard: Path) -> list[Span]:
    """Positions of the members of an intact shard, read by Python's tarfile."""
    spans = []
    with tarfile.open(shard) as archive:
        for member in archive.getmembers():
            end, codes = member.offset_data + member.size, None
            file = archive.extractfile(member)
            if member.name.endswith(".codes.npy") and file is not None:
                codes = end - np.load(io.BytesIO(file.read()), allow_pickle=False).nbytes
            spans.append(Span(member.name.partition(".")[0], member.offset_data, end, codes))
    return spans


def _when_read(cache: TokenCache, name: str, place: int, spans: list[Span]) -> Counter[str]:
    """Return the counts of `count_flips` for damage of the byte at a position of a shard."""
    shard = next(shard for shard in cache.shards if shard.name == name)
    span = next((span for span in spans if span.first <= place < span.end), None)
    lines, rows = shard.damage(), range(len(shard.video_N))
    if span is None:
        reported = len(lines) == 1 and "outside" in lines[0]
        readable = not any(_refused(lambda row=row: shard.codes(row)) for row in rows)  # type: ignore[misc]
        return Counter(outside=1, reported=reported and readable)
    counts = Counter(in_samples=1, named=len(lines) == 1 and span.key in lines[0])
    if span.codes is None or place < span.codes:
        return counts
    row = next(row for row in rows if shard.key(row) == span.key)
    video = sum(len(other.video_N) for other in cache.shards if other.name < name) + row
    view = (place - span.codes) * int(cache.views_N[video]) // (span.end - span.codes)
    gathered = _refused(lambda: cache.clips.gather(np.array([video]), np.array([view])))
    counts.update(in_codes=1, codes=_refused(lambda: cache.codes(video)), gather=gathered)
    return counts


def _refused(work: Callable[[], object]) -> bool:
    try:
        work()
    except DamagedCache:
        return True
    return False


@contextmanager
def _copied(shard: Path) -> Iterator[tuple[Path, Path]]:
    """Copy the cache of a shard; yield the folder of the copy and the copied tar."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(shutil.copytree(shard.parent.parent, Path(temporary, shard.parent.parent.name)))
        yield folder, folder / "shards" / shard.name
