"""Bits of a cache's codes: per place of the grid and per second of video, so that tokenizers can be compared."""

import math
from statistics import fmean

from data.cache import TokenCache
from data.sources import spread

_VIDEOS = 16
"""Videos whose records are read, spread over the cache."""


def clip_seconds(cache: TokenCache) -> float | None:
    """Return the seconds of the valid frames of a clip, the mean over some videos, or None if no frame rate is known."""
    # Each other video of a remote cache may need another shard to be fetched.
    rows = spread(range(len(cache)), 1 if cache.remote else _VIDEOS)
    all_facts = [cache.facts(row) for row in rows]
    seconds = [fmean(facts["real"]) * facts["stride"] / facts["rate"] for facts in all_facts if facts["rate"]]
    return fmean(seconds) if seconds else None


def bits_per_second(cache: TokenCache, bits_per_code: float) -> float | None:
    """Return the bits for one second of video if a code takes `bits_per_code`, or None if no frame rate is known."""
    seconds = clip_seconds(cache)
    return None if seconds is None else bits_per_code * math.prod(cache.layout.shape) / seconds


def fixed_bits(cache: TokenCache) -> float:
    """Return the bits of a code without entropy coding, the mean over the codes of a place."""
    return fmean(map(math.log2, cache.layout.vocabularies))
