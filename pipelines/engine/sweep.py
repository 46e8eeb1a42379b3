"""Many trainings and probes: on CPUs side by side on its cores, else one after the other."""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import active_children, get_context
from pathlib import Path
from queue import Queue
from typing import Any

import torch
from accelerate import Accelerator
from threadpoolctl import threadpool_limits

from data.cache import TokenCache
from pipelines.engine.console import progress
from pipelines.engine.run import summary_of

MOST_AT_ONCE = 4
"""Calls of `run_in_parallel` that run at once: each may need gigabytes."""


@dataclass(frozen=True)
class Job:
    """A training: what people call it, its folder, its length and seed, and the flags that make it what it is."""

    name: str
    out: Path
    steps: int
    seed: int
    flags: Sequence[str]

    @property
    def finished(self) -> bool:
        return (self.out / "summary.json").exists() and summary_of(self.out)["step"] == self.steps


def train(jobs: Sequence[Job], cache: TokenCache, device: torch.device, what: str = "trainings") -> None:
    """Run pretrain_ar.py for all that are not finished, on CPUs on one core each. Models stay, checkpoints do not.

    Raises:
        ValueError: if a training fails; says what it said.
    """
    places: Queue[list[str]] = Queue()
    for core in _cores() if device.type == "cpu" and shutil.which("taskset") else []:
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
        try:
            for done in as_completed([pool.submit(start, job) for job in jobs]):
                done.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    bar.close()


def run_in_parallel(
    work: Callable[..., None], calls: Sequence[tuple[Any, ...]], device: torch.device, what: str
) -> None:
    """`work(*call)` of all calls, in processes that share out the cores; on other devices in one process."""
    context = get_context("spawn")
    cores, places = _cores(), context.SimpleQueue()
    count = max(1, min(len(cores), MOST_AT_ONCE, len(calls))) if device.type == "cpu" else 1
    for number in range(count):
        places.put(cores[number::count])
    bar = progress(Accelerator(), len(calls), what)
    pool = ProcessPoolExecutor(count, mp_context=context, initializer=_settle, initargs=(places,))
    try:
        for done in as_completed([pool.submit(work, *call) for call in calls]):
            done.result()
            bar.update()
    except BaseException:  # nobody waits for minutes of work that is wanted no more
        for process in active_children():
            process.kill()
        raise
    finally:
        pool.shutdown(cancel_futures=True)
        bar.close()


def _settle(places: Any) -> None:
    """Stay on some cores, with a thread for each; leave Ctrl-C to the process that started this one."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    cores = places.get()
    if cores:
        os.sched_setaffinity(0, cores)
        torch.set_num_threads(len(cores))
        threadpool_limits(len(cores))


def _cores() -> list[int]:
    """Those that this process may use; none where the system does not say."""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []


def _command(job: Job, cache: TokenCache, device: torch.device) -> list[str]:
    steps = str(job.steps)
    return [
        *(sys.executable, str(Path(__file__).parents[1] / "pretrain_ar.py")),
        *("--validate_every", steps, "--save_every", steps),
        *("--attention", "plain" if device.type == "cpu" else "auto"),
        *job.flags,  # a settings file among them has no say in what follows
        *("--out", str(job.out), "--cache", cache.address, "--seed", str(job.seed), "--steps", steps),
        *("--plan", "false"),
    ]
