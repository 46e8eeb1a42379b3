"""Share of damage that is not detected: our cache compared with the same shard read by plain webdataset."""

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
_NPY_HEADER = 128
"""Bytes before the codes of an .npy member."""


def measure(folder: Path, scale: float) -> Iterator[Row]:
    """Yield the percentage of trials without detection, for shards cut short, flipped bits and flipped bits of codes."""
    cache = synthetic_cache(folder / "whole", numbered_videos(_VIDEOS), views=2, codes_shape=(4, 8, 8))
    damaged = Path(shutil.copytree(cache, folder / "damaged"))
    tar = damaged / "shards" / "000000.tar"
    content = tar.read_bytes()
    intact = _webdataset_reads(tar)
    draw = random.Random(0)
    trials = max(20, int(1000 * scale))

    def row(what: str, contents: list[bytes], check: Callable[[TokenCache], None]) -> Row:
        ours = theirs = 0.0
        for changed in contents:
            tar.write_bytes(changed)
            ours += _passes(damaged, check)
            try:
                theirs += _webdataset_reads(tar) != intact
            except Exception:
                # webdataset and tarfile raise many types of errors; each of them counts as detection.
                continue
        ours, theirs = 100 * ours / len(contents), 100 * theirs / len(contents)
        return Row(what, "%", ours, peer=theirs, alternative="plain webdataset", reach="0")

    cuts = [content[:length] for length in range(0, len(content), 64)]
    yield row(f"a shard cut short at every 64th byte ({len(cuts)}): not detected", cuts, TokenCache.verify)
    flips = [_flip_bit(content, draw.randrange(len(content)), draw) for _ in range(trials)]
    yield row(f"one bit of a shard flipped ({trials}): not detected by verify", flips, TokenCache.verify)
    offsets = _code_offsets(damaged)
    flips = [_flip_bit(content, draw.choice(offsets), draw) for _ in range(trials)]
    yield row(f"one bit of the codes flipped ({trials}): not detected when read", flips, _read_all)


def _passes(cache: Path, check: Callable[[TokenCache], None]) -> bool:
    try:
        check(TokenCache.open(cache))
    except DamagedCache:
        return False
    return True


def _read_all(cache: TokenCache) -> None:
    for row in range(len(cache)):
        cache.codes(row)


def _webdataset_reads(tar: Path) -> list[tuple[str, bytes]]:
    samples = webdataset.WebDataset(str(tar), shardshuffle=False)
    return [(sample["__key__"], sample.get("codes.npy", b"")) for sample in samples]


def _flip_bit(content: bytes, offset: int, draw: random.Random) -> bytes:
    """Return the content with one random bit of the byte at `offset` flipped."""
    changed = bytearray(content)
    changed[offset] ^= 1 << draw.randrange(8)
    return bytes(changed)


def _code_offsets(cache: Path) -> list[int]:
    """Offsets of all bytes of codes in the first shard."""
    record = json.loads((cache / "shards" / "000000.json").read_text())["members"]["codes.npy"]
    offsets: list[int] = []
    for offset, size in zip(record["offset"], record["size"], strict=True):
        offsets.extend(range(offset + _NPY_HEADER, offset + size))
    return offsets
