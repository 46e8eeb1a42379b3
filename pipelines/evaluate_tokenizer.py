"""Put any number of tokenizers through the same held-out clips: table, pictures, JSON."""

if not __package__:  # started as a file: put the repository first, not pipelines/, whose tokenize.py hides Python's own
    import os
    import sys

    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from accelerate import Accelerator

from data.cache.tool import table
from data.clips import ClipSpec
from data.sources import load_source
from pipelines.judging import Judge, Judgement, memory_of
from pipelines.movies import write_mp4
from pipelines.pictures import reconstruction_grid, save_png
from pipelines.run import Run, command, device_name, say, start_accelerator
from pipelines.source_clips import held_out_clips
from tokenizer import load_tokenizer
from tokenizer.lpips import load_lpips
from tokenizer.measures import load_detector

_SHOWN = 4  # clips in pictures


@dataclass(kw_only=True)
class EvaluateTokenizer:
    """Put any number of tokenizers through the same held-out clips: table, pictures, JSON."""

    tokenizers: list[str] = field(
        metadata={"help": "Run folders, save_pretrained folders, hub ids, taming:FOLDER, torchscript:FOLDER."}
    )
    trust: bool = False
    """Run tokenizers, and the detector, that are programs, as TorchScript is."""
    videos: str = "builtin:moving-digits"
    """Folder, list file, or builtin:moving-digits; of them those that train_tokenizer holds out."""
    clip: ClipSpec = field(default_factory=ClipSpec)
    """What a clip is; where a tokenizer takes longer ones only, the last frame is repeated, and left out of what is judged"""
    clips: int = 96
    """The most clips that are judged."""
    batch_size: int = 8
    """Clips that go through a tokenizer together."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Of the tokenizers."""
    lpips: Path | None = None
    """Folder with vgg16-397923af.pth and vgg.pth: adds the perceptual distance LPIPS."""
    detector: Path | None = None
    """The I3D of FVD as TorchScript (i3d_torchscript.pt): adds rFVD. A program: needs --trust."""
    out: Path | None = None
    """Run folder; by default runs/evaluate_tokenizer-<hash of the settings>."""

    def __post_init__(self) -> None:
        if not self.tokenizers:
            raise ValueError("tokenizers is empty: name one at least")
        for name in ("clips", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, but must be at least 1")
        if self.clip.views == "dense":
            raise ValueError("clip.views dense is for tokenize; judge tokenizers on the canonical view")


def main(config: EvaluateTokenizer, settings: str) -> dict[str, Any]:
    source = load_source(config.videos)
    accelerator = start_accelerator()
    tokenizers = [load_tokenizer(name, trust=config.trust) for name in config.tokenizers]
    for tokenizer in tokenizers:
        tokenizer.codes_shape(tokenizer.frames_that_fit(config.clip.frames), config.clip.size, config.clip.size)
    lpips = None if config.lpips is None else load_lpips(config.lpips)
    detector = None if config.detector is None else load_detector(config.detector, config.trust)
    prints = [tokenizer.fingerprint() for tokenizer in tokenizers]
    run = Run("evaluate_tokenizer", config, settings, about=" ".join([source.digest, *prints]))
    run.begin(accelerator)
    if run.finished:
        say(accelerator, f"{run.folder} is finished: nothing is left to do")
    else:
        skipped: dict[str, str] = {}
        pixels_BTHWC = held_out_clips(source, config.clip, config.clips, skipped)
        judge = Judge(
            pixels_BTHWC,
            accelerator.device,
            batch_size=config.batch_size,
            bf16=config.precision == "bf16",
            lpips=lpips,
            detector=detector,
        )
        judgements = []
        for name in config.tokenizers:
            say(accelerator, f"judging {name} on {len(pixels_BTHWC)} clips")
            judgement = judge.judge(load_tokenizer(name, trust=config.trust))
            shape = (config.batch_size, judgement.numbers["frames"], *pixels_BTHWC.shape[2:])
            memory = memory_of(name, config.trust, shape, accelerator.device, config.precision == "bf16")
            judgement.numbers["memory_mib"] = memory / 2**20
            judgements.append(judgement)
        if accelerator.is_main_process:
            _pictures(run.folder / "samples", pixels_BTHWC, judgements)
        _finish(run, accelerator, config, judgements, len(pixels_BTHWC), skipped)
    summary = run.summary()
    if accelerator.is_main_process:
        print(_table(summary["tokenizers"]))
    return summary


def _finish(
    run: Run,
    accelerator: Accelerator,
    config: EvaluateTokenizer,
    judgements: Sequence[Judgement],
    clips: int,
    skipped: dict[str, str],
) -> None:
    for path, reason in skipped.items():
        say(accelerator, f"skipped {path}: {reason}")
    rows = [
        {"source": name, **judgement.numbers} for name, judgement in zip(config.tokenizers, judgements, strict=True)
    ]
    run.finish(
        accelerator,
        {
            "run": str(run.folder),
            "device": device_name(accelerator.device),
            "clips": clips,
            "skipped": skipped,
            "tokenizers": rows,
        },
    )


_COLUMNS = {
    "name": "tokenizer",
    "psnr": "PSNR dB",
    "ssim": "SSIM",
    "lpips": "LPIPS",
    "rfvd": "rFVD",
    "flicker": "flicker",
    "code_usage": "usage",
    "perplexity": "perplexity",
    "bits_per_pixel": "bits/pixel",
    "encode": "encode frames/s",
    "decode": "decode frames/s",
    "memory_mib": "MiB",
}


def _table(rows: Sequence[dict[str, Any]]) -> str:
    columns = [key for key in _COLUMNS if any(row[key] is not None for row in rows)]
    return table([_COLUMNS[key] for key in columns], [[_text(row[key]) for key in columns] for row in rows])


def _text(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, dict):
        error = "" if value["stderr"] is None else f" ± {value['stderr']:.2g}"
        return f"{value['mean']:.4g}{error}"
    return value if isinstance(value, str) else f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def _pictures(folder: Path, pixels_BTHWC: torch.Tensor, judgements: Sequence[Judgement]) -> None:
    """A grid for each tokenizer, and one movie: the clips, beside them what each tokenizer makes of them."""
    for number, judgement in enumerate(judgements):
        grid = reconstruction_grid(pixels_BTHWC[:_SHOWN], judgement.video_BTHWC[:_SHOWN])
        save_png(grid, folder / f"{number:02d}-{judgement.numbers['name']}.png")
    videos = [pixels_BTHWC, *(judgement.video_BTHWC for judgement in judgements)]
    shown = [np.concatenate([video[:_SHOWN].flatten(0, 1).numpy()], axis=0) for video in videos]
    write_mp4(folder / "all.mp4", np.concatenate(shown, axis=2), rate=8)


if __name__ == "__main__":
    command(EvaluateTokenizer, main)
