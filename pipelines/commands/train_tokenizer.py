"""Train VQ3D, this project's tokenizer, on a folder of videos."""

import json
import math
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from data.files import write_json
from data.loading import ClipDataset
from data.schema import conform
from data.source_clips import NOTHING_HELD_OUT, held_out_clips, nothing_held_out
from data.sources import Source, load_source, training_rows
from pipelines.engine.averaging import WeightAverage
from pipelines.engine.console import say, say_notes
from pipelines.engine.run import Run
from pipelines.engine.run_files import metrics_of, read_json
from pipelines.engine.training import fit, make_accelerator, plan_parts
from pipelines.evaluation.collapse import CollapseAlarm
from pipelines.evaluation.reconstruction import VALIDATION_CLIPS, reconstruct
from pipelines.reporting.samples import write_samples
from pipelines.settings.train_tokenizer import TrainTokenizer
from tokenizer import VQ3D, VideoTokenizer
from tokenizer.losses import Reconstruction


def main(config: TrainTokenizer, settings: str) -> dict[str, Any]:
    """Train a tokenizer on the videos, and return the summary."""
    source = load_source(config.videos)
    run = Run("train_tokenizer", config, settings, about=source.digest)
    accelerator = make_accelerator(config, run)
    say_notes(accelerator, config.videos, source)
    return train(run, accelerator, config, source)


def train(run: Run, accelerator: Accelerator, config: TrainTokenizer, source: Source) -> dict[str, Any]:
    """Train and save a tokenizer, and return the summary. A finished run is not trained again.

    Raises:
        ValueError: if FSDP is used, the settings contradict the clips or each other, or there are no training videos.
    """
    if accelerator.is_fsdp2:
        raise ValueError("tokenizers do not train under FSDP: use an accelerate configuration without it")
    torch.manual_seed(config.seed)
    tokenizer = config.model()
    grid = tokenizer.codes_shape(config.clip.frames, config.clip.size, config.clip.size)
    if config.accumulate > 1 and tokenizer.quantizer.updated_in_forward:
        raise ValueError(
            f"accumulate must be 1 for {tokenizer.name}, got {config.accumulate}: "
            "its codebook is updated in every forward pass"
        )
    module = Reconstruction(tokenizer, config.loss)
    rows, _ = training_rows(source.videos, config.videos)
    if not run.begin_unless_finished(accelerator):
        return run.summary()
    parts = plan_parts(accelerator, config, len(rows))
    skipped_file = run.folder / "skipped.json"
    skipped = conform(read_json(skipped_file), dict[str, str], str(skipped_file)) if skipped_file.exists() else {}
    module.to(accelerator.device)
    average = WeightAverage(tokenizer, config.average) if config.average else None
    result_of_training = tokenizer if average is None else average.module
    assert isinstance(result_of_training, VQ3D)
    pixels_BTHWC = held_out_clips(source, config.clip, VALIDATION_CLIPS, skipped)
    is_training = nothing_held_out(source, skipped)
    if is_training:
        say(accelerator, NOTHING_HELD_OUT)
    codes = len(pixels_BTHWC) * math.prod(grid) * tokenizer.codes_per_place
    alarm = CollapseAlarm(sum(tokenizer.vocabularies), codes, tokenizer.quantizer.advice)
    # Restore the state of the alarm in a resumed run.
    for line in metrics_of(run.folder):
        if "val_dead_codes" in line:
            alarm.check(int(line["step"]), line["val_dead_codes"])

    def validate(step: int) -> dict[str, float]:
        numbers, video_BTHWC = reconstruct(result_of_training, pixels_BTHWC, accelerator.device)
        numbers["weights"] = _equal_on_all_ranks(result_of_training, step)
        if accelerator.is_main_process:
            write_samples(run.folder / "samples", step, pixels_BTHWC, video_BTHWC)
        if warning := alarm.check(step, numbers["dead_codes"]):
            say(accelerator, warning)
        return numbers

    def watch(batch: dict[str, Any]) -> None:
        skipped.update(batch["skipped"])

    def record_skipped() -> None:
        # A run that is resumed from the next checkpoint does not read these videos again.
        for part in gather_object([skipped]):
            skipped.update(part)
        if accelerator.is_main_process:
            write_json(skipped_file, skipped)

    dataset = ClipDataset(source, rows, config.clip, parts)
    result = fit(
        run, accelerator, module, dataset, config, validate, watch=watch, before_save=record_skipped, average=average
    )
    if accelerator.is_main_process:
        clips = "training" if is_training else "held-out"
        facts = {
            "trained on": f"{len(rows)} videos",
            "clips": ", ".join(f"{name} {json.dumps(value)}" for name, value in config.clip.to_json().items()),
            "training steps": f"{config.steps} of {config.batch_size} clips",
            "PSNR": f"{result.losses['psnr']:.2f} dB on {len(pixels_BTHWC)} {clips} clips",
            "codes in use": f"{100 * result.losses['code_usage']:.1f} % on these clips",
        }
        result_of_training.save_pretrained(run.folder / "model", model_card_kwargs={"training": facts})
    if skipped:
        say(accelerator, f"skipped {len(skipped)} damaged videos, see {skipped_file}")
    numbers = {key: value for key, value in result.losses.items() if key != "weights"}
    summary = {"run": str(run.folder), "tokenizer": tokenizer.name, "step": config.steps, **numbers}
    summary["held_out"] = 0 if is_training else len(pixels_BTHWC)
    return run.finish(accelerator, {**summary, "skipped": len(skipped), "seconds": round(result.seconds, 1)})


def _equal_on_all_ranks(tokenizer: VideoTokenizer, step: int) -> int:
    """Return the first 32 bits of the checksum of the weights.

    Raises:
        RuntimeError: if the weights differ between ranks.
    """
    hashes = set(gather_object([tokenizer.fingerprint()]))
    if len(hashes) > 1:
        raise RuntimeError(f"step {step}: the weights of the tokenizer differ between ranks; this is a bug")
    return int(hashes.pop()[:8], 16)
