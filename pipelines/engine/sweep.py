"""Execution of many training runs and probes: in parallel on the cores of a CPU, one after another on other devices."""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import active_children, get_context
from pathlib import Path
from queue import Queue
from typing import Any

import psutil
import torch
from accelerate import Accelerator
from threadpoolctl import threadpool_limits

from data.processes import end_with_parent, shielded
from pipelines.engine.console import progress
from pipelines.engine.run_files import summary_of
from pipelines.engine.signals import Stopped, child_environment, no_deadline

_MAX_PARALLEL = 4
"""Maximum number of parallel calls in `run_in_parallel`; each call may need gigabytes of memory."""


@dataclass(frozen=True)
class Job:
    """Training run: name for messages, address of its cache, run folder, number of steps, seed, further flags of pretrain_ar."""

    name: str
    cache: str
    out: Path
    steps: int
    seed: int
    flags: Sequence[str]

    @property
    def finished(self) -> bool:
        return (self.out / "summary.json").exists() and summary_of(self.out)["step"] == self.steps


def train(jobs: Sequence[Job], device: torch.device, title: str = "training runs") -> None:
    """Run pretrain_ar.py for all unfinished jobs; on a CPU, each job uses one core. Checkpoints of finished jobs are deleted.

    A signal or the failure of a job ends the other jobs, which save checkpoints first.

    Raises:
        ValueError: if a training run fails. The message contains the last line of its stderr.
    """
    # Prefixes that pin a command to a core. At any time, each prefix is used by one job at most.
    prefixes: Queue[list[str]] = Queue()
    cores = _cores() if device.type == "cpu" and shutil.which("taskset") else []
    for prefix in [["taskset", "-c", str(core)] for core in cores] or [[]]:
        prefixes.put(prefix)
    bar = progress(Accelerator(), len(jobs), title)

    def start(job: Job) -> None:
        if not job.finished:
            prefix = prefixes.get()
            command = [*prefix, *_command(job, device)]
            try:
                result = subprocess.run(command, env=child_environment(), capture_output=True, text=True, check=False)
            finally:
                prefixes.put(prefix)
            if result.returncode:
                lines = result.stderr.strip().splitlines() or [f"exit code {result.returncode}"]
                raise ValueError(f"{job.name}, seed {job.seed}: {lines[-1]}")
            shutil.rmtree(job.out / "checkpoints", ignore_errors=True)
        bar.update()

    pool = ThreadPoolExecutor(prefixes.qsize())
    futures: list[Future[None]] = []
    try:
        for job in jobs:
            futures.append(pool.submit(start, job))
        for done in as_completed(futures):
            done.result()
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        try:
            _end(futures)
        # The jobs still have to be waited for, and a thread may just have started one.
        except (KeyboardInterrupt, Stopped):
            _end(futures)
            raise
        raise
    finally:
        pool.shutdown(cancel_futures=True)
        bar.close()


def _end(futures: Sequence[Future[None]]) -> None:
    """Send SIGTERM to the jobs that threads run, and wait until they have ended."""
    asked: set[psutil.Process] = set()
    with no_deadline():
        # In a loop, because a thread may just be starting a job.
        while not all(future.done() for future in futures):
            children = set(psutil.Process().children())
            for process in children - asked:
                # It may have ended meanwhile.
                with suppress(psutil.NoSuchProcess):
                    process.terminate()
            asked |= children
            time.sleep(0.1)


def run_in_parallel(
    work: Callable[..., None], calls: Sequence[tuple[Any, ...]], device: torch.device, title: str
) -> None:
    """Run `work(*call)` for all calls: on a CPU in several processes that share the cores, on other devices in one process."""
    context = get_context("spawn")
    cores, shares = _cores(), context.SimpleQueue()
    count = max(1, min(len(cores), _MAX_PARALLEL, len(calls))) if device.type == "cpu" else 1
    for number in range(count):
        shares.put(cores[number::count])
    bar = progress(Accelerator(), len(calls), title)
    pool = ProcessPoolExecutor(count, mp_context=context, initializer=_initialise_worker, initargs=(shares,))
    try:
        with shielded():
            futures = [pool.submit(work, *call) for call in calls]
        for done in as_completed(futures):
            done.result()
            bar.update()
    # After an error, do not wait for the other calls, which may take minutes.
    except BaseException:
        for process in active_children():
            process.kill()
        raise
    finally:
        pool.shutdown(cancel_futures=True)
        bar.close()


def _initialise_worker(shares: Any) -> None:
    """Pin this process to a share of the cores, with one thread each; leave signals to the parent process."""
    end_with_parent()
    cores = shares.get()
    if cores:
        os.sched_setaffinity(0, cores)
        torch.set_num_threads(len(cores))
        threadpool_limits(len(cores))


def _cores() -> list[int]:
    """Return the cores that this process may use; an empty list if the system does not report them."""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []


def _command(job: Job, device: torch.device) -> list[str]:
    steps = str(job.steps)
    return [
        *(sys.executable, str(Path(__file__).parents[1] / "pretrain_ar.py")),
        *("--validate_every", steps, "--save_every", steps),
        *("--attention", "plain" if device.type == "cpu" else "auto"),
        *job.flags,
        # These flags come last, so a settings file in job.flags cannot override them.
        *("--out", str(job.out), "--cache", job.cache, "--seed", str(job.seed), "--steps", steps),
        *("--plan", "false"),
    ]
