"""Evaluate tokenizers on the same held-out clips: a table, pictures and JSON."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator

from data.schema import conform
from data.source_clips import NOTHING_HELD_OUT, held_out_clips, nothing_held_out
from data.sources import Source, load_source
from data.text import table
from pipelines.commands.fit_tokenizer import fitted, is_unfitted
from pipelines.commands.learned_features import learned_features
from pipelines.engine.console import say, say_notes
from pipelines.engine.device import device_name, resolve_precision, start_accelerator
from pipelines.engine.recorded_clip import say_recorded_clip
from pipelines.engine.run import Run
from pipelines.engine.summaries import TokenizerEvaluation
from pipelines.evaluation.tokenizer_memory import memory_of
from pipelines.evaluation.tokenizer_metrics import TokenizerEvaluator, TokenizerScores
from pipelines.reporting.movies import write_mp4
from pipelines.reporting.pictures import reconstruction_grid, save_png
from pipelines.settings.evaluate_tokenizer import EvaluateTokenizer
from tokenizer import VideoTokenizer, load_tokenizer
from tokenizer.lpips import LPIPS, load_lpips
from tokenizer.measures import VideoDetector, load_detector

_SHOWN = 4
"""Number of clips in the pictures and the movie."""
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
    "untrained_linear": "untrained linear",
    "linear": "linear",
    "untrained_attentive": "untrained attentive",
    "attentive": "attentive",
    "bytes_per_clip": "bytes/clip",
    "encode": "encode frames/s",
    "decode": "decode frames/s",
    "memory_mib": "MiB",
    "source": "source",
}
"""Titles of the table's columns by key of the summary."""


def main(config: EvaluateTokenizer, settings: str) -> dict[str, Any]:
    """Evaluate all tokenizers, write a summary and pictures, and print the table."""
    source = load_source(config.videos)
    if config.pretrain and len(labels := {video.label for video in source.videos} - {None}) < 2:
        raise ValueError(f"pretrain: the probes need videos of at least two labels, got {len(labels)}: {config.videos}")
    # The pre-training shares the accelerator. Tokenizers run in the precision of `config`.
    accelerator = start_accelerator(resolve_precision("auto") if config.pretrain else "fp32")
    if config.pretrain and accelerator.num_processes > 1:
        raise ValueError("pretrain starts its own training runs: start it with python, not with accelerate launch")
    say_notes(accelerator, config.videos, source)
    say_recorded_clip(accelerator, config.tokenizers, config.clip)
    sources = [
        fitted(accelerator, name, config.videos, config.clip, source) if is_unfitted(name) else name
        for name in config.tokenizers
    ]
    tokenizers = [load_tokenizer(name, trust=config.trust) for name in sources]
    # Raise the error about an unsuitable clip size before any video is decoded.
    for tokenizer in tokenizers:
        tokenizer.codes_shape(tokenizer.frames_that_fit(config.clip.frames), config.clip.size, config.clip.size)
    lpips = None if config.lpips is None else load_lpips(config.lpips)
    detector = None if config.detector is None else load_detector(config.detector, config.trust)
    fingerprints = [tokenizer.fingerprint() for tokenizer in tokenizers]
    about = " ".join([source.digest, device_name(accelerator.device), *fingerprints])
    run = Run("evaluate_tokenizer", config, settings, about=about)
    unfinished = run.begin_unless_finished(accelerator)
    # Only the main process evaluates: others would disturb the measured speeds. They end, because a wait has a time limit.
    if not accelerator.is_main_process:
        return {}
    if unfinished:
        named = list(zip(sources, tokenizers, strict=True))
        _evaluate_all(run, accelerator, config, source, named, lpips, detector)
    summary = conform(run.summary(), TokenizerEvaluation, str(run.folder / "summary.json"))
    print(_table(summary["tokenizers"]))
    if config.pretrain:
        energy, frame = (summary[key]["mean"] for key in ("motion_energy", "one_frame"))
        print(f"without a network: motion energy {energy:.3f}, one frame {frame:.3f}; chance {summary['chance']:.3f}")
    return summary


def _evaluate_all(
    run: Run,
    accelerator: Accelerator,
    config: EvaluateTokenizer,
    source: Source,
    tokenizers: Sequence[tuple[str, VideoTokenizer]],
    lpips: LPIPS | None,
    detector: VideoDetector | None,
) -> None:
    """Evaluate the tokenizers one after another, and write the pictures and summary.json."""
    device, bf16 = accelerator.device, config.precision == "bf16"
    skipped: dict[str, str] = {}
    pixels_BTHWC = held_out_clips(source, config.clip, config.clips, skipped)
    is_training = nothing_held_out(source, skipped)
    if is_training:
        say(accelerator, NOTHING_HELD_OUT)
    batch_size = min(config.batch_size, len(pixels_BTHWC))
    evaluator = TokenizerEvaluator(
        pixels_BTHWC, device, batch_size=batch_size, bf16=bf16, lpips=lpips, detector=detector
    )
    scores: list[TokenizerScores] = []
    rows: list[dict[str, Any]] = []
    for name, tokenizer in tokenizers:
        say(accelerator, f"evaluating {name} on {len(pixels_BTHWC)} clips")
        score = evaluator.evaluate(tokenizer)
        tokenizer.cpu()
        shape = (batch_size, score.numbers["frames"], *pixels_BTHWC.shape[2:])
        memory = memory_of(name, config.trust, shape, device, bf16)
        rows.append({"number": f"{len(rows):02d}", "source": name, **score.numbers, "memory_mib": memory / 2**20})
        scores.append(score)
    baselines: dict[str, Any] = {}
    if config.pretrain:
        learned, baselines = learned_features(accelerator, config, source, tokenizers, run.folder / "learning")
        rows = [{**row, **own} for row, own in zip(rows, learned, strict=True)]
    _pictures(run.folder / "samples", pixels_BTHWC, scores)
    for path, reason in skipped.items():
        say(accelerator, f"skipped {path}: {reason}")
    summary = {"run": str(run.folder), "device": device_name(device), "clips": len(pixels_BTHWC)}
    summary["held_out"] = 0 if is_training else len(pixels_BTHWC)
    run.finish_alone({**summary, **baselines, "skipped": len(skipped), "tokenizers": rows})


def _table(rows: Sequence[dict[str, Any]]) -> str:
    columns = [key for key in _COLUMNS if any(row.get(key) is not None for row in rows)]
    return table([_COLUMNS[key] for key in columns], [[_text(row[key]) for key in columns] for row in rows])


def _text(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, str):
        return value
    if isinstance(value, dict):
        error = "" if value["stderr"] is None else f" ± {value['stderr']:.2g}"
        return f"{value['mean']:.4g}{error}"
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def _pictures(folder: Path, pixels_BTHWC: torch.Tensor, scores: Sequence[TokenizerScores]) -> None:
    """Write one picture per tokenizer, and one movie: the clips on the left, all reconstructions to the right of them."""
    for number, score in enumerate(scores):
        grid = reconstruction_grid(pixels_BTHWC[:_SHOWN], score.video_BTHWC[:_SHOWN])
        save_png(grid, folder / f"{number:02d}-{score.numbers['name']}.png")
    videos = [pixels_BTHWC, *(score.video_BTHWC for score in scores)]
    columns = [video[:_SHOWN].flatten(0, 1).numpy() for video in videos]
    write_mp4(folder / "all.mp4", np.concatenate(columns, axis=2), rate=8)
