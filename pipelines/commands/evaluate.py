"""Evaluate a fine-tuned classifier on labelled videos."""

import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from ar_model.folds import shortened
from data.clips import ClipCuts, iter_test_views, read_clip
from data.files import sha256_of, write_bytes
from data.sources import Source, Video, load_source
from data.text import escaped
from pipelines.engine.console import progress, say, say_notes
from pipelines.engine.device import cores, resolve_precision, start_accelerator
from pipelines.engine.preprocessing import model_digest, model_folder
from pipelines.engine.run import Run
from pipelines.engine.run_files import find_run
from pipelines.evaluation.classification import Prediction, measures, predictions_csv
from pipelines.evaluation.training_videos import seen_in_training
from pipelines.inference.video_model import VideoClassifier, load_model
from pipelines.inference.windows import BATCH, Compute, windows_of_videos
from pipelines.reporting.evaluation_page import write_evaluation_page
from pipelines.settings.evaluate import Evaluate

_NAMED = 20
"""Missing and undecodable videos that are named on stderr; all are in the summary."""


def main(config: Evaluate, settings: str) -> dict[str, Any]:
    """Predict the class of each video, write the predictions and the page, and return the measures."""
    began = time.perf_counter()
    place = find_run(None, "finetune", flag="--model") if config.model is None else config.model
    accelerator = start_accelerator(resolve_precision(config.precision))
    model = load_model(place, tokenizer=config.tokenizer, trust=config.trust)
    if not isinstance(model, VideoClassifier):
        raise ValueError(f"--model {place}: must be a classifier of finetune, got a pre-trained model")
    model.to(accelerator.device)
    source = load_source(config.videos, allow_missing=True)
    say_notes(accelerator, config.videos, source)
    split, videos = _evaluated(config, source)
    missing = [video for video in source.missing if split in ("all", video.split) and video.label is not None]
    listed = sha256_of(sorted([v.path, v.label, v.group, v.split] for v in (*videos, *missing)))
    _check_classes(config, videos, model.classes)
    weights = model_digest(place)
    run = Run("evaluate", config, settings, about=sha256_of([weights, source.digest, listed]))
    if not run.begin_unless_finished(accelerator):
        return run.summary()
    _say_unused(accelerator, videos, missing, source)
    seen = seen_in_training(model_folder(place), videos)
    if seen:
        say(
            accelerator,
            f"WARNING: {seen} of {len(videos)} videos were used to train the classifier: the accuracy is too good",
        )
    own = videos[accelerator.process_index :: accelerator.num_processes]
    predictions = []
    with progress(accelerator, len(own), "evaluate") as bar:
        for prediction in _predictions(config, accelerator, model, source, own):
            predictions.append(prediction)
            bar.update()
    gathered = gather_object(predictions)
    if not accelerator.is_main_process:
        accelerator.wait_for_everyone()
        return {}
    predictions = sorted(gathered, key=lambda prediction: prediction.path)
    damaged = [{"path": one.path, "reason": one.damage} for one in predictions if one.damage is not None]
    for entry in damaged[:_NAMED]:
        say(accelerator, f"undecodable, counted as an error: {entry['path']}: {entry['reason']}")
    found = measures(predictions, model.classes)
    file = run.folder / "predictions.csv"
    write_bytes(file, predictions_csv(predictions, model.classes).encode(errors="surrogateescape"))
    page = run.folder / "evaluation.html"
    summary = {
        "model": str(place),
        "weights": weights,
        "videos": config.videos,
        "list": listed,
        "split": split,
        "views": config.views,
        **found,
        "seen_in_training": seen,
        "missing": len(missing),
        "undecodable": len(damaged),
        "missing_videos": [video.path for video in missing],
        "undecodable_videos": damaged,
        "predictions": str(file),
        "page": str(page),
        "seconds": round(time.perf_counter() - began, 1),
    }
    video_of = {video.path: video for video in videos}
    write_evaluation_page(
        page, summary, model.classes, predictions, lambda path: read_clip(source, video_of[path], model.clip, 0)
    )
    return run.finish(accelerator, summary)


def _evaluated(config: Evaluate, source: Source) -> tuple[str, list[Video]]:
    """Return the name of the evaluated split and its labelled videos.

    Raises:
        ValueError: if there are none.
    """
    splits = {video.split for video in source.videos}
    split = config.split
    if split == "auto":
        split = "test" if "test" in splits else "val" if "val" in splits else "all"
        if split == "all" and "train" in splits:
            others = splits - {"train", None}
            names = shortened(sorted(map(str, others)) or ["train"])
            raise ValueError(f"{escaped(config.videos)}: has no split test or val, got {names}; give --split")
    videos = [video for video in source.videos if split in ("all", video.split) and video.label is not None]
    if not videos:
        raise ValueError(f"{escaped(config.videos)}: has no labelled videos of the split {split}")
    return split, videos


def _check_classes(config: Evaluate, videos: Sequence[Video], classes: Sequence[str]) -> None:
    """Raise a ValueError if the classifier knows none of the labels."""
    labels = sorted({str(video.label) for video in videos})
    if not set(labels) & set(classes):
        known = f"the classifier knows {shortened(classes)}"
        raise ValueError(f"{escaped(config.videos)}: no label is a class of the model: {shortened(labels)}; {known}")


def _say_unused(accelerator: Accelerator, videos: Sequence[Video], missing: Sequence[Video], source: Source) -> None:
    """Print which videos of the split are missing, and how many have no label."""
    if missing:
        hint = "paths are relative to the folder of the list"
        listed = len(videos) + len(missing)
        say(accelerator, f"{len(missing)} of {listed} listed videos are missing and not evaluated ({hint}):")
        for video in missing[:_NAMED]:
            say(accelerator, f"  {video.path}")
    if unlabelled := sum(video.label is None for video in source.videos):
        say(accelerator, f"{unlabelled} of {len(source.videos)} videos have no label and are not evaluated")


def _predictions(
    config: Evaluate, accelerator: Accelerator, model: VideoClassifier, source: Source, videos: Sequence[Video]
) -> Iterator[Prediction]:
    """Yield the prediction for each video: the mean of the probabilities of its views."""
    clips, crops = config.clips_and_crops()
    workers = max(0, cores(accelerator) - 1) if config.workers is None else config.workers

    def cut(video: Video) -> Iterator[np.ndarray | ClipCuts]:
        return iter_test_views(source, video, model.clip, clips, crops)

    for found in windows_of_videos(model, videos, cut, _probabilities(accelerator, model), workers, dense=False):
        video, damage = found.video, found.damage
        share_C = None if damage is not None else np.mean(found.results, axis=0)
        yield Prediction(video.path, str(video.label), video.group, share_C, damage)


def _probabilities(accelerator: Accelerator, model: VideoClassifier) -> Compute:
    """Return the function that computes the probabilities of the classes for each window of a batch.

    A batch is filled to a fixed size, so that the numbers do not depend on the number of processes and of other videos.
    """

    @torch.inference_mode()
    def compute(batch: dict[str, Tensor]) -> list[np.ndarray]:
        size = len(next(iter(batch.values())))
        filled = {
            key: torch.cat([value, value[:1].expand(BATCH - size, *value.shape[1:])]) for key, value in batch.items()
        }
        with accelerator.autocast():
            logits_BC = model.classifier.logits(filled)[:size]
        return list(logits_BC.double().softmax(1).cpu().numpy())

    return compute
