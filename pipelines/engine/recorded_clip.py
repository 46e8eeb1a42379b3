"""Comparison of clips with the clips that a tokenizer was trained on."""

from collections.abc import Sequence
from dataclasses import asdict

from accelerate import Accelerator

from data.clips import ClipSpec
from pipelines.engine.config import recorded_group
from pipelines.engine.console import say


def say_recorded_clip(accelerator: Accelerator, tokenizers: Sequence[str], clip: ClipSpec) -> None:
    """Print for each tokenizer that is a run whether `clip` equals the clips of its training, and if not, how it differs."""
    settings = asdict(clip)
    for tokenizer in tokenizers:
        recorded = recorded_group(tokenizer, "clip")
        if recorded is None:
            continue
        differences = [
            f"{name} {value} (in training {recorded[name]})"
            for name, value in settings.items()
            if name in recorded and recorded[name] != value
        ]
        text = ", ".join(differences or (f"{name} {value}" for name, value in settings.items()))
        relation = "differ from" if differences else "are cut like"
        say(accelerator, f"clips {relation} those that {tokenizer} was trained on: {text}")
