"""The pixels behind a cache: kept in it, or cut again from the videos it was made of.

Legend: T H W C frames, height, width, colours.
"""

from collections.abc import Iterator, Mapping, Sequence
from itertools import islice

import numpy as np

from data.cache import TokenCache
from data.cache.reader import JOINED
from data.clips import Cuts, iter_clips
from data.decoding import DamagedVideo
from data.sources import load_source


def canonical_clips(cache: TokenCache, rows: Sequence[int]) -> Iterator[np.ndarray]:
    """The canonical view of each of the given rows, uint8 (T, H, W, 3).

    Raises:
        ValueError: if the cache kept no pixels and the videos have changed or gone.
    """
    yield from clips_of(cache, {row: [cache.canonical(row)] for row in rows})


def clips_of(cache: TokenCache, views: Mapping[int, Sequence[int]]) -> Iterator[np.ndarray]:
    """The pixels of some views, in rising order, of each row, uint8 (T, H, W, 3); raises as above."""
    if cache.spec["keep_pixels"] != "none":
        yield from (cache.pixels(row, view) for row, wanted in views.items() for view in wanted)
        return
    videos = cache.made_with["videos"]
    try:
        sources = [load_source(name) for name in videos.split(JOINED)]
        source_of = {(video.path, video.size): source for source in reversed(sources) for video in source.videos}
        for row, wanted in views.items():
            video = cache.videos[row]
            source = source_of.get((video.path, video.size))
            if source is None:
                raise ValueError(f"{video.path} is gone or has changed")
            clips = islice(iter_clips(source, video, cache.clip), wanted[-1] + 1)
            yield from (clip for view, clip in enumerate(clips) if view in wanted and not isinstance(clip, Cuts))
    except (OSError, ValueError, DamagedVideo) as error:
        raise ValueError(f"the videos of {cache.address} ({videos}) cannot be read again: {error}") from None
