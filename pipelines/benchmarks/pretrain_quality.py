"""What the choices of ARVideo do to its features and its likelihood: trainings that differ in one setting, several seeds each.

Every training is `pretrain_ar.py` on one core, as many at a time as there are cores; runs that are finished are not done again.
"""

import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import Queue

import numpy as np
import torch
from accelerate import Accelerator

from ar_model.objectives import load_objective
from ar_model.probes import evaluate
from data.cache import TokenCache
from pipelines.benchmarks import Row
from pipelines.probe import Labelled, pooled_features
from pipelines.run import progress, summary_of

SEEDS, STEPS = 5, 800
PLAIN = "targets 0.25"
SETTINGS: dict[str, list[str]] = {
    PLAIN: [],
    "targets 1.0": ["targets", "1.0"],
    "targets 0.1": ["targets", "0.1"],
    "ranks 0.5": ["ranks", "0.5"],
    "targets 1.0, ranks 0.5": ["targets", "1.0", "ranks", "0.5"],
    "unit: token": ["clusters", "[1,1,1]"],
    "unit: slice": ["clusters", "[1,8,8]"],
    "unit: spatial": ["clusters", "[1,4,4]"],
    "unit: column": ["clusters", "[8,1,1]"],
    "unit: temporal": ["clusters", "[2,1,1]"],
    "unit: space-time, larger": ["clusters", "[4,4,4]"],
    "order: spatial-first": ["order", "spatial-first"],
    "order: temporal-first": ["order", "temporal-first"],
    "keep 0.1": ["keep", "0.1"],
    "keep 0.5": ["keep", "0.5"],
    "keep 1.0": ["keep", "1.0"],
    "no causal mask": ["causal", "false"],
    "self- and cross-attention": ["decoder_self", "true"],
    "sine-cosine positions only": ["rope", "false"],
}
"""Flags of --objective that differ from the default: clusters of 2x4x4 tokens, random order, keep 0.25, targets 0.25."""
EQUAL_TIME = f"{PLAIN}, for as long as 1.0 takes"


def measure(folder: Path, cache: TokenCache, scale: float, names: Sequence[str] = tuple(SETTINGS)) -> Iterator[Row]:
    """Frozen linear probe and bits per code of each setting: means over seeds and their standard errors."""
    steps, seeds = max(20, round(STEPS * scale)), SEEDS if scale >= 0.5 else 2
    runs = {(name, seed): (SETTINGS[name], steps) for name in names for seed in range(seeds)}
    _train(folder, cache, runs)
    if {PLAIN, "targets 1.0"} <= set(names):
        seconds = {
            name: np.mean([_seconds(folder, name, seed) for seed in range(seeds)]) for name in (PLAIN, "targets 1.0")
        }
        longer = round(steps * float(seconds["targets 1.0"] / seconds[PLAIN]))
        _train(folder, cache, {(EQUAL_TIME, seed): ([], longer) for seed in range(seeds)})
        names = [*names, EQUAL_TIME]
    labelled = Labelled.of(cache)
    probes: dict[str, list[float]] = {}
    bar = progress(Accelerator(), len(labelled.rows) * len(names) * seeds, "probe")
    for name in names:
        probes[name] = []
        for seed in range(seeds):
            model = load_objective(_run(folder, name, seed) / "model")
            with torch.random.fork_rng():
                features = pooled_features(Accelerator(), model, cache, labelled.rows, bar)
            probes[name].append(evaluate(features, labelled.y_N, labelled.folds(seed)).linear)
        bits = [summary_of(_run(folder, name, seed))["bits_per_code"] for seed in range(seeds)]
        per_step = [_seconds(folder, name, seed) for seed in range(seeds)]
        yield Row(
            what=f"{name}: {np.mean(bits):.3f} ± {_error(bits):.3f} bits per code; {np.mean(per_step):.0f} s; probe",
            unit="",
            ours=float(np.mean(probes[name])),
            error=_error(probes[name]),
            peer=float(np.mean(probes[names[0]])),
            alternative=names[0],
            ratio=float(np.mean(probes[name]) - np.mean(probes[names[0]])),
        )
    bar.close()


def _train(folder: Path, cache: TokenCache, runs: dict[tuple[str, int], tuple[list[str], int]]) -> None:
    """All trainings that are not finished, one on each core."""
    cores: Queue[int] = Queue()
    for core in sorted(os.sched_getaffinity(0)):
        cores.put(core)
    bar = progress(Accelerator(), len(runs), "trainings")

    def train(item: tuple[tuple[str, int], tuple[list[str], int]]) -> None:
        (name, seed), (flags, steps) = item
        core = cores.get()
        try:
            pairs = [f"--objective.{key}={value}" for key, value in zip(flags[::2], flags[1::2], strict=True)]
            command = ["taskset", "-c", str(core), sys.executable, str(Path(__file__).parents[1] / "pretrain_ar.py")]
            command += ["--cache", cache.address, "--seed", str(seed), "--steps", str(steps), *pairs]
            command += ["--validate_every", str(steps), "--save_every", str(steps), "--attention", "plain"]
            result = subprocess.run(
                [*command, "--out", str(_run(folder, name, seed))], capture_output=True, text=True, check=False
            )
        finally:
            cores.put(core)
        if result.returncode:
            raise ValueError(f"{name}, seed {seed}: {result.stderr.strip().splitlines()[-1]}")
        bar.update()

    with ThreadPoolExecutor(cores.qsize()) as pool:
        list(pool.map(train, runs.items()))
    bar.close()


def _run(folder: Path, name: str, seed: int) -> Path:
    return folder / f"{name.replace(':', '').replace(',', '').replace(' ', '-')}-seed{seed}"


def _seconds(folder: Path, name: str, seed: int) -> float:
    return float(summary_of(_run(folder, name, seed))["seconds"])


def _error(values: Sequence[float]) -> float:
    """Standard error of the mean."""
    return float(np.std(values, ddof=1) / len(values) ** 0.5)
