"""List of the runs in a folder, read from their settings and summaries."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypedDict

import yaml

from data.schema import conform
from data.text import one_line
from pipelines.engine.config import load_yaml
from pipelines.engine.run_files import environment_of, metrics_of, read_json
from pipelines.engine.summaries import Mean, Pretraining

_MAX_SETTINGS = 2**20
"""Most bytes of the settings of a run."""


class _Probing(TypedDict):
    linear: Mean
    untrained: Mean


class _Fitted(TypedDict):
    psnr: float


class _Filled(TypedDict):
    codes: int
    codes_used: int
    vocab_size: int


class _Tuned(TypedDict):
    classes: list[str]
    validation_accuracy: float


class _Evaluated(TypedDict):
    top1: float
    n: int
    views: str


class _Extracted(TypedDict):
    windows: int
    shape: list[int]


class _Searched(TypedDict):
    nearest: list[Any]
    recall: dict[str, float] | None
    map: float | None


class _Scored(TypedDict):
    tokenizers: list[Any]


class _Compared(TypedDict):
    table: list[Any]
    seeds: int


@dataclass(frozen=True)
class RunEntry:
    """One row of the table of runs. An empty text means that a value is unknown or does not apply.

    `run`: folder; `what`: objective, model or videos; `state`: `finished`, `step 250 of 1,000`, `begun`, or what is damaged;
    `cache`: name of the cache; `numbers`: main results; `changed`: seconds since 1970.
    """

    run: str
    command: str
    what: str
    state: str
    cache: str
    numbers: str
    changed: float


def list_runs(runs: Path) -> list[RunEntry]:
    """List all runs in a folder, newest first. The probes of a run are results of the run."""
    return sorted((_entry(file.parent) for file in runs.glob("*/environment.json")), key=lambda run: -run.changed)


def _entry(folder: Path) -> RunEntry:
    files = [folder / name for name in ("summary.json", "metrics.jsonl", "environment.json")]
    changed = max((os.stat(file).st_mtime for file in files if file.exists()), default=0.0)
    entry = RunEntry(str(folder), "", "", "", "", "", changed)
    try:
        entry = replace(entry, command=str(environment_of(folder).get("pipeline", ""))[:40])
        settings = _settings(folder)
        steps = settings.get("steps")
        what, cache = _what(settings), settings.get("cache")
        if not (folder / "summary.json").exists():
            logged = metrics_of(folder)
            state = f"step {logged[-1]['step']:,.0f} of {steps:,}" if logged and isinstance(steps, int) else "begun"
            return replace(entry, what=what, state=state, cache=Path(str(cache or "")).name)
        summary = read_json(folder / "summary.json")
        cache = Path(str(summary.get("cache") or "")).name
        return replace(
            entry, what=what, state="finished", cache=cache, numbers=_numbers(entry.command, folder, summary)
        )
    except (OSError, ValueError, yaml.YAMLError) as error:
        return replace(entry, state=f"cannot be read: {one_line(error, 100)}")


def _settings(folder: Path) -> dict[str, Any]:
    file = folder / "config.yaml"
    with open(file, "rb") as opened:
        content = load_yaml(opened.read(_MAX_SETTINGS).decode(errors="replace"))
    return conform(content, dict[str, Any], str(file))


def _what(settings: Mapping[str, Any]) -> str:
    """Return the objective or model with its size, or the videos."""
    for group in ("objective", "model"):
        chosen = settings.get(group)
        if isinstance(chosen, dict) and isinstance(arguments := chosen.get("init_args"), dict):
            size = [
                f"{name} {arguments[name]}" for name in ("name", "width", "depth") if arguments.get(name) is not None
            ]
            return " ".join([str(chosen.get("class_path")).rpartition(".")[2], *size])[:80]
    return str(settings.get("name") or settings.get("videos") or settings.get("query") or "")[-40:]


def _numbers(command: str, folder: Path, summary: dict[str, Any]) -> str:
    """Return the main results of a finished run in one line."""

    def read(kind: Any) -> Any:
        return conform(summary, kind, f"{folder}/summary.json")

    if command == "pretrain_ar":
        trained: Pretraining = read(Pretraining)
        bits, unigram = trained["bits_per_code"], trained["unigram_bits"]
        loss = (
            f"loss {trained['loss']:.3f}" if bits is None else f"{bits:.2f} bits per code (unigram {unigram or 0:.2f})"
        )
        return "; ".join([loss, *_probe(folder)])
    if command in ("train_tokenizer", "fit_tokenizer"):
        return f"{read(_Fitted)['psnr']:.1f} dB"
    if command == "tokenize":
        filled: _Filled = read(_Filled)
        return f"{filled['codes']:,} codes, {filled['codes_used']:,} of {filled['vocab_size']:,} in use"
    if command == "finetune":
        tuned: _Tuned = read(_Tuned)
        return (
            f"{len(tuned['classes'])} classes, accuracy {tuned['validation_accuracy']:.3f} on held-out training videos"
        )
    if command == "evaluate":
        evaluated: _Evaluated = read(_Evaluated)
        return f"top-1 {evaluated['top1']:.3f} of {evaluated['n']} videos, {evaluated['views']} views"
    if command == "extract_features":
        extracted: _Extracted = read(_Extracted)
        return f"{extracted['windows']:,} windows of {'x'.join(map(str, extracted['shape']))}"
    if command == "search":
        searched: _Searched = read(_Searched)
        recall, precision = searched["recall"], searched["map"]
        quality = "" if recall is None else f", recall at 1 {recall.get('1', 0):.3f}, mAP {precision or 0:.3f}"
        return f"{len(searched['nearest'])} nearest videos{quality}"
    if command == "evaluate_tokenizer":
        return f"{len(read(_Scored)['tokenizers'])} tokenizers"
    if command == "compare":
        compared: _Compared = read(_Compared)
        return f"{len(compared['table'])} entries, {compared['seeds']} seeds"
    return ""


def _probe(folder: Path) -> list[str]:
    """Return the result of the newest finished probe of a run."""
    files = sorted(folder.glob("probe-*/summary.json"), key=lambda file: file.stat().st_mtime)
    for file in files[-1:]:
        probed: _Probing = conform(read_json(file), _Probing, str(file))
        return [f"linear probe {probed['linear']['mean']:.3f} (untrained {probed['untrained']['mean']:.3f})"]
    return []
