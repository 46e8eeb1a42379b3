"""Pre-train a transformer on cached codes (stage two)."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from ar_model.objectives import Objective
from data.cache import TokenCache, find_cache
from data.files import sha256_of
from data.loading import Batch, TokenDataset, blocks_of, evaluation_batches
from data.source_clips import NOTHING_HELD_OUT
from data.sources import spread, training_rows
from pipelines.engine.checkpoints import gathered
from pipelines.engine.code_spec import code_spec, with_likelihood
from pipelines.engine.console import say, say_newest
from pipelines.engine.initial_weights import load_initial_weights, weights_digest
from pipelines.engine.memory import peak_memory
from pipelines.engine.network import prepare_network
from pipelines.engine.plan import plan
from pipelines.engine.preprocessing import record_preprocessing
from pipelines.engine.run import Run
from pipelines.engine.training import fit, make_accelerator, plan_parts
from pipelines.engine.validation import BATCH, validate
from pipelines.inference.snippet import features_snippet
from pipelines.settings.pretrain_ar import Pretrain

VALIDATION_CLIPS = 512
"""Maximum number of clips in a validation."""
_PAIRS_CHECKED = 256
"""Maximum number of videos whose views are compared before training on pairs."""
_EQUAL_PAIRS = 0.1
"""Share of videos with equal views from which on a warning is printed. Random views of a short video are sometimes equal."""


def main(config: Pretrain, settings: str) -> dict[str, Any]:
    """Train, save the model, and return the summary; with --plan return only the estimated cost."""
    cache = TokenCache.open(find_cache(config.caches, config.cache))
    say_newest("--cache", config.cache, cache.address)
    about = cache.key if config.init is None else sha256_of([cache.key, weights_digest(config.init)])
    run = Run("pretrain_ar", config, with_likelihood(settings, cache), about=about)
    accelerator = make_accelerator(config, run)
    if config.plan:
        return plan(accelerator, config, cache, validation_clips=VALIDATION_CLIPS, validation_batch=BATCH)
    torch.manual_seed(config.seed)
    objective = config.objective(code_spec(cache))
    if config.init is not None:
        load_initial_weights(objective, config.init, cache)
    rows, held_out = training_rows(cache.videos, cache.address)
    if not run.begin_unless_finished(accelerator):
        return run.summary()
    parts = plan_parts(accelerator, config, len(rows), blocks_of(cache, rows))
    check_pairs(objective, config)
    dataset = TokenDataset(cache, rows, parts, pixels=objective.needs_pixels, pairs=objective.needs_pairs)
    if accelerator.is_main_process:
        for warning in warnings_of(objective, cache):
            say(accelerator, warning)
    backend = prepare_network(run, accelerator, objective, dataset, config)
    # Read the name now: FSDP changes the class.
    name = type(objective).__name__
    unigram = cache.manifest["unigram_bits"]
    millions = sum(p.numel() for p in objective.parameters()) / 1e6
    precision = "bf16" if accelerator.mixed_precision == "bf16" else "fp32"
    say(
        accelerator,
        f"{name}, {millions:.1f} M parameters, attention {backend}, {precision} on {accelerator.device}; "
        f"cache {cache.name}: {len(rows)} videos for training, {len(held_out)} held out; "
        f"unigram entropy {unigram:.2f} bits per code",
    )
    clips = spread(held_out or rows, VALIDATION_CLIPS)

    def read(some_rows: Sequence[int]) -> Batch:
        return next(evaluation_batches(cache, some_rows, len(some_rows), pixels=objective.needs_pixels))

    def snapshot_and_validate(step: int) -> dict[str, float]:
        if config.snapshots and step < config.steps:
            _save(accelerator, config, cache, objective, run.folder / "snapshots" / f"step_{step:06d}")
        return validate(accelerator, objective, clips, read)

    result = fit(run, accelerator, objective, dataset, config, snapshot_and_validate)
    measured_on = f"{len(clips)} {'held-out' if held_out else 'training'} clips"
    facts = {
        "trained on": f"codes of {len(rows)} videos, {'x'.join(map(str, cache.layout.shape))} per clip",
        "tokenizer": f"{cache.spec['tokenizer'][:12]} (first digits of its fingerprint), {cache.layout.vocab_size} codes",
        "training steps": f"{config.steps} of {config.batch_size} clips",
        **{name: f"{value:.4f} on {measured_on}" for name, value in result.losses.items()},
    }
    _save(accelerator, config, cache, objective, run.folder / "model", facts)
    say(accelerator, f"features of a video in Python:\n{features_snippet(run.folder)}")
    summary = {
        "run": str(run.folder),
        "objective": name,
        "cache": cache.address,
        "tokenizer": cache.spec["tokenizer"],
        "step": config.steps,
        "held_out": len(clips) if held_out else 0,
        "bits_per_code": None,
        **result.losses,
        "unigram_bits": round(unigram, 4) if "bits_per_code" in result.losses else None,
        "clips_per_second": round(result.samples_per_second, 2),
        "peak_memory": peak_memory(accelerator.device),
        "seconds": round(result.seconds, 1),
    }
    return run.finish(accelerator, summary)


def _save(
    accelerator: Accelerator,
    config: Pretrain,
    cache: TokenCache,
    objective: Objective,
    folder: Path,
    training: Mapping[str, str] | None = None,
) -> None:
    """Save the model with its current weights in a folder that `load_model` reads. `training`: facts for its model card."""
    weights = gathered(objective.state_dict(), keep=accelerator.is_main_process)
    if accelerator.is_main_process:
        # FSDP has replaced the modules of the objective: load the weights into a new one.
        with torch.random.fork_rng(), torch.autocast(accelerator.device.type, enabled=False):
            trained = config.objective(code_spec(cache))
        trained.load_state_dict(weights)
        trained.save(folder, training)
        # Snapshots are many, and need no copies.
        record_preprocessing(cache, folder, copy_tokenizer=training is not None and not trained.sees_pixels)


def check_pairs(objective: Objective, config: Pretrain) -> None:
    """Check that each batch of a contrastive objective contains several videos.

    Raises:
        ValueError: if a batch contains one video only.
    """
    videos = config.batch_size // config.accumulate
    if objective.needs_pairs and videos < 2:
        raise ValueError(
            f"{type(objective).__name__} contrasts clips of different videos: "
            f"batch_size / accumulate must be at least 2, got {videos}"
        )


def warnings_of(objective: Objective, cache: TokenCache) -> list[str]:
    """Return the reasons to doubt the results of pre-training: nothing is held out, or clips are contrasted with themselves."""
    rows, held_out = training_rows(cache.videos, cache.address)
    equal = _equal_views(cache, rows) if objective.needs_pairs else None
    return [*([] if held_out else [NOTHING_HELD_OUT]), *([equal] if equal else [])]


def _equal_views(cache: TokenCache, rows: Sequence[int]) -> str | None:
    """Return a warning if a tenth of the videos have only views of the same cut, else None. A sample of the rows is checked."""
    # Each other shard of a remote cache would have to be fetched.
    step = 1 if cache.remote else -(-len(rows) // _PAIRS_CHECKED)
    checked = rows[::step][:_PAIRS_CHECKED]
    equal = sum(len(set(cache.views(row))) == 1 for row in checked)
    if equal < _EQUAL_PAIRS * len(checked):
        return None
    return (
        f"{equal} of {len(checked)} videos looked at have equal views (same frames, crop and mirroring), so the contrastive loss "
        "compares a clip with itself; use longer videos or fewer --clip.frames, or --clip.flip or --clip.scales"
    )
