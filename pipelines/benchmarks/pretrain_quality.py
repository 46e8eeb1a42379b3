"""What the choices of ARVideo do to its features and its likelihood: trainings that differ in one setting, several seeds each.

Every training is a run of `pretrain_ar.py`, on CPUs as many at a time as there are cores; what is finished is not done again.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from queue import Queue
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator

from ar_model.objectives import load_objective
from ar_model.probes import evaluate
from data.cache import TokenCache
from data.files import write_json
from pipelines.benchmarks import Row
from pipelines.config import parse
from pipelines.pretrain_ar import Pretrain, code_spec
from pipelines.probe import Labelled, pooled_features
from pipelines.run import progress, read_json, summary_of

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
Runs = dict[tuple[str, int], tuple[Setting, int]]
"""What each (name, seed) is trained with, and its steps."""


def measure(
    parent: Path, cache: TokenCache, device: torch.device, scale: float, only: Sequence[str] = ()
) -> Iterator[Row]:
    """Linear probe of the frozen features and bits per held-out code of each setting: means over seeds, standard errors.

    Raises:
        ValueError: if `only` names an unknown setting, the cache has no two classes, or a training fails.
    """
    names = _chosen(only)
    _refuse_misfits(names, cache)
    labelled = Labelled.of(cache)  # a cache without labels shows before anything is trained
    steps, seeds = max(20, round(STEPS * scale)), SEEDS if scale >= 0.5 else 2
    folder = parent / f"{cache.name}-{steps}"
    _train(folder, cache, device, {(name, seed): (SETTINGS[name], steps) for seed in range(seeds) for name in names})
    if "targets 1.0" in names:
        fast, slow = (min(_said(folder, name, seeds, "seconds")) for name in (PLAIN, "targets 1.0"))
        _train(folder, cache, device, {(EQUAL_TIME, seed): ({}, round(steps * slow / fast)) for seed in range(seeds)})
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


def _refuse_misfits(names: Sequence[str], cache: TokenCache) -> None:
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


def _probe(folder: Path, cache: TokenCache, labelled: Labelled, name: str, seed: int, bar: Any) -> float:
    """Accuracy of a run's linear probe, kept beside the run."""
    file = _run(folder, name, seed) / "quality.json"
    if not file.exists():
        model = load_objective(file.parent / "model")
        with torch.random.fork_rng():
            features = pooled_features(Accelerator(), model, cache, labelled.rows, bar)
        write_json(file, {"linear": evaluate(features, labelled.y_N, labelled.folds(seed)).linear})
    return float(read_json(file)["linear"])


def _train(folder: Path, cache: TokenCache, device: torch.device, runs: Runs) -> None:
    """All trainings that are not finished: on CPUs one on each core, else one after the other."""
    places: Queue[list[str]] = Queue()
    for core in sorted(os.sched_getaffinity(0)) if device.type == "cpu" and shutil.which("taskset") else []:
        places.put(["taskset", "-c", str(core)])
    if places.empty():
        places.put([])
    bar = progress(Accelerator(), len(runs), "trainings")

    def train(name: str, seed: int) -> None:
        setting, steps = runs[name, seed]
        out = _run(folder, name, seed)
        if not ((out / "summary.json").exists() and summary_of(out)["step"] == steps):
            command = _command(out, cache, device, seed, steps, setting)
            place = places.get()
            try:
                result = subprocess.run([*place, *command], capture_output=True, text=True, check=False)
            finally:
                places.put(place)
            if result.returncode:
                said = result.stderr.strip().splitlines() or [f"ended with code {result.returncode}"]
                raise ValueError(f"{name}, seed {seed}: {said[-1]}")
            shutil.rmtree(out / "checkpoints", ignore_errors=True)
        bar.update()

    with ThreadPoolExecutor(places.qsize()) as pool:
        list(pool.map(lambda run: train(*run), runs))
    bar.close()


def _command(out: Path, cache: TokenCache, device: torch.device, seed: int, steps: int, setting: Setting) -> list[str]:
    return [
        *(
            sys.executable,
            str(Path(__file__).parents[1] / "pretrain_ar.py"),
            "--out",
            str(out),
            "--cache",
            cache.address,
        ),
        *("--seed", str(seed), "--steps", str(steps), "--validate_every", str(steps), "--save_every", str(steps)),
        *("--attention", "plain" if device.type == "cpu" else "auto", *_flags(setting)),
    ]


def _flags(setting: Setting) -> list[str]:
    return [f"--objective.{key}={value}" for key, value in setting.items()]


def _run(folder: Path, name: str, seed: int) -> Path:
    return folder / f"{name.replace(':', '').replace(',', '').replace(' ', '-')}-seed{seed}"


def _said(folder: Path, name: str, seeds: int, key: str) -> list[float]:
    return [float(summary_of(_run(folder, name, seed))[key]) for seed in range(seeds)]
