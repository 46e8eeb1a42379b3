"""The pixels behind a cache: kept in it, or cut again from the videos it was made of."""

from collections.abc import Iterator, Sequence

import numpy as np

from data.cache import TokenCache
from data.clips import read_clips
from data.decoding import DamagedVideo
from data.sources import load_source


def canonical_clips(cache: TokenCache, rows: Sequence[int]) -> Iterator[np.ndarray]:
    """View 0 of the given rows, uint8 (T, H, W, 3).

    Raises:
        ValueError: if the cache kept no pixels and the videos have changed or gone.
    """
    if cache.spec["keep_pixels"] != "none":
        yield from (cache.pixels(row)[0] for row in rows)
        return
    videos = cache.made_with["videos"]
    try:
        source = load_source(videos)
        sizes = {video.path: video.size for video in source.videos}
        for row in rows:
            if sizes.get(cache.videos[row].path) != cache.videos[row].size:
                raise ValueError(f"{cache.videos[row].path} is gone or has changed")
            yield read_clips(source, cache.videos[row], cache.clip).pixels_VTHWC[0]
    except (OSError, ValueError, DamagedVideo) as error:
        raise ValueError(f"the videos of {cache.folder} ({videos}) cannot be read again: {error}") from None
