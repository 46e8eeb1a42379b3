"""Measurements on a GPU: train a tokenizer of 4,375 codes at 128x128 for eight minutes, and time encoding at 256x256."""

from collections.abc import Iterator
from dataclasses import replace

import torch

from data.clip_spec import ClipSpec
from data.source_clips import held_out_clips
from data.sources import Source
from pipelines.benchmarks import Row
from pipelines.benchmarks.tokenizer_quality import frames_per_second, train, training_clips
from tokenizer import VQ3D

_SECONDS = 480
_NAME = "vq3d-small-2x8x8-fsq4375"


def measure(source: Source, clip: ClipSpec, device: torch.device, scale: float) -> Iterator[Row]:
    """Yield held-out PSNR, code usage and encoding speed; yield nothing without a GPU."""
    if device.type == "cuda":
        yield from training(source, replace(clip, size=128), device, _SECONDS * scale)
        yield from encoding_speed(device, clip.frames, side=256, batch=8)


def training(source: Source, clip: ClipSpec, device: torch.device, seconds: float) -> Iterator[Row]:
    """Train a tokenizer on clips of these videos; yield held-out PSNR and code usage."""
    trained = train(_NAME, training_clips(source, clip), held_out_clips(source, clip, 96, {}), device, seconds)
    what = f"held-out PSNR after {seconds:.0f} s of training, {clip.frames} frames of {clip.size}x{clip.size}, {_NAME}"
    yield Row(what, "dB", trained.psnr, reach="≥ 28")
    yield Row(f"share of its {trained.tokenizer.vocab_size:,} codes in use", "", trained.usage[-1])


def encoding_speed(device: torch.device, frames: int, side: int, batch: int) -> Iterator[Row]:
    """Yield the encoding speed of three tokenizers with random weights, in bf16."""
    pixels_BTHWC = torch.randint(256, (batch, frames, side, side, 3), dtype=torch.uint8)
    for name in (_NAME, "vq3d-2x8x8-fsq4375", "vq3d-base-2x8x8-fsq4375"):
        tokenizer = VQ3D(name=name).eval().to(device)
        with torch.autocast(device.type, torch.bfloat16):
            speed = frames_per_second(tokenizer.encode, pixels_BTHWC, device)
        yield Row(f"encoding in bf16 at {side}x{side}, batch {batch}, {name}", "frames/s", speed, reach="≥ 2,000")
