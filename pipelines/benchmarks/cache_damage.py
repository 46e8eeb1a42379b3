"""Percentage of damage that TokenCache does not detect, compared with plain webdataset on the same shard."""

import json
import random
import shutil
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import webdataset

from data.cache import TokenCache
from data.shards import DamagedCache
from pipelines.benchmarks import Row
from pipelines.benchmarks.synthetic import numbered_videos, synthetic_cache

_VIDEOS = 16
_NPY_HEADER = 128
"""Bytes of the header of an .npy file, before the codes."""


def measure(folder: Path, scale: float) -> Iterator[Row]:
    """Yield the percentage of undetected damage for truncated shards, flipped bits, and flipped bits of codes."""
    cache = synthetic_cache(folder / "whole", numbered_videos(_VIDEOS), views=2, codes_shape=(4, 8, 8))
    damaged = Path(shutil.copytree(cache, folder / "damaged"))
    tar = damaged / "shards" / "000000.tar"
    content = tar.read_bytes()
    intact = _webdataset_reads(tar)
    draw = random.Random(0)
    trials = max(20, int(1000 * scale))
    offsets = _code_offsets(damaged)
    cuts = [content[:length] for length in range(0, len(content), 64)]
    flips = [_flip_bit(content, draw.randrange(len(content)), draw) for _ in range(trials)]
    code_flips = [_flip_bit(content, draw.choice(offsets), draw) for _ in range(trials)]
    for what, contents, check in (
        (f"shard truncated at every 64th byte ({len(cuts)} trials), not detected", cuts, TokenCache.verify),
        (f"one bit of a shard flipped ({trials} trials), not detected by verify", flips, TokenCache.verify),
        (f"one bit of the codes flipped ({trials} trials), not detected when read", code_flips, _read_all),
    ):
        ours = theirs = 0
        for changed in contents:
            tar.write_bytes(changed)
            with suppress(DamagedCache):
                check(TokenCache.open(damaged))
                ours += 1
            # webdataset and tarfile raise many types of errors; each of them counts as detection.
            with suppress(Exception):
                theirs += _webdataset_reads(tar) != intact
        shares = [100 * count / len(contents) for count in (ours, theirs)]
        yield Row(what, "%", shares[0], peer=shares[1], alternative="plain webdataset", reach="0")


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
    """Return the offsets of all bytes of codes in the first shard."""
    record = json.loads((cache / "shards" / "000000.json").read_text())["members"]["codes.npy"]
    members = zip(record["offset"], record["size"], strict=True)
    return [byte for offset, size in members for byte in range(offset + _NPY_HEADER, offset + size)]
