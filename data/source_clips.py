"""Clips of pixels: held-out clips of a source, and clips of a cache, read from the cache or cut again from its videos.

Legend: B clips, T H W C frames, height, width, colours.
"""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import islice

import numpy as np
import torch

from data.cache import TokenCache
from data.cache.reader import JOINED
from data.clip_spec import ClipSpec
from data.clips import ClipCuts, iter_clips, read_clip
from data.decoding import DamagedVideo
from data.recorded import locate
from data.sources import Source, hold_out, load_source, spread

NOTHING_HELD_OUT = (
    "WARNING: nothing is held out, because there is a single video or group, or all held-out videos are damaged: "
    "the numbers are of videos that may be trained on"
)


def canonical_clips(cache: TokenCache, rows: Sequence[int]) -> Iterator[np.ndarray]:
    """Yield the canonical view of each row, uint8 (T, H, W, 3). Raises the same errors as `clips_of`."""
    yield from clips_of(cache, {row: [cache.canonical(row)] for row in rows})


def clips_of(cache: TokenCache, views: Mapping[int, Sequence[int]]) -> Iterator[np.ndarray]:
    """Yield the pixels of some views of each row, uint8 (T, H, W, 3). The views of a row must be in ascending order.

    Raises ValueError if the cache holds no pixels and its videos have changed or disappeared.
    """
    if cache.spec["keep_pixels"] != "none":
        for row, chosen in views.items():
            for view in chosen:
                yield cache.pixels(row, view)
        return
    try:
        source_of = {
            (video.path, video.size): source for source in reversed(sources_of(cache)) for video in source.videos
        }
        for row, chosen in views.items():
            video = cache.videos[row]
            source = source_of.get((video.path, video.size))
            if source is None:
                raise ValueError(f"{video.path} has changed or disappeared")
            for view, clip in enumerate(islice(iter_clips(source, video, cache.clip), chosen[-1] + 1)):
                if view in chosen and not isinstance(clip, ClipCuts):
                    yield clip
    except (OSError, ValueError, DamagedVideo) as error:
        videos = cache.made_with["videos"]
        raise ValueError(f"the videos of {cache.address} ({videos}) cannot be read again: {error}") from None


def sources_of(cache: TokenCache) -> list[Source]:
    """List the videos that a cache was made of again. Raises the errors of `load_source`."""
    near = () if cache.remote else (cache.address,)
    names = cache.made_with["videos"].split(JOINED)
    return [load_source(locate(name, *near, fits=partial(_has_videos_of, cache))) for name in names]


def _has_videos_of(cache: TokenCache, place: str) -> bool:
    """Return whether a place is a source with a video of the cache."""
    try:
        found = load_source(place).videos
    except (OSError, ValueError):
        return False
    return not {(video.path, video.size) for video in cache.videos}.isdisjoint(
        (video.path, video.size) for video in found
    )


def held_out_clips(source: Source, clip: ClipSpec, most: int, skipped: dict[str, str]) -> torch.Tensor:
    """Return the canonical clips of up to `most` held-out videos, uint8 (B, T, H, W, 3).

    The videos are spread evenly over the held-out videos. Damaged videos are left out and added to `skipped` with the
    reason. If no held-out video can be used (`nothing_held_out`), training videos are used. Raises ValueError if no video can
    be used.
    """
    train_rows, held_out_rows = hold_out(source.videos)
    clips: list[np.ndarray] = []
    for candidates in (spread(held_out_rows, most), held_out_rows, train_rows):
        for row in candidates:
            video = source.videos[row]
            if video.path in skipped:
                continue
            try:
                clips.append(read_clip(source, video, clip, 0))
            except DamagedVideo as damage:
                skipped[video.path] = str(damage)
            if len(clips) == most:
                break
        if clips:
            return torch.from_numpy(np.stack(clips))
    path, reason = next(iter(skipped.items()))
    raise ValueError(f"none of the {len(skipped)} videos tried can be used; the first, {path}: {reason}")


def nothing_held_out(source: Source, skipped: Mapping[str, str]) -> bool:
    """Return whether `held_out_clips`, which has filled `skipped`, had to use training videos."""
    return all(source.videos[row].path in skipped for row in hold_out(source.videos)[1])
