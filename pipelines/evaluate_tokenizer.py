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

from data.cache.tool import table
from data.clips import ClipSpec
from data.files import write_json
from data.sources import hold_out, load_source
from pipelines.judging import Judge, Judgement, memory_of
from pipelines.movies import write_mp4
from pipelines.pictures import reconstruction_grid, save_png
from pipelines.run import Run, command, device_name, say, start_accelerator
from pipelines.source_clips import NOTHING_HELD_OUT, held_out_clips
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
    device = device_name(accelerator.device)
    about = [source.digest, device, *(tokenizer.fingerprint() for tokenizer in tokenizers)]
    run = Run("evaluate_tokenizer", config, settings, about=" ".join(about))
    run.begin(accelerator)
    if run.finished:
        say(accelerator, f"{run.folder} is finished: nothing is left to do")
    elif accelerator.is_main_process:  # by itself, for it takes times
        skipped: dict[str, str] = {}
        pixels_BTHWC = held_out_clips(source, config.clip, config.clips, skipped)
        if not hold_out(source.videos)[1]:
            say(accelerator, NOTHING_HELD_OUT)
        batch, bf16 = min(config.batch_size, len(pixels_BTHWC)), config.precision == "bf16"
        judge = Judge(pixels_BTHWC, accelerator.device, batch_size=batch, bf16=bf16, lpips=lpips, detector=detector)
        judgements = []
        for name, tokenizer in zip(config.tokenizers, tokenizers, strict=True):
            say(accelerator, f"judging {name} on {len(pixels_BTHWC)} clips")
            judgements.append(judge.judge(tokenizer))
            tokenizer.cpu()
            shape = (batch, judgements[-1].numbers["frames"], *pixels_BTHWC.shape[2:])
            memory = memory_of(name, config.trust, shape, accelerator.device, bf16)
            judgements[-1].numbers["memory_mib"] = memory / 2**20
        _pictures(run.folder / "samples", pixels_BTHWC, judgements)
        for path, reason in skipped.items():
            say(accelerator, f"skipped {path}: {reason}")
        rows = [
            {"number": f"{number:02d}", "source": name, **judgement.numbers}
            for number, (name, judgement) in enumerate(zip(config.tokenizers, judgements, strict=True))
        ]
        found = {"run": str(run.folder), "device": device, "clips": len(pixels_BTHWC), "skipped": skipped}
        write_json(run.folder / "summary.json", {**found, "tokenizers": rows})
    accelerator.wait_for_everyone()
    summary = run.summary()
    if accelerator.is_main_process:
        print(_table(summary["tokenizers"]))
    return summary


_COLUMNS = {
    "number": "",
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
    "source": "source",
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
