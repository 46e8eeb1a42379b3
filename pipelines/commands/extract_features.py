"""Write the features of videos, computed by a pre-trained model, as .npz files with an index."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from accelerate import Accelerator

from data.cache import TokenCache, find_cache
from data.clip_spec import ClipSpec
from data.files import sha256_of
from data.recorded import to_record
from data.sources import load_source
from pipelines.engine.checkpoints import file_hash
from pipelines.engine.console import progress, say, say_notes
from pipelines.engine.device import cores, resolve_precision, start_accelerator
from pipelines.engine.run import Run
from pipelines.engine.run_files import find_run
from pipelines.inference.feature_files import FeatureFolder
from pipelines.inference.video_model import VideoModel, load_model, model_folder
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

    `count`: number of videos; `identity`: identity of the videos; `windows`: makes the windows of the videos of a shard;
    `clip`: settings that cut the windows; `source`, `cache`: place of the videos or of the cache.
    """

    count: int
    identity: str
    windows: Callable[[int], Iterator[VideoWindows]]
    clip: ClipSpec
    source: str | None = None
    cache: str | None = None


def main(config: ExtractFeatures, settings: str) -> dict[str, Any]:
    """Write the shards that are missing and the index, and return the summary."""
    began = time.perf_counter()
    place = find_run(None, "pretrain_ar") if config.run is None else config.run
    precision = resolve_precision(config.precision)
    accelerator = start_accelerator(precision)
    model = load_model(place, tokenizer=config.tokenizer, trust=config.trust).to(accelerator.device)
    layers = len(model.objective.encoder.blocks)
    layer = config.layer or layers
    if layer > layers:
        raise ValueError(f"layer must be from 1 to {layers} for {place}, got {layer}")
    weights = file_hash(model_folder(place) / "model.safetensors")
    videos = _input(config, accelerator, model, feature_computation(accelerator, model, layer, config.pool))
    run = Run("extract_features", config, settings, about=sha256_of([weights, videos.identity]))
    if not run.begin_unless_finished(accelerator):
        return run.summary()
    folder, count = FeatureFolder(run.folder), videos.count
    shards = -(-count // config.shard_size)
    own = [n for n in range(accelerator.process_index, shards, accelerator.num_processes) if not folder.has(n)]
    bar = progress(accelerator, count, "extract_features", start=config.shard_size * (shards - len(own)))
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
    bar.close()
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


def _input(config: ExtractFeatures, accelerator: Accelerator, model: VideoModel, compute: Compute) -> _Input:
    """Return how the windows of each shard are made, from videos or from a cache."""

    def rows_of(number: int, count: int) -> range:
        return range(number * config.shard_size, min((number + 1) * config.shard_size, count))

    if config.videos is not None:
        source = load_source(config.videos)
        say_notes(accelerator, config.videos, source)
        clip = window_clip(model.preprocessing.clip, config.windows)
        workers = max(0, cores(accelerator) - 1) if config.workers is None else config.workers

        def from_videos(number: int) -> Iterator[VideoWindows]:
            videos = [source.videos[row] for row in rows_of(number, len(source.videos))]
            return windows_of_videos(model, source, videos, clip, compute, workers)

        return _Input(len(source.videos), source.digest, from_videos, clip, source=to_record(config.videos))
    cache = _cache(config, model)

    def from_cache(number: int) -> Iterator[VideoWindows]:
        return windows_of_cache(model, cache, rows_of(number, len(cache)), config.windows, compute)

    address = cache.address if cache.remote else to_record(cache.address)
    return _Input(len(cache), cache.key, from_cache, cache.clip, cache=address)


def _cache(config: ExtractFeatures, model: VideoModel) -> TokenCache:
    """Open the cache, by default that of the run, and check that it fits the model."""
    recorded = model.preprocessing
    cache = TokenCache.open(recorded.cache if config.cache is None else find_cache(config.caches, config.cache))
    if not model.objective.sees_pixels and cache.spec["tokenizer"] != recorded.fingerprint:
        raise ValueError(f"--cache {cache.address}: was made by another tokenizer than that of the model")
    if model.objective.sees_pixels and cache.spec["keep_pixels"] == "none":
        raise ValueError(f"--cache {cache.address}: has no pixels, which the model reads; give --videos")
    if config.windows == "dense" and cache.clip.views != "dense":
        raise ValueError(f"--windows dense: the views of {cache.address} are not dense; give --videos")
    return cache
