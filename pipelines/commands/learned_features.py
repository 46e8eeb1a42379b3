"""Features that pre-training learns from the codes of several tokenizers, for evaluate_tokenizer."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml
from accelerate import Accelerator

from data.sources import Source
from pipelines.commands.compare import main as compare
from pipelines.commands.tokenize import cache_writer, cached
from pipelines.engine.config import parse, read_settings
from pipelines.engine.console import say
from pipelines.settings.compare import Compare
from pipelines.settings.evaluate_tokenizer import EvaluateTokenizer
from pipelines.settings.tokenize import Tokenize
from tokenizer import VideoTokenizer

_ENTRY = Path(__file__).parents[1] / "configs" / "tiny" / "arvideo.yaml"
PROBES = ("untrained_linear", "linear", "untrained_attentive", "attentive")


def learned_features(
    accelerator: Accelerator,
    config: EvaluateTokenizer,
    source: Source,
    tokenizers: Sequence[tuple[str, VideoTokenizer]],
    folder: Path,
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Fill a cache with the codes of each tokenizer, pre-train on it for `config.pretrain` seconds, and probe the features.

    Returns:
        For each tokenizer, {mean, stderr} over the seeds of each of `PROBES`, and bytes per clip; and the baselines without a
        network, with the number of tested clips.

    Raises:
        ValueError: if the videos have fewer than two labels, or a tokenizer does not fit the clips.
    """
    files, bytes_per_clip = [], []
    for number, (name, tokenizer) in enumerate(tokenizers):
        say(accelerator, f"filling a cache with the codes of {name}")
        cache, size = _cache_of(accelerator, config, source, name, tokenizer)
        settings = {**read_settings(_ENTRY), "cache": str(cache)}
        files.append(folder / f"{number:02d}-{tokenizer.name}.yaml")
        files[-1].parent.mkdir(parents=True, exist_ok=True)
        files[-1].write_text(yaml.safe_dump(settings))
        bytes_per_clip.append(size)
    budget = [
        "--budget",
        "seconds",
        "--amount",
        str(config.pretrain),
        "--seeds",
        str(config.pretrain_seeds),
        "--points",
        "1",
    ]
    flags = ["--entries", *map(str, files), *budget, "--out", str(folder / "comparison")]
    summary = compare(*parse(Compare, flags))
    by_entry: Mapping[str, Any] = {row["entry"]: row for row in summary["table"]}
    rows = [{probe: by_entry[file.stem][probe] for probe in PROBES} for file in files]
    rows = [{**row, "bytes_per_clip": size} for row, size in zip(rows, bytes_per_clip, strict=True)]
    return rows, {key: summary[key] for key in ("one_frame", "motion_energy", "chance", "n", "page")}


def _cache_of(
    accelerator: Accelerator, config: EvaluateTokenizer, source: Source, name: str, tokenizer: VideoTokenizer
) -> tuple[Path, float]:
    """Return the folder of a cache with the codes of all videos, and the bytes of the codes of a clip. Fill it if need be."""
    clip = replace(config.clip, frames=tokenizer.frames_that_fit(config.clip.frames))
    settings = Tokenize(videos=config.videos, tokenizer=name, clip=clip, precision=config.precision)
    writer = cache_writer(settings, source, tokenizer)
    cached(accelerator, writer, settings, source, tokenizer)
    return writer.folder, writer.spec.codes.clip_bytes
