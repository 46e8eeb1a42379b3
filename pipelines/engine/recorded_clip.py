"""Comparison of clips with the clips that a tokenizer was trained on."""

from collections.abc import Sequence
from dataclasses import asdict

from accelerate import Accelerator

from data.clip_spec import ClipSpec
from pipelines.engine.config import recorded_group
from pipelines.engine.console import say


def say_recorded_clip(accelerator: Accelerator, tokenizers: Sequence[str], clip: ClipSpec) -> None:
    """Print for each tokenizer that is a run whether `clip` equals the clips of its training, and if not, how it differs.

    Different numbers of views are named too, but are no difference: they change how many clips there are, not what they show.
    """
    settings = asdict(clip)
    views = settings.pop("views")
    for tokenizer in tokenizers:
        trained = recorded_group(tokenizer, "clip", ClipSpec)
        if trained is None:
            continue
        recorded = asdict(trained)
        differences = [
            f"{name} {_text(value)} (in training {_text(recorded[name])})"
            for name, value in settings.items()
            if recorded[name] != value
        ]
        text = ", ".join(
            differences or [f"{name} {_text(value)}" for name, value in settings.items() if value is not None]
        )
        text += f", views {views}" + (f" (in training {recorded['views']})" if recorded["views"] != views else "")
        relation = "differ from" if differences else "are cut like"
        say(accelerator, f"clips {relation} those that {tokenizer} was trained on: {text}")


def _text(value: object) -> str:
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    return "not set" if value is None else str(value)
