"""Pixels of windows of a folder of features, cut again from the videos, or read from the cache, that the folder records.

Legend: T H W C frames, height, width, colours.
"""

import os
from pathlib import Path

import numpy as np

from data.cache import TokenCache
from data.cache.storage import is_address
from data.clip_spec import ClipSpec
from data.clips import read_clip
from data.recorded import locate
from data.source_clips import sources_of
from data.sources import BUILTIN, Source, Video, load_source
from pipelines.engine.summaries import Extraction
from pipelines.inference.feature_files import Row


def recorded_clip(folder: Path, extraction: Extraction) -> ClipSpec:
    """Return the settings that have cut the windows of a folder of features. Raises a ValueError if they are malformed."""
    try:
        return ClipSpec(**extraction["clip"])
    except (TypeError, ValueError) as error:
        raise ValueError(f"{folder}/summary.json: clip: {error}") from None


class WindowClips:
    """Clips of the windows of a folder of features."""

    def __init__(self, folder: Path, extraction: Extraction) -> None:
        """Open the cache, or list the videos. `folder`: features, near which moved videos are looked for.

        Raises:
            OSError, ValueError: if there are no such videos or cache any more.
        """
        self._clip = recorded_clip(folder, extraction)
        self._cache: TokenCache | None = None
        self._has_pixels = False
        self._rows: dict[str, int] = {}
        self._sources: list[Source] = []
        if (recorded := extraction["cache"]) is not None:
            self._cache = TokenCache.open(recorded if is_address(recorded) else locate(recorded, folder))
            self._rows = {video.path: row for row, video in enumerate(self._cache.videos)}
            self._has_pixels = self._cache.spec["keep_pixels"] != "none"
            try:
                self._sources = sources_of(self._cache)
            except (OSError, ValueError):
                if not self._has_pixels:
                    raise
        else:
            recorded = extraction["source"] or ""
            place = recorded if recorded.startswith(BUILTIN) else locate(recorded, folder)
            self._sources = [load_source(place)]
        self._found: dict[str, tuple[Source, Video]] = {
            video.path: (source, video) for source in reversed(self._sources) for video in source.videos
        }

    def read(self, row: Row) -> np.ndarray:
        """Return the pixels of a window, uint8 (T, H, W, 3).

        Raises:
            OSError, ValueError, IndexError, DamagedVideo: if its video has changed or disappeared.
        """
        if self._cache is not None and row.path not in self._rows:
            raise ValueError(f"{row.path} is not in {self._cache.address}")
        if self._cache is not None and self._has_pixels:
            return self._cache.pixels(self._rows[row.path], row.view)
        if row.path not in self._found:
            raise ValueError(f"{row.path} has disappeared")
        source, video = self._found[row.path]
        if self._cache is not None and video.size != self._cache.videos[self._rows[row.path]].size:
            raise ValueError(f"{row.path} has changed")
        return read_clip(source, video, self._clip, row.view)

    def path_of(self, file: Path) -> str | None:
        """Return the path of the video of the folder that a file is, or None."""
        for source in self._sources:
            if source.root is None:
                continue
            for place in (os.path.abspath(file), os.path.realpath(file)):
                path = os.path.relpath(place, source.root)
                if path in self._found:
                    return path
        return None
