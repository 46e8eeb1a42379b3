"""Damage that goes unnoticed: this cache beside the same shard read by plain webdataset."""

import json
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import webdataset

from data.cache import TokenCache
from data.shards import DamagedCache
from pipelines.benchmarks import Row
from pipelines.benchmarks.synthetic import numbered_videos, synthetic_cache

_VIDEOS = 16


def measure(folder: Path, scale: float) -> Iterator[Row]:
    """Shares of trials in which damage was not noticed."""
    cache = synthetic_cache(folder / "whole", numbered_videos(_VIDEOS), views=2, codes_shape=(4, 8, 8))
    damaged = Path(shutil.copytree(cache, folder / "damaged"))
    tar = damaged / "shards" / "000000.tar"
    content = tar.read_bytes()
    draw = random.Random(0)
    good = _webdataset_reads(tar)

    cuts = [content[:length] for length in range(0, len(content), 64)]
    yield _row(tar, f"a shard cut short at every 64th byte ({len(cuts)}): unnoticed", cuts, damaged, good)
    flips = [_flipped(content, draw) for _ in range(max(20, int(1000 * scale)))]
    yield _row(tar, f"one bit of a shard flipped ({len(flips)}): unnoticed by verify", flips, damaged, good)
    places = _code_bytes(damaged)
    flips = [_flipped(content, draw, draw.choice(places)) for _ in range(max(20, int(1000 * scale)))]
    tar.write_bytes(content)
    yield _row(tar, f"one bit of the codes flipped ({len(flips)}): unnoticed when read", flips, damaged, good, _read)


def _row(
    tar: Path,
    what: str,
    contents: list[bytes],
    damaged: Path,
    good: object,
    notice: Callable[[TokenCache], None] | None = None,
) -> Row:
    ours = theirs = 0
    for content in contents:
        tar.write_bytes(content)
        ours += _passes(damaged, notice or TokenCache.verify)
        try:
            seen = _webdataset_reads(tar)
        except Exception:  # whatever webdataset and tarfile raise counts as noticed
            continue
        theirs += seen is not None and (seen != good or notice is not None)
    total = len(contents)
    return Row(
        what=what,
        unit="%",
        ours=100 * ours / total,
        peer=100 * theirs / total,
        alternative="plain webdataset",
        reach="0",
    )


def _passes(cache: Path, notice: Callable[[TokenCache], None]) -> bool:
    try:
        notice(TokenCache.open(cache))
    except DamagedCache:
        return False
    return True


def _read(cache: TokenCache) -> None:
    for row in range(len(cache)):
        cache.codes(row)


def _webdataset_reads(tar: Path) -> list[tuple[str, bytes]]:
    samples = webdataset.WebDataset(str(tar), shardshuffle=False)
    return [(sample["__key__"], sample.get("codes.npy", b"")) for sample in samples]


def _flipped(content: bytes, draw: random.Random, place: int | None = None) -> bytes:
    changed = bytearray(content)
    changed[draw.randrange(len(changed)) if place is None else place] ^= 1 << draw.randrange(8)
    return bytes(changed)


def _code_bytes(cache: Path) -> list[int]:
    """Offsets of all bytes of codes in the first shard."""
    record = json.loads((cache / "shards" / "000000.json").read_text())["members"]["codes.npy"]
    return [offset + i for offset, size in zip(record["offset"], record["size"], strict=True) for i in range(128, size)]
