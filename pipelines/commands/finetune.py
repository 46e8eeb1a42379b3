"""Fine-tune a pre-trained model to a classifier of labelled videos."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from safetensors.torch import save as to_bytes
from torch.utils.data import Dataset

from ar_model.classifier import Classifier
from ar_model.objectives import Objective, load_objective
from data.cache import TokenCache, find_cache
from data.files import sha256_of, write_bytes, write_json
from data.loading import Batch, TokenDataset, blocks_of, evaluation_batches
from data.schema import conform
from data.sources import Source, load_source, spread
from pipelines.commands.tokenize import cache_writer, cached
from pipelines.engine.averaging import WeightAverage
from pipelines.engine.checkpoints import gathered
from pipelines.engine.console import say, say_notes
from pipelines.engine.network import prepare_network
from pipelines.engine.preprocessing import (
    Preprocessing,
    load_tokenizer_of,
    model_digest,
    model_folder,
    preprocessing_of,
    record_preprocessing,
    tokenizer_source,
)
from pipelines.engine.run import Run
from pipelines.engine.run_files import find_run, read_json
from pipelines.engine.training import fit, make_accelerator, plan_parts
from pipelines.engine.validation import validate
from pipelines.evaluation.labelled_parts import LabelledParts, directions
from pipelines.evaluation.training_videos import record_training_videos
from pipelines.inference.snippet import classes_snippet
from pipelines.settings.finetune import Finetune
from pipelines.settings.tokenize import Tokenize

_TRAIN_CLIPS = 512
"""Maximum number of training clips whose accuracy is in the summary."""
_LR_BATCH = 256
"""Clips of a batch for which the learning rate is given."""


class _Best(TypedDict):
    """best.json: the best validation so far."""

    step: int
    accuracy: float
    loss: float


class _LabelledDataset(Dataset):
    """Dataset that adds the class numbers `label_B` to the batches of a cache."""

    def __init__(self, tokens: TokenDataset, label_N: np.ndarray) -> None:
        self._tokens, self._label_N = tokens, label_N

    def __getitem__(self, step: int) -> Batch:
        batch = self._tokens[step]
        return {**batch, "label_B": self._label_N[batch["row_B"]]}


def main(config: Finetune, settings: str) -> dict[str, Any]:
    """Train, save the classifier with the best accuracy on held-out training videos, and return the summary."""
    place = find_run(config.init, "pretrain_ar", flag="--init")
    recorded = preprocessing_of(place)
    weights = model_digest(place)
    cache = source = None
    if config.videos is None:
        cache = _open_cache(config, recorded, place)
        about = sha256_of([cache.key, weights])
    else:
        source = load_source(config.videos)
        about = sha256_of([source.digest, weights])
    run = Run("finetune", config, settings, about=about)
    accelerator = make_accelerator(config, run)
    if accelerator.is_fsdp2:
        raise ValueError("classifiers do not train under FSDP: use an accelerate configuration without it")
    torch.manual_seed(config.seed)
    trunk = load_objective(place, trained=not config.from_scratch)
    if source is not None:
        say_notes(accelerator, str(config.videos), source)
        _check_labels(config, source)
    if not run.begin_unless_finished(accelerator):
        return run.summary()
    if source is not None:
        cache = _cache_of_videos(accelerator, config, place, trunk)
    assert cache is not None
    parts = LabelledParts.of(cache, config.seed)
    for note in parts.notes:
        say(accelerator, note)
    _check_mirroring(config, cache, parts.classes)
    classifier = _classifier(config, trunk, parts.classes)
    return _train(run, accelerator, config, place, cache, parts, classifier)


def _train(
    run: Run,
    accelerator: Accelerator,
    config: Finetune,
    place: Path,
    cache: TokenCache,
    parts: LabelledParts,
    classifier: Classifier,
) -> dict[str, Any]:
    pixels = classifier.trunk.sees_pixels
    plan = plan_parts(accelerator, config, len(parts.train), blocks_of(cache, parts.train))
    dataset = _LabelledDataset(TokenDataset(cache, parts.train, plan, pixels=pixels), parts.label_N)
    depth = len(classifier.layers())
    classifier.lr_scales = {  # type: ignore[assignment]
        parameter: config.layer_decay ** (depth - 1 - number)
        for number, layer in enumerate(classifier.layers())
        for parameter in layer
    }
    backend = prepare_network(run, accelerator, classifier, dataset, config)
    average = WeightAverage(classifier, config.average) if config.average else None
    evaluated = classifier if average is None else average.module
    say(
        accelerator,
        f"{len(parts.classes)} classes, {len(parts.train)} videos to train on, {len(parts.held_out)} to choose the best step; "
        f"attention {backend}; cache {cache.name}",
    )

    def read(rows: Sequence[int]) -> Batch:
        batch = next(evaluation_batches(cache, rows, len(rows), pixels=pixels))
        return {**batch, "label_B": torch.from_numpy(parts.label_N[list(rows)])}

    best = _BestWeights(run.folder)

    def validate_and_keep(step: int) -> dict[str, float]:
        numbers = validate(accelerator, evaluated, parts.held_out, read)
        weights = gathered(evaluated.state_dict(), keep=accelerator.is_main_process)
        if accelerator.is_main_process:
            best.keep_if_better(step, numbers, weights)
        return numbers

    scaled = replace(config, lr=config.lr * config.batch_size / _LR_BATCH)
    result = fit(run, accelerator, classifier, dataset, scaled, validate_and_keep, average=average)
    accelerator.wait_for_everyone()
    weights, found = best.read()
    evaluated.load_state_dict(weights)
    evaluated.eval()
    with torch.no_grad(), accelerator.autocast():
        trained = validate(accelerator, evaluated, spread(parts.train, _TRAIN_CLIPS), read)
    folder = run.folder / "model"
    if accelerator.is_main_process:
        saved = evaluated
        assert isinstance(saved, Classifier)
        saved.save(folder, _facts(config, cache, parts, found))
        record_preprocessing(cache, folder, copy_tokenizer=not pixels)
        record_training_videos(folder, [cache.videos[row] for row in (*parts.train, *parts.held_out)])
    say(accelerator, f"classes of a video in Python:\n{classes_snippet(run.folder)}")
    summary = {
        "run": str(run.folder),
        "model": str(folder),
        "init": None if config.from_scratch else str(place),
        "classes": list(parts.classes),
        "step": found["step"],
        "steps": config.steps,
        "train_accuracy": trained["accuracy"],
        "validation_accuracy": found["accuracy"],
        "held_out": len(parts.held_out),
        "cache": cache.address,
        "seconds": round(result.seconds, 1),
    }
    return run.finish(accelerator, summary)


def _facts(config: Finetune, cache: TokenCache, parts: LabelledParts, found: _Best) -> dict[str, str]:
    """Return the facts of the training for the model card."""
    start = "random weights" if config.from_scratch else "a pre-trained model"
    return {
        "trained on": f"{len(parts.train)} videos, from {start}",
        "tokenizer": f"{cache.spec['tokenizer'][:12]} (first digits of its fingerprint)",
        "training steps": f"{found['step']} of {config.batch_size} clips",
        "accuracy": f"{found['accuracy']:.4f} on {len(parts.held_out)} held-out training videos, on which the step was chosen",
    }


class _BestWeights:
    """Files of the weights with the best accuracy on the held-out videos; of equal ones, those with the lower loss."""

    def __init__(self, folder: Path) -> None:
        self._record, self._weights = folder / "best.json", folder / "best.safetensors"

    def keep_if_better(self, step: int, numbers: dict[str, float], weights: dict[str, torch.Tensor]) -> None:
        best = self._read_record() if self._record.exists() else None
        if best is None or (numbers["accuracy"], -numbers["loss"]) > (best["accuracy"], -best["loss"]):
            # A run that is stopped between the two files repeats this validation, and writes both.
            write_bytes(self._weights, to_bytes(weights))
            write_json(self._record, {"step": step, "accuracy": numbers["accuracy"], "loss": numbers["loss"]})

    def read(self) -> tuple[dict[str, torch.Tensor], _Best]:
        return load_file(self._weights), self._read_record()

    def _read_record(self) -> _Best:
        return conform(read_json(self._record), _Best, str(self._record))


def _classifier(config: Finetune, trunk: Objective, classes: Sequence[str]) -> Classifier:
    return Classifier(
        trunk,
        classes,
        drop_path=config.drop_path,
        keep_tokens=config.keep_tokens,
        smoothing=config.smoothing,
        mixup=config.mixup,
        crop_scale=config.crop_scale,
        flip=config.flip,
    )


def _open_cache(config: Finetune, recorded: Preprocessing, place: Path) -> TokenCache:
    """Open the cache, by default that of the pre-training, and check that its tokenizer is that of the model."""
    if config.cache is None:
        return recorded.open_cache(place)
    cache = TokenCache.open(find_cache(config.caches, config.cache))
    if cache.spec["tokenizer"] != recorded.fingerprint:
        raise ValueError(f"--cache {cache.address}: was made by another tokenizer than the cache of the pre-training")
    return cache


def _cache_of_videos(accelerator: Accelerator, config: Finetune, place: Path, trunk: Objective) -> TokenCache:
    """Return the cache of `config.videos`, with the clips and the tokenizer of the pre-training. It is filled if need be."""
    recorded, model = preprocessing_of(place), model_folder(place)
    assert config.videos is not None
    source = load_source(config.videos)
    named = config.tokenizer or tokenizer_source(model, recorded)
    mirrored = recorded.clip.flip and not directions([str(video.label) for video in source.videos])
    settings = Tokenize(
        videos=config.videos,
        tokenizer=named,
        clip=replace(recorded.clip, views=config.views, flip=mirrored),
        caches=config.caches,
        keep_pixels="jpeg" if trunk.sees_pixels else "none",
        precision=recorded.precision,
        encode_batch=recorded.encode_batch,
        workers=config.workers,
    )
    tokenizer = load_tokenizer_of(model, recorded, config.tokenizer, trust=config.trust)
    writer = cache_writer(settings, source, tokenizer)
    cached(accelerator, writer, settings, source, tokenizer)
    return TokenCache.open(writer.folder)


def _check_labels(config: Finetune, source: Source) -> None:
    """Raise a ValueError if the training videos have fewer than two labels, before they are encoded."""
    labels = {video.label for video in source.videos if video.split in (None, "train")} - {None}
    if len(labels) < 2:
        raise ValueError(f"{config.videos}: needs training videos of at least 2 classes, got {len(labels)}")


def _check_mirroring(config: Finetune, cache: TokenCache, classes: Sequence[str]) -> None:
    """Raise a ValueError if clips are mirrored and mirroring would swap classes."""
    swapped = directions(classes)
    if not swapped:
        return
    if config.flip:
        raise ValueError(f"flip must be false: mirroring swaps classes named after directions, such as {swapped[0]!r}")
    if cache.clip.flip:
        problem = f"some views of {cache.address} are mirrored (clip.flip)"
        raise ValueError(
            f"{problem}, which swaps classes named after directions, such as {swapped[0]!r}; give another --cache"
        )
