"""Put any number of tokenizers through the same held-out clips: table, pictures, JSON."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data.files import write_json
from data.source_clips import NOTHING_HELD_OUT, held_out_clips
from data.sources import hold_out, load_source
from data.text import table
from pipelines.engine.console import say
from pipelines.engine.device import device_name, start_accelerator
from pipelines.engine.run import Run
from pipelines.evaluation.tokenizer_metrics import TokenizerEvaluator, TokenizerScores, memory_of
from pipelines.reporting.movies import write_mp4
from pipelines.reporting.pictures import reconstruction_grid, save_png
from pipelines.settings.evaluate_tokenizer import EvaluateTokenizer
from tokenizer import load_tokenizer
from tokenizer.lpips import load_lpips
from tokenizer.measures import load_detector

_SHOWN = 4  # clips in pictures


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
        judge = TokenizerEvaluator(
            pixels_BTHWC, accelerator.device, batch_size=batch, bf16=bf16, lpips=lpips, detector=detector
        )
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


def _pictures(folder: Path, pixels_BTHWC: torch.Tensor, judgements: Sequence[TokenizerScores]) -> None:
    """A grid for each tokenizer, and one movie: the clips, beside them what each tokenizer makes of them."""
    for number, judgement in enumerate(judgements):
        grid = reconstruction_grid(pixels_BTHWC[:_SHOWN], judgement.video_BTHWC[:_SHOWN])
        save_png(grid, folder / f"{number:02d}-{judgement.numbers['name']}.png")
    videos = [pixels_BTHWC, *(judgement.video_BTHWC for judgement in judgements)]
    shown = [np.concatenate([video[:_SHOWN].flatten(0, 1).numpy()], axis=0) for video in videos]
    write_mp4(folder / "all.mp4", np.concatenate(shown, axis=2), rate=8)
