"""Clips of pixels to look at: the held-out ones of a source; those behind a cache, kept in it or cut again from its videos.

Legend: B clips, T H W C frames, height, width, colours.
"""

from collections.abc import Iterator, Mapping, Sequence
from itertools import islice

import numpy as np
import torch

from data.cache import TokenCache
from data.cache.reader import JOINED
from data.clips import ClipCuts, ClipSpec, iter_clips, read_clip
from data.decoding import DamagedVideo
from data.sources import Source, hold_out, load_source


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
            yield from (clip for view, clip in enumerate(clips) if view in wanted and not isinstance(clip, ClipCuts))
    except (OSError, ValueError, DamagedVideo) as error:
        raise ValueError(f"the videos of {cache.address} ({videos}) cannot be read again: {error}") from None


NOTHING_HELD_OUT = (
    "of one video nothing can be held out: the numbers are of videos that the tokenizer may have been trained on"
)


def held_out_clips(source: Source, clip: ClipSpec, most: int, skipped: dict[str, str]) -> torch.Tensor:
    """Canonical clips of up to `most` held-out videos, uint8 (B, T, H, W, 3); damaged ones are noted and left out.

    Where no held-out video can be used, training videos are.

    Raises:
        ValueError: if no video at all can be used.
    """
    rows, held_out = hold_out(source.videos)
    spread = np.linspace(0, len(held_out) - 1, min(len(held_out), most)).round().astype(int)
    clips: list[np.ndarray] = []
    for candidates in ([held_out[i] for i in spread], rows):
        for row in candidates if not clips else ():
            video = source.videos[row]
            try:
                clips.append(read_clip(source, video, clip, 0))
            except DamagedVideo as damage:
                skipped[video.path] = str(damage)
            if len(clips) == most:
                break
    if not clips:
        path, reason = next(iter(skipped.items()))
        raise ValueError(f"none of the {len(skipped)} videos tried can be used; the first, {path}: {reason}")
    return torch.from_numpy(np.stack(clips))
