"""Fit a linear tokenizer to videos."""

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from data.ahead import ahead
from data.clip_spec import ClipSpec
from data.clips import read_clip
from data.decoding import DamagedVideo
from data.source_clips import NOTHING_HELD_OUT, held_out_clips, nothing_held_out
from data.sources import Source, Video, load_source, spread, training_rows
from pipelines.engine.config import flags_of, parse
from pipelines.engine.console import progress, say, say_notes
from pipelines.engine.device import cores, start_accelerator
from pipelines.engine.run import Run
from pipelines.evaluation.reconstruction import VALIDATION_CLIPS, reconstruct
from pipelines.reporting.samples import write_samples
from pipelines.settings.fit_tokenizer import FitTokenizer
from tokenizer import Linear
from tokenizer.linear import DEFAULT


def main(config: FitTokenizer, settings: str) -> dict[str, Any]:
    """Fit a tokenizer to the videos, and return the summary."""
    source = load_source(config.videos)
    run = Run("fit_tokenizer", config, settings, about=source.digest)
    accelerator = start_accelerator()
    say_notes(accelerator, config.videos, source)
    return fit(run, accelerator, config, source)


def is_unfitted(tokenizer: str) -> bool:
    """Return whether a tokenizer setting names a linear tokenizer to be fitted, and not a folder: `linear` always does."""
    named = tokenizer.startswith("linear-") and "/" not in tokenizer
    return tokenizer == "linear" or (named and not Path(tokenizer).exists())


def fitted(accelerator: Accelerator, name: str, videos: str, clip: ClipSpec, source: Source) -> str:
    """Fit the linear tokenizer `name` to videos with the default settings, and return its run folder.

    `linear` alone is the default name. A tokenizer that was fitted before is used again.
    """
    name = DEFAULT if name == "linear" else name
    config, settings = parse(FitTokenizer, ["--videos", videos, f"--name={name}", *flags_of("clip", clip.to_json())])
    run = Run("fit_tokenizer", config, settings, about=source.digest, wait=True)
    return fit(run, accelerator, config, source)["run"]


def fit(run: Run, accelerator: Accelerator, config: FitTokenizer, source: Source) -> dict[str, Any]:
    """Fit and save a tokenizer, and return the summary. A finished run is not fitted again.

    Raises:
        ValueError: if the name is invalid or does not fit the clips, there are no training videos, or the clips vary too little.
    """
    began = time.perf_counter()
    Linear(name=config.name).codes_shape(config.clip.frames, config.clip.size, config.clip.size)
    rows, _ = training_rows(source.videos, config.videos)
    if not run.begin_unless_finished(accelerator):
        return run.summary()
    # Fitting takes seconds, so the other processes wait.
    failure: str | None = None
    if accelerator.is_main_process:
        try:
            _fit_alone(run, accelerator, config, source, spread(rows, config.clips), began)
        except (OSError, ValueError) as error:
            failure = str(error)
    if (failure := broadcast_object_list([failure])[0]) is not None:
        raise ValueError(failure)
    return run.summary()


def _fit_alone(
    run: Run, accelerator: Accelerator, config: FitTokenizer, source: Source, rows: Sequence[int], began: float
) -> None:
    """Fit the tokenizer, save it with samples of held-out clips, and write the summary."""
    skipped: dict[str, str] = {}
    clips_BTHWC = _clips(accelerator, config.clip, source, rows, skipped)
    tokenizer = Linear.fit(config.name, clips_BTHWC)
    pixels_BTHWC = held_out_clips(source, config.clip, VALIDATION_CLIPS, skipped)
    is_training = nothing_held_out(source, skipped)
    if is_training:
        say(accelerator, NOTHING_HELD_OUT)
    numbers, video_BTHWC = reconstruct(tokenizer, pixels_BTHWC, torch.device("cpu"))
    write_samples(run.folder / "samples", 0, pixels_BTHWC, video_BTHWC)
    facts = {
        "fitted to": f"{len(clips_BTHWC)} clips",
        "clips": ", ".join(f"{name} {json.dumps(value)}" for name, value in config.clip.to_json().items()),
        "levels of the components": str([list(levels) for levels in tokenizer.levels]),
        "PSNR": f"{numbers['psnr']:.2f} dB on {len(pixels_BTHWC)} {'training' if is_training else 'held-out'} clips",
    }
    tokenizer.save_pretrained(run.folder / "model", model_card_kwargs={"training": facts})
    for path, reason in skipped.items():
        say(accelerator, f"skipped {path}: {reason}")
    summary = {"run": str(run.folder), "tokenizer": tokenizer.name, "levels": tokenizer.levels, **numbers}
    summary |= {"clips": len(clips_BTHWC), "held_out": 0 if is_training else len(pixels_BTHWC), "skipped": len(skipped)}
    run.finish_alone({**summary, "seconds": round(time.perf_counter() - began, 1)})


def _clips(
    accelerator: Accelerator, clip: ClipSpec, source: Source, rows: Sequence[int], skipped: dict[str, str]
) -> torch.Tensor:
    """Return the first clip of each video, uint8 (B, T, H, W, 3). Raises ValueError if no video can be used."""

    def decoded(video: Video) -> Iterator[np.ndarray]:
        yield read_clip(source, video, clip, 0)

    clips: list[np.ndarray] = []
    decoding = ahead((source.videos[row] for row in rows), decoded, cores(accelerator), 1)
    with progress(accelerator, len(rows), "fit_tokenizer") as bar, closing(decoding) as videos:
        for video, parts in videos:
            try:
                clips += parts
            except DamagedVideo as damage:
                skipped[video.path] = str(damage)
            bar.update()
    if not clips:
        path, reason = next(iter(skipped.items()))
        raise ValueError(f"none of the {len(skipped)} videos tried can be used; the first, {path}: {reason}")
    return torch.from_numpy(np.stack(clips))
