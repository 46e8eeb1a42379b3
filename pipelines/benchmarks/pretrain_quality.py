"""What the choices of ARVideo do to its features and its likelihood: trainings that differ in one setting, several seeds each.

Every training is a run of `pretrain_ar.py`, on CPUs as many at a time as there are cores; what is finished is not done again.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator

from ar_model.objectives import load_objective
from data.cache import TokenCache
from data.files import write_json
from pipelines.benchmarks import Row
from pipelines.engine.code_spec import code_spec
from pipelines.engine.config import parse
from pipelines.engine.console import progress
from pipelines.engine.run import read_json, summary_of
from pipelines.engine.sweep import Job, train
from pipelines.evaluation.features import LabelledVideos, collect
from pipelines.settings.pretrain_ar import Pretrain

Setting = dict[str, str]
SEEDS, STEPS = 5, 800
PLAIN = "targets 0.25"
SETTINGS: dict[str, Setting] = {
    PLAIN: {},
    "targets 1.0": {"targets": "1.0"},
    "targets 0.1": {"targets": "0.1"},
    "ranks 0.5": {"ranks": "0.5"},
    "targets 1.0, ranks 0.5": {"targets": "1.0", "ranks": "0.5"},
    "unit: token": {"clusters": "[1,1,1]"},
    "unit: slice": {"clusters": "[1,8,8]"},
    "unit: spatial": {"clusters": "[1,4,4]"},
    "unit: column": {"clusters": "[8,1,1]"},
    "unit: temporal": {"clusters": "[2,1,1]"},
    "unit: space-time, larger": {"clusters": "[4,4,4]"},
    "order: spatial-first": {"order": "spatial-first"},
    "order: temporal-first": {"order": "temporal-first"},
    "keep 0.1": {"keep": "0.1"},
    "keep 0.5": {"keep": "0.5"},
    "keep 1.0": {"keep": "1.0"},
    "no causal mask": {"causal": "false"},
    "self- and cross-attention": {"decoder_self": "true"},
    "sine-cosine positions only": {"rope": "false"},
}
"""Settings of the objective that differ from the default: clusters of 2x4x4 tokens, random order, keep 0.25, targets 0.25."""
EQUAL_TIME = f"{PLAIN}, for as long as targets 1.0 takes"


def measure(
    parent: Path, cache: TokenCache, device: torch.device, scale: float, only: Sequence[str] = ()
) -> Iterator[Row]:
    """Linear probe of the frozen features and bits per held-out code of each setting: means over seeds, standard errors.

    Raises:
        ValueError: if `only` names an unknown setting, the cache has no two classes, or a training fails.
    """
    names = _chosen(only)
    _check_misfits(names, cache)
    labelled = LabelledVideos.of(cache)  # a cache without labels shows before anything is trained
    steps, seeds = max(20, round(STEPS * scale)), SEEDS if scale >= 0.5 else 2
    folder = parent / f"{cache.name}-{steps}"
    train([_job(folder, name, seed, steps) for seed in range(seeds) for name in names], cache, device)
    if "targets 1.0" in names:
        fast, slow = (min(_said(folder, name, seeds, "seconds")) for name in (PLAIN, "targets 1.0"))
        longer = round(steps * slow / fast)
        train([_job(folder, EQUAL_TIME, seed, longer) for seed in range(seeds)], cache, device)
        names.insert(1, EQUAL_TIME)
    bar = progress(Accelerator(), len(labelled.rows) * len(names) * seeds, "probe")
    probes = {name: [_probe(folder, cache, labelled, name, seed, bar) for seed in range(seeds)] for name in names}
    bar.close()
    for name in names:
        yield _row("linear probe", "", name, probes)
    bits = {name: _said(folder, name, seeds, "bits_per_code") for name in names}
    for name in names:
        yield _row("held-out codes", "bits", name, bits)
    for name in names:  # the fastest says the most: other work on the machine only ever adds
        yield Row(what=f"the fastest training, {name}", unit="s", ours=min(_said(folder, name, seeds, "seconds")))


def _chosen(only: Sequence[str]) -> list[str]:
    unknown = [name for name in only if name not in SETTINGS]
    if unknown:
        raise ValueError(f"only: {unknown[0]!r} is none of: {'; '.join(SETTINGS)}")
    return [name for name in SETTINGS if name == PLAIN or not only or name in only]


def _check_misfits(names: Sequence[str], cache: TokenCache) -> None:
    """Raise a ValueError for a setting that the cache's grid does not allow, before hours are spent on the others."""
    for name in names:
        try:
            with torch.device("meta"):
                parse(Pretrain, _flags(SETTINGS[name]))[0].objective(code_spec(cache))
        except ValueError as error:
            raise ValueError(f"{name}: {error}; --only chooses others") from None


def _row(what: str, unit: str, name: str, values: dict[str, list[float]]) -> Row:
    seeds = values[name]
    mean, plain = float(np.mean(seeds)), float(np.mean(values[PLAIN]))
    row = Row(what=f"{what}, {name}", unit=unit, ours=mean, error=float(np.std(seeds, ddof=1) / len(seeds) ** 0.5))
    return row if name == PLAIN else replace(row, peer=plain, alternative=PLAIN, ratio=mean / plain)


def _probe(folder: Path, cache: TokenCache, labelled: LabelledVideos, name: str, seed: int, bar: Any) -> float:
    """Accuracy of a run's linear probe, kept beside the run."""
    file = _run(folder, name, seed) / "quality.json"
    if not file.exists():
        model = load_objective(file.parent / "model")
        with torch.random.fork_rng():
            features = collect(Accelerator(), model, cache, labelled.rows, bar)
        write_json(file, {"linear": features.probe(labelled.y_N, labelled.folds(seed)).best["linear"]})
    return float(read_json(file)["linear"])


def _flags(setting: Setting) -> list[str]:
    return [f"--objective.{key}={value}" for key, value in setting.items()]


def _job(folder: Path, name: str, seed: int, steps: int) -> Job:
    return Job(name, _run(folder, name, seed), steps, seed, _flags(SETTINGS.get(name, {})))


def _run(folder: Path, name: str, seed: int) -> Path:
    return folder / f"{name.replace(':', '').replace(',', '').replace(' ', '-')}-seed{seed}"


def _said(folder: Path, name: str, seeds: int, key: str) -> list[float]:
    return [float(summary_of(_run(folder, name, seed))[key]) for seed in range(seeds)]
