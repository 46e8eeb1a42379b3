"""Bits of a cache's codes: per place of the grid and per second of video, so that tokenizers can be compared."""

import math
from statistics import fmean

from data.cache import TokenCache
from data.sources import spread

_VIDEOS = 16
"""Videos whose recorded frame rates are read, spread over the cache."""


def clip_seconds(cache: TokenCache) -> float | None:
    """Return the seconds of video that a clip covers, the mean over some videos, or None if no frame rate is known."""
    clip = cache.clip
    # Each other video of a remote cache may need another shard to be fetched.
    rows = spread(range(len(cache)), 1 if cache.remote else _VIDEOS)
    rates = [clip.rate] if clip.rate else [cache.facts(row)["rate"] for row in rows]
    seconds = [clip.frames * clip.stride / rate for rate in rates if rate]
    return fmean(seconds) if seconds else None


def bits_per_second(cache: TokenCache, bits_per_code: float) -> float | None:
    """Return the bits for one second of video if a code takes `bits_per_code`, or None if no frame rate is known."""
    seconds = clip_seconds(cache)
    return None if seconds is None else bits_per_code * math.prod(cache.layout.shape) / seconds


def fixed_bits(cache: TokenCache) -> float:
    """Return the bits of a code without entropy coding, the mean over the codes of a place."""
    return fmean(map(math.log2, cache.layout.vocabularies))
