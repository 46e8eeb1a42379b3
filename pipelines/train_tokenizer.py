"""Train VQ3D, this project's tokenizer, on a folder of videos."""

if not __package__:  # started as a file: put the repository first, not pipelines/, whose tokenize.py hides Python's own
    import os
    import sys

    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from data.clips import ClipSpec, read_clip
from data.decoding import DamagedVideo
from data.files import write_json
from data.loading import ClipDataset
from data.sources import Source, hold_out, load_source
from pipelines.pictures import reconstruction_grid, save_png
from pipelines.run import Run, command, say
from pipelines.training import Training, fit, make_accelerator, plan_parts
from tokenizer import VQ3D
from tokenizer.base import to_float
from tokenizer.losses import Reconstruction, code_health, psnr

VALIDATION_CLIPS = 96
COLLAPSED = 0.05
"""Share of the codes in use below which nothing that comes later means much."""


@dataclass(kw_only=True)
class TrainTokenizer(Training):
    """Train VQ3D, this project's tokenizer, on a folder of videos."""

    videos: str = "builtin:moving-digits"
    """Folder with a sub-folder per class, list file, or builtin:moving-digits."""
    clip: ClipSpec = field(default_factory=ClipSpec)
    """What a clip is"""
    model: Callable[[], VQ3D] = VQ3D
    """The tokenizer's architecture; --model.help lists its settings."""
    steps: int = 500
    """Optimizer steps."""
    batch_size: int = 16
    """Clips of one step, of all processes together."""
    lr: float = 3e-3
    """Highest learning rate."""
    weight_decay: float = 0.01
    """Of AdamW, on matrices only."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.clip.views == "dense":
            raise ValueError("clip.views dense is for tokenize; train a tokenizer on a number of views")


def main(config: TrainTokenizer, settings: str) -> dict[str, Any]:
    source = load_source(config.videos)
    run = Run("train_tokenizer", config, settings, about=source.digest)
    accelerator = make_accelerator(config, run)
    return train(run, accelerator, config, source)


def train(run: Run, accelerator: Accelerator, config: TrainTokenizer, source: Source) -> dict[str, Any]:
    """Train and save a tokenizer; returns the summary, at once if the run is finished already."""
    torch.manual_seed(config.seed)
    tokenizer = config.model()
    tokenizer.codes_shape(config.clip.frames, config.clip.size, config.clip.size)
    run.begin(accelerator)
    if run.finished:
        say(accelerator, f"{run.folder} is finished: nothing is left to do")
        return run.summary()
    rows, held_out = hold_out(source.videos)
    parts = plan_parts(accelerator, config, len(rows))
    skipped = json.loads(_skipped_file(run).read_text()) if _skipped_file(run).exists() else {}
    module = Reconstruction(tokenizer).to(accelerator.device)
    pixels_BTHWC = validation_clips(source, held_out, rows, config.clip, skipped)

    def validate(step: int) -> dict[str, float]:
        for part in gather_object([skipped]):
            skipped.update(part)
        numbers, video_BTHWC = evaluate(tokenizer, pixels_BTHWC, accelerator.device)
        if accelerator.is_main_process:
            write_json(_skipped_file(run), skipped)
            grid = reconstruction_grid(pixels_BTHWC[:8], video_BTHWC[:8])
            save_png(grid, run.folder / "samples" / f"step_{step:06d}.png")
        return numbers

    dataset = ClipDataset(source, rows, config.clip, parts)
    result = fit(
        run, accelerator, module, dataset, config, validate, watch=lambda batch: skipped.update(batch["skipped"])
    )
    if accelerator.is_main_process:
        tokenizer.save_pretrained(run.folder / "model")
    if result.losses["code_usage"] < COLLAPSED:
        say(
            accelerator,
            collapse_warning(round(result.losses["code_usage"] * tokenizer.vocab_size), tokenizer.vocab_size),
        )
    if skipped:
        say(accelerator, f"{len(skipped)} damaged videos were left out; {_skipped_file(run)} names them")
    summary = {"run": str(run.folder), "step": config.steps, **result.losses, "skipped": len(skipped)}
    return run.finish(accelerator, {**summary, "seconds": round(result.seconds, 1)})


def collapse_warning(used: int, vocabulary: int) -> str:
    return (
        f"WARNING: only {used} of {vocabulary} codes are in use. Bits per code will look good and mean little: "
        "train the tokenizer longer (pipelines/train_tokenizer.py --steps), and look at its pictures first."
    )


def _skipped_file(run: Run) -> Path:
    return run.folder / "skipped.json"


def validation_clips(
    source: Source, held_out: list[int], rows: list[int], clip: ClipSpec, skipped: dict[str, str]
) -> torch.Tensor:
    """Canonical clips of up to 96 held-out videos, uint8 (B, T, H, W, 3); damaged ones are noted and left out.

    Where no held-out video can be used, training videos are.

    Raises:
        ValueError: if no video at all can be used.
    """
    spread = np.linspace(0, len(held_out) - 1, min(len(held_out), VALIDATION_CLIPS)).round().astype(int)
    clips: list[np.ndarray] = []
    for candidates in ([held_out[i] for i in spread], rows):
        for row in candidates if not clips else ():
            video = source.videos[row]
            try:
                clips.append(read_clip(source, video, clip, 0))
            except DamagedVideo as damage:
                skipped[video.path] = str(damage)
            if len(clips) == VALIDATION_CLIPS:
                break
    if not clips:
        path, reason = next(iter(skipped.items()))
        raise ValueError(f"none of the {len(skipped)} videos tried can be used; the first, {path}: {reason}")
    return torch.from_numpy(np.stack(clips))


def evaluate(
    tokenizer: VQ3D, pixels_BTHWC: torch.Tensor, device: torch.device
) -> tuple[dict[str, float], torch.Tensor]:
    """PSNR (mean over clips), code usage and perplexity of held-out clips, and the reconstructed clips, uint8."""
    codes, videos, errors = [], [], []
    for part in pixels_BTHWC.split(16):
        codes.append(tokenizer.encode(part.to(device)))
        videos.append(tokenizer.decode(codes[-1]).cpu())
        errors.append((to_float(part) - to_float(videos[-1])).square().mean((1, 2, 3, 4)))
    health = code_health(torch.bincount(torch.cat(codes).flatten(), minlength=tokenizer.vocab_size))
    numbers = {"psnr": psnr(torch.cat(errors)).mean(), **health}
    return {key: round(value.item(), 4) for key, value in numbers.items()}, torch.cat(videos)


if __name__ == "__main__":
    command(TrainTokenizer, main)
