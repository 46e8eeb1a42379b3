"""Windows of videos with the input of a model: clips cut from videos, or codes from a cache.

Legend: B windows, T H W C frames, height, width, colours.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from data.ahead import ahead
from data.cache import TokenCache
from data.clip_spec import ClipSpec
from data.clips import ClipCuts, View
from data.decoding import DamagedVideo
from data.loading import view_batches
from data.segments import split_path
from data.sources import Video
from pipelines.inference.feature_files import Row
from pipelines.inference.video_model import Features, VideoModel

BATCH = 32
"""Windows of one call of the model."""
_AHEAD = 2**28
"""Maximum number of bytes of decoded clips in memory."""


@dataclass
class VideoWindows:
    """Results of the windows of a video: one array and one row each. `damage`: the reason if the video cannot be used."""

    video: Video
    results: list[np.ndarray] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)
    damage: str | None = None

    @property
    def complete(self) -> bool:
        return self.damage is not None or 0 < len(self.rows) == len(self.results)


Cut = Callable[[Video], Iterator[np.ndarray | ClipCuts]]
"""Cutting of the windows of a video, then their positions."""
Compute = Callable[[dict[str, Tensor]], Sequence[np.ndarray]]
"""Computation of the results of a batch of windows, one array each."""


def feature_computation(accelerator: Accelerator, model: VideoModel, layer: int, pool: str) -> Compute:
    """Return the function that computes the features of a batch of windows.

    Args:
        layer: block of the encoder, counted from 1.
        pool: clip (the mean of all tokens), slices (the mean of each time slice) or none (all tokens).
    """

    def chosen(features: Features) -> Tensor:
        if pool == "clip":
            return features.pooled[layer - 1]
        return (features.slices if pool == "slices" else features.tokens)[layer - 1]

    def compute(batch: dict[str, Tensor]) -> list[np.ndarray]:
        with accelerator.autocast():
            found = model.features_of_batch(batch)
        return [chosen(features).float().cpu().numpy() for features in found]

    return compute


def window_clip(clip: ClipSpec, windows: str) -> ClipSpec:
    """Return the settings that cut windows: the clip in the middle, or dense clips.

    Raises:
        ValueError: if dense clips are asked for and the frames of a clip are spread over the video.
    """
    if windows == "middle":
        return replace(clip, views=1, flip=False, scales=None)
    if clip.span is not None:
        raise ValueError(
            "windows must be middle, got dense: the clips of the model span the whole video (clip.span video)"
        )
    return replace(clip, views="dense", flip=False, scales=None)


def windows_of_videos(
    model: VideoModel, videos: Sequence[Video], cut: Cut, compute: Compute, workers: int, *, dense: bool
) -> Iterator[VideoWindows]:
    """Yield the windows of videos in their order.

    Args:
        cut: yields the windows of a video, of the size of the model's clips, and their positions, as `iter_clips`.
        workers: number of threads that decode the next videos.
        dense: the windows are dense clips, of any number. Others are decoded together.
    """
    clip = model.clip
    clip_bytes = clip.frames * clip.size**2 * 3
    window = max(2, min(len(videos), _AHEAD // (BATCH * clip_bytes)))
    waiting: list[tuple[VideoWindows, np.ndarray, int]] = []
    unfinished: deque[VideoWindows] = deque()

    def flush() -> None:
        if not waiting:
            return
        owners, pixels, valid = zip(*waiting, strict=True)
        batch = model.batch(torch.from_numpy(np.stack(pixels)), np.array(valid))
        for owner, result in zip(owners, compute(batch), strict=True):
            owner.results.append(result)
        waiting.clear()

    def work(video: Video) -> Iterator[tuple[np.ndarray, int] | ClipCuts]:
        return _with_valid_frames(cut(video), clip.frames if dense else None)

    with closing(ahead(videos, work, workers, BATCH, window)) as decoded:
        for video, parts in decoded:
            owner = VideoWindows(video)
            unfinished.append(owner)
            try:
                for part in parts:
                    if isinstance(part, ClipCuts):
                        owner.rows = [
                            _row(video, number, view, part.rate, part.frames) for number, view in enumerate(part.views)
                        ]
                        continue
                    waiting.append((owner, *part))
                    if len(waiting) == BATCH:
                        flush()
            except DamagedVideo as damage:
                owner.damage = str(damage)
            while unfinished and unfinished[0].complete:
                yield unfinished.popleft()
    flush()
    yield from unfinished


def _with_valid_frames(
    parts: Iterator[np.ndarray | ClipCuts], frames: int | None
) -> Iterator[tuple[np.ndarray, int] | ClipCuts]:
    """Add the number of valid frames to each clip.

    `frames`: frames of a clip, if only the last clip of a video may have padding, as of dense clips. None waits for all clips.
    """
    waiting: list[np.ndarray] = []
    for part in parts:
        if isinstance(part, ClipCuts):
            valid = [view.real for view in part.views[len(part.views) - len(waiting) :]]
            yield from zip(waiting, valid, strict=True)
            yield part
            return
        waiting.append(part)
        # A dense video may have any number of clips.
        if frames is not None and len(waiting) > 1:
            yield waiting.pop(0), frames


def windows_of_cache(
    model: VideoModel, cache: TokenCache, rows: Sequence[int], windows: str, compute: Compute
) -> Iterator[VideoWindows]:
    """Yield the windows of some rows of a cache: the canonical view, or all dense views."""
    chosen = {row: list(range(cache.views_N[row])) if windows == "dense" else [cache.canonical(row)] for row in rows}
    places = [(row, view) for row, views in chosen.items() for view in views]
    results: list[np.ndarray] = []
    for batch in view_batches(cache, places, BATCH, pixels=model.objective.sees_pixels):
        results += compute({key: value.to(model.device) for key, value in batch.items()})
    found = iter(results)
    for row, views in chosen.items():
        video, facts, cuts = cache.videos[row], cache.facts(row), cache.views(row)
        rows_of_video = [_row(video, view, cuts[view], facts["rate"], facts["frames"]) for view in views]
        yield VideoWindows(video, [next(found) for _ in views], rows_of_video)


def _row(video: Video, number: int, view: View, rate: float | None, frames: int) -> Row:
    """Return the row of a window, view `number` of a video of `frames` frames, `rate` per second."""
    if not rate:
        return Row.of(video, number, None, None)
    _, part = split_path(video.path)
    offset = 0.0 if part is None else part.start
    start, end = view.start + view.shift / 1000, min(view.start + view.real * view.stride, frames)
    return Row.of(video, number, round(offset + start / rate, 3), round(offset + end / rate, 3))
