"""Part 8: train a tokenizer at 128x128, encode at 256x256, and tokenize videos end to end with all cores."""

import os
from collections.abc import Iterator
from dataclasses import replace

from data.clip_spec import ClipSpec
from data.sources import load_source
from pipelines.benchmarks import Row, tokenizer_cuda
from pipelines.gpu.commands import start, summary
from pipelines.gpu.part import Setting, attempt, run
from pipelines.gpu.videos import videos_folder
from tokenizer import VQ3D

_SECONDS = 60.0


def measure(setting: Setting) -> Iterator[Row]:
    """Yield the rows of tokenizer_cuda.py with a short training run, then the speed of the command tokenize."""
    source = load_source(str(videos_folder(setting)))
    clip = ClipSpec(frames=4, size=16, views=1) if setting.dry else ClipSpec(views=4)
    large = clip if setting.dry else replace(clip, size=128)
    side, seconds = (16, 0.1) if setting.dry else (256, _SECONDS)
    yield from attempt(
        "encoding",
        lambda: tokenizer_cuda.encoding_speed(setting.device, clip.frames, side, batch=1 if setting.dry else 8),
    )
    yield from attempt("tokenize", lambda: _end_to_end(setting, clip))
    if not setting.dry:
        seconds = min(seconds, max(1.0, setting.left() - 15))
    yield from attempt("training", lambda: tokenizer_cuda.training(source, large, setting.device, seconds))


def _end_to_end(setting: Setting, clip: ClipSpec) -> Iterator[Row]:
    """Yield the speed of the command tokenize with an untrained tokenizer, from video files to a finished cache."""
    clip = clip if setting.dry else replace(clip, size=256)
    folder = setting.work / "untrained-tokenizer"
    VQ3D(name="vq3d-small-2x8x8-fsq4375").save_pretrained(folder)
    flags = [f"--clip.{name}={getattr(clip, name)}" for name in ("frames", "size", "views")]
    videos = ["--videos", videos_folder(setting), "--tokenizer", folder]
    process = start(setting, "tokenize", *videos, *flags, "--precision", "bf16", "--caches", "end-to-end")
    done = summary(process, setting)
    what = f"tokenize {done['videos']} videos, {clip.frames} frames of {clip.size}x{clip.size}, {os.cpu_count()} cores"
    yield Row(what, "clips/s", done["clips"] / max(done["seconds"], 0.1))


if __name__ == "__main__":
    run(measure)
