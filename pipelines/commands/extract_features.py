"""Write the features of videos, computed by a pre-trained model, as .npz files with an index."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator

from data.cache import TokenCache, find_cache
from data.clip_spec import ClipSpec
from data.clips import ClipCuts, iter_clips
from data.files import sha256_of
from data.recorded import to_record
from data.sources import Source, Video, load_source
from pipelines.engine.console import progress, say, say_notes
from pipelines.engine.device import cores, resolve_precision, start_accelerator
from pipelines.engine.preprocessing import model_digest
from pipelines.engine.run import Run
from pipelines.engine.run_files import find_run
from pipelines.inference.feature_files import FeatureFolder
from pipelines.inference.video_model import VideoModel, load_model
from pipelines.inference.windows import (
    Compute,
    VideoWindows,
    feature_computation,
    window_clip,
    windows_of_cache,
    windows_of_videos,
)
from pipelines.settings.extract_features import ExtractFeatures

_NAMED = 20
"""Damaged videos that are named on stderr; all are in the summary."""


@dataclass(frozen=True)
class _Input:
    """Videos of all shards.

    `count`: number of videos; `windows`: makes the windows of the videos of a shard; `clip`: settings that cut the windows;
    `source`, `cache`: place of the videos or of the cache.
    """

    count: int
    windows: Callable[[int], Iterator[VideoWindows]]
    clip: ClipSpec
    source: str | None = None
    cache: str | None = None


def main(config: ExtractFeatures, settings: str) -> dict[str, Any]:
    """Write the shards that are missing and the index, and return the summary."""
    began = time.perf_counter()
    place = find_run(None, "pretrain_ar") if config.run is None else config.run
    model = load_model(place, tokenizer=config.tokenizer, trust=config.trust)
    layers = len(model.objective.encoder.blocks)
    layer = config.layer or layers
    if layer > layers:
        raise ValueError(f"layer must be from 1 to {layers} for {place}, got {layer}")
    weights = model_digest(place)
    source = None if config.videos is None else load_source(config.videos)
    cache = _cache(config, model, place) if source is None else None
    identity = cache.key if cache is not None else source.digest  # type: ignore[union-attr]  # there is one of the two
    run = Run("extract_features", config, settings, about=sha256_of([weights, identity]))
    # A run that is continued on another machine keeps its precision.
    precision = run.chosen("precision", resolve_precision(config.precision))
    accelerator = start_accelerator(precision)
    compute = feature_computation(accelerator, model.to(accelerator.device), layer, config.pool)
    if cache is not None:
        videos = _of_cache(config, model, cache, compute)
    else:
        videos = _of_source(config, accelerator, model, source, compute)  # type: ignore[arg-type]
    if not run.begin_unless_finished(accelerator):
        return run.summary()
    run.choose(accelerator, "precision", lambda: precision)
    folder, count = FeatureFolder(run.folder), videos.count
    shards = -(-count // config.shard_size)
    own = [n for n in range(accelerator.process_index, shards, accelerator.num_processes) if not folder.has(n)]
    with progress(accelerator, count, "extract_features", start=config.shard_size * (shards - len(own))) as bar:
        for number in own:
            features, rows, skipped = [], [], {}
            for found in videos.windows(number):
                bar.update()
                if found.damage is not None:
                    skipped[found.video.path] = found.damage
                    continue
                features += found.results
                rows += found.rows
            folder.write(number, features, rows, skipped)
    accelerator.wait_for_everyone()
    if not accelerator.is_main_process:
        accelerator.wait_for_everyone()
        return {}
    damaged = folder.finish(shards)
    for path, reason in damaged[:_NAMED]:
        say(accelerator, f"skipped {path}: {reason}")
    written = [(features_N.shape, len(rows)) for features_N, rows in folder.read()]
    if not written:
        raise ValueError(f"{config.videos or config.cache}: none of the {count} videos can be used")
    summary = {
        "out": str(run.folder),
        "model": to_record(str(place)),
        "weights": weights,
        "source": videos.source,
        "cache": videos.cache,
        "clip": videos.clip.to_json(),
        "videos": count - len(damaged),
        "skipped": len(damaged),
        "damaged": [{"path": path, "reason": reason} for path, reason in damaged],
        "windows": sum(number for _, number in written),
        "width": model.objective.width,
        "shape": list(written[0][0][1:]),
        "layer": layer,
        "pool": config.pool,
        "precision": precision,
        "seconds": round(time.perf_counter() - began, 1),
    }
    return run.finish(accelerator, summary)


def _rows(config: ExtractFeatures, number: int, count: int) -> range:
    """Return the rows of a shard."""
    return range(number * config.shard_size, min((number + 1) * config.shard_size, count))


def _of_source(
    config: ExtractFeatures, accelerator: Accelerator, model: VideoModel, source: Source, compute: Compute
) -> _Input:
    """Return how the windows of each shard are cut from videos."""
    say_notes(accelerator, str(config.videos), source)
    clip = window_clip(model.preprocessing.clip, config.windows)
    workers = max(0, cores(accelerator) - 1) if config.workers is None else config.workers

    def cut(video: Video) -> Iterator[np.ndarray | ClipCuts]:
        return iter_clips(source, video, clip)

    def windows(number: int) -> Iterator[VideoWindows]:
        videos = [source.videos[row] for row in _rows(config, number, len(source.videos))]
        return windows_of_videos(model, videos, cut, compute, workers, dense=clip.views == "dense")

    return _Input(len(source.videos), windows, clip, source=to_record(str(config.videos)))


def _of_cache(config: ExtractFeatures, model: VideoModel, cache: TokenCache, compute: Compute) -> _Input:
    """Return how the windows of each shard are read from a cache."""

    def windows(number: int) -> Iterator[VideoWindows]:
        return windows_of_cache(model, cache, _rows(config, number, len(cache)), config.windows, compute)

    address = cache.address if cache.remote else to_record(cache.address)
    return _Input(len(cache), windows, cache.clip, cache=address)


def _cache(config: ExtractFeatures, model: VideoModel, run: Path) -> TokenCache:
    """Open the cache, by default that of the run, and check that it fits the model."""
    recorded = model.preprocessing
    given = None if config.cache is None else find_cache(config.caches, config.cache)
    cache = recorded.open_cache(run) if given is None else TokenCache.open(given)
    if not model.objective.sees_pixels and cache.spec["tokenizer"] != recorded.fingerprint:
        raise ValueError(f"--cache {cache.address}: was made by another tokenizer than that of the model")
    if model.objective.sees_pixels and cache.spec["keep_pixels"] == "none":
        raise ValueError(f"--cache {cache.address}: has no pixels, which the model reads; give --videos")
    if config.windows == "dense" and cache.clip.views != "dense":
        raise ValueError(f"--windows dense: the views of {cache.address} are not dense; give --videos")
    return cache
