"""Codes of videos in earlier caches of the same source and settings, so that new videos of a folder are encoded alone.

Legend: V views, t h w the grid of places.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data.cache.reader import TokenCache
from data.clips import ClipCuts
from data.segments import split_path
from data.shards import DamagedCache
from data.sources import Video


def recorded_root(root: Path | None) -> str:
    """Return the root of a source as made_with.json records it."""
    return "built-in" if root is None else str(root.resolve())


@dataclass(frozen=True)
class EarlierVideo:
    """Codes (V, t, h, w) or (V, t, h, w, G), positions of the clips, and members with pixels of a video in an earlier cache."""

    codes_Vthw: np.ndarray
    cuts: ClipCuts
    pixels: Mapping[str, bytes]


class EarlierCodes:
    """Videos of finished caches that differ from a specification only in their videos, and are made of the same files.

    A file is the same if path and size are, and if it was not modified after the earlier cache was finished.
    """

    def __init__(self, caches: Path, preimage: Mapping[str, Any], root: Path | None) -> None:
        """Find the caches.

        Args:
            caches: folder of all caches.
            preimage: specification of the new cache, `CacheSpec.preimage`.
            root: folder to which the paths of the videos are relative; None for built-in videos.
        """
        self._root = root
        self._place: dict[tuple[str, int], tuple[TokenCache, int, float]] = {}
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
            if same and cache.root == recorded_root(root):
                finished = manifest.stat().st_mtime
                for row, video in enumerate(cache.videos):
                    self._place.setdefault((video.path, video.size), (cache, row, finished))

    def has(self, video: Video) -> bool:
        """Return whether the codes of a video are in an earlier cache."""
        place = self._place.get((video.path, video.size))
        return place is not None and self._modified(video) < place[2]

    def _modified(self, video: Video) -> float:
        """Return the time of the last change of a file in seconds since 1970."""
        if self._root is None:
            return 0.0
        file, _ = split_path(video.path)
        try:
            path = self._root / video.path
            return (path if path.exists() else self._root / file).stat().st_mtime
        except OSError:
            return math.inf

    def read(self, video: Video) -> EarlierVideo | None:
        """Read the codes of a video. None if they are in no earlier cache, or damaged."""
        if not self.has(video):
            return None
        cache, row, _ = self._place[video.path, video.size]
        try:
            members, frames, _ = cache.members(row)
            pixels = {name: content for name, content in members.items() if name != "json"}
            cuts = ClipCuts(cache.views(row), frames, cache.facts(row)["rate"])
            return EarlierVideo(cache.codes(row), cuts, pixels)
        except (DamagedCache, OSError):
            return None
