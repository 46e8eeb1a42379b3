"""Codes of videos in earlier caches of the same source and settings, so that new videos of a folder are encoded alone.

Legend: V views, t h w the grid of places.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data.cache.reader import TokenCache
from data.clips import ClipCuts
from data.shards import DamagedCache
from data.sources import Video


@dataclass(frozen=True)
class EarlierVideo:
    """Codes (V, t, h, w) or (V, t, h, w, G), positions of the clips, and members with pixels of a video in an earlier cache."""

    codes_Vthw: np.ndarray
    cuts: ClipCuts
    pixels: Mapping[str, bytes]


class EarlierCodes:
    """Videos of finished caches that differ from a specification only in their videos, and are made of the same source."""

    def __init__(self, caches: Path, preimage: Mapping[str, Any], source: str) -> None:
        """Find the caches.

        Args:
            caches: folder of all caches.
            preimage: specification of the new cache, `CacheSpec.preimage`.
            source: place of the videos, as made_with.json records it. Other folders may have other videos of the same names.
        """
        self._place: dict[tuple[str, int], tuple[TokenCache, int]] = {}
        # In bf16, the manifest counts the codes that were compared with fp32, which would be counted twice.
        if preimage["precision"] != "fp32":
            return
        for manifest in sorted(caches.glob("*/manifest.json")):
            try:
                cache = TokenCache.open(manifest.parent)
            except (DamagedCache, OSError, ValueError):
                # A damaged cache must not prevent another one from being made.
                continue
            same = cache.spec.keys() == preimage.keys() and all(
                cache.spec[name] == value for name, value in preimage.items() if name != "videos"
            )
            if same and cache.made_with["videos"] == source:
                for row, video in enumerate(cache.videos):
                    self._place.setdefault((video.path, video.size), (cache, row))

    def has(self, video: Video) -> bool:
        """Return whether the codes of a video are in an earlier cache."""
        return (video.path, video.size) in self._place

    def read(self, video: Video) -> EarlierVideo | None:
        """Read the codes of a video. None if they are in no earlier cache, or damaged."""
        place = self._place.get((video.path, video.size))
        if place is None:
            return None
        cache, row = place
        try:
            members, frames, _ = cache.members(row)
            pixels = {name: content for name, content in members.items() if name != "json"}
            cuts = ClipCuts(cache.views(row), frames, cache.facts(row)["rate"])
            return EarlierVideo(cache.codes(row), cuts, pixels)
        except (DamagedCache, OSError):
            return None
