"""Many runs of pretrain_ar.py: on CPUs one on each core, else one after the other; what is finished is not done again."""

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import Queue

import torch
from accelerate import Accelerator

from data.cache import TokenCache
from pipelines.run import progress, summary_of


@dataclass(frozen=True)
class Job:
    """A training: what people call it, its folder, its length, and the flags that make it what it is."""

    name: str
    out: Path
    steps: int
    seed: int
    flags: Sequence[str]

    @property
    def finished(self) -> bool:
        return (self.out / "summary.json").exists() and summary_of(self.out)["step"] == self.steps


def train(jobs: Sequence[Job], cache: TokenCache, device: torch.device, what: str = "trainings") -> None:
    """Start all that are not finished, and delete their checkpoints when they are; the models stay.

    Raises:
        ValueError: if a training fails; says what it said.
    """
    places: Queue[list[str]] = Queue()
    for core in sorted(os.sched_getaffinity(0)) if device.type == "cpu" and shutil.which("taskset") else []:
        places.put(["taskset", "-c", str(core)])
    if places.empty():
        places.put([])
    bar = progress(Accelerator(), len(jobs), what)

    def start(job: Job) -> None:
        if not job.finished:
            place = places.get()
            try:
                result = subprocess.run(
                    [*place, *_command(job, cache, device)], capture_output=True, text=True, check=False
                )
            finally:
                places.put(place)
            if result.returncode:
                said = result.stderr.strip().splitlines() or [f"ended with code {result.returncode}"]
                raise ValueError(f"{job.name}, seed {job.seed}: {said[-1]}")
            shutil.rmtree(job.out / "checkpoints", ignore_errors=True)
        bar.update()

    with ThreadPoolExecutor(places.qsize()) as pool:
        list(pool.map(start, jobs))
    bar.close()


def _command(job: Job, cache: TokenCache, device: torch.device) -> list[str]:
    steps = str(job.steps)
    return [
        *(sys.executable, str(Path(__file__).with_name("pretrain_ar.py"))),
        *("--out", str(job.out), "--cache", cache.address, "--seed", str(job.seed)),
        *("--validate_every", steps, "--save_every", steps),
        *("--attention", "plain" if device.type == "cpu" else "auto"),
        *job.flags,
        *("--steps", steps),
    ]
