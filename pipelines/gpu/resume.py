"""Part 7: DDP and FSDP with one process: a run that is killed and resumed has the losses of a run that was not."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import psutil

from pipelines.benchmarks import Row
from pipelines.benchmarks.synthetic import numbered_videos, synthetic_cache
from pipelines.gpu.commands import start, summary
from pipelines.gpu.part import Setting, attempt, run

SETTINGS = ["--steps", 200, "--save_every", 20, "--batch_size", 8, "--warmup", 5, "--validate_every", 200]
DRY_SETTINGS = ["--steps", 60, "--save_every", 10, "--batch_size", 8, "--warmup", 5]
MODEL = ["--objective.width", 96, "--objective.depth", 2, "--objective.heads", 2]
ACCELERATE = [
    "-m",
    "accelerate.commands.launch",
    "--num_processes",
    "1",
    "--num_machines",
    "1",
    "--mixed_precision",
    "no",
]
ACCELERATE += ["--dynamo_backend", "no", "--main_process_port"]
TORCHRUN = ["-m", "torch.distributed.run", "--nproc_per_node", "1", "--master_port"]
"""accelerate launch refuses --multi_gpu with one process; torchrun starts DDP with one."""
FSDP = ["--use_fsdp", "--fsdp_version", "2", "--fsdp_auto_wrap_policy", "TRANSFORMER_BASED_WRAP"]
MODES: dict[str, tuple[list[str], list[str], str]] = {
    "one process": (ACCELERATE, [], "sdpa"),
    "DDP": (TORCHRUN, [], "sdpa"),
    "FSDP": (ACCELERATE, FSDP, "sdpa"),
    "DDP, flex": (TORCHRUN, [], "flex"),
}
"""Name -> launcher up to its port, further flags of the launcher, attention kernel."""


def measure(setting: Setting) -> Iterator[Row]:
    """Yield per mode the largest difference of the losses after a kill, and of two whole runs of one process.

    All runs start at once, and all killed runs are resumed at once.
    """
    # Each run measures the attention kernels and so compiles flex: the default is a compiler per core and run.
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "2"
    synthetic_cache(setting.work / "caches", numbered_videos(256), views=1)
    modes = ["one process"] if setting.dry else list(MODES)
    names = [(mode, kind) for mode in modes for kind in ("whole", "killed")] + [("one process", "repeated")]
    runs = {name: _pretrain(setting, i, *name) for i, name in enumerate(names)}
    steps = _kill_after_checkpoint(setting, {mode: runs[mode, "killed"] for mode in modes})
    resumed = {mode: _pretrain(setting, 20 + i, mode, "killed") for i, mode in enumerate(steps)}
    for mode in modes:
        yield from attempt(f"{mode}: kill and resume", partial(_rows, setting, mode, steps, runs, resumed))
    yield from attempt("repeated", partial(_repeated, setting, runs))


def _pretrain(setting: Setting, number: int, mode: str, kind: str) -> subprocess.Popen:
    launcher, flags, kernel = MODES[mode]
    # Each run needs a port of its own.
    launch = [*launcher, str(29500 + number), *["--cpu"] * setting.dry, *flags]
    attention = "plain" if setting.dry else kernel
    settings = [*(DRY_SETTINGS if setting.dry else SETTINGS), "--precision", "fp32", "--attention", attention]
    return start(setting, "pretrain_ar", "--out", _folder(setting, mode, kind), *settings, *MODEL, launch=launch)


def _folder(setting: Setting, mode: str, kind: str) -> Path:
    return setting.work / "resume" / f"{mode.replace(', ', '-').replace(' ', '-')}-{kind}"


def _kill_after_checkpoint(setting: Setting, processes: dict[str, subprocess.Popen]) -> dict[str, int]:
    """Kill each run, with its launcher, at its first checkpoint; return the steps of these checkpoints by mode."""
    steps: dict[str, int] = {}
    while processes.keys() - steps and setting.left() > 5:
        for mode in list(processes.keys() - steps):
            ended = processes[mode].poll() is not None
            if saved := sorted((_folder(setting, mode, "killed") / "checkpoints").glob("step_*")):
                _kill_tree(processes[mode])
                steps[mode] = int(saved[-1].name.removeprefix("step_"))
            elif ended:
                print(f"{mode}: no checkpoint; exit code {processes.pop(mode).returncode}", file=sys.stderr)
        time.sleep(0.01)
    return steps


def _kill_tree(process: subprocess.Popen) -> None:
    if process.poll() is None:
        parent = psutil.Process(process.pid)
        for part in [*parent.children(recursive=True), parent]:
            part.kill()
    process.wait()


def _rows(
    setting: Setting,
    mode: str,
    steps: dict[str, int],
    runs: dict[tuple[str, str], subprocess.Popen],
    resumed: dict[str, subprocess.Popen],
) -> Iterator[Row]:
    if mode not in resumed:
        raise RuntimeError("the run to kill wrote no checkpoint; see gpu.log")
    for process in (runs[mode, "whole"], resumed[mode]):
        summary(process, setting)
    count, difference = _difference(setting, (mode, "whole"), (mode, "killed"))
    what = f"{mode}: killed after step {steps[mode]}, largest difference of {count} logged losses"
    yield Row(what, "nats", difference, reach="0, or that of two whole runs")


def _repeated(setting: Setting, runs: dict[tuple[str, str], subprocess.Popen]) -> Iterator[Row]:
    summary(runs["one process", "repeated"], setting)
    count, difference = _difference(setting, ("one process", "whole"), ("one process", "repeated"))
    yield Row(f"one process: two whole runs, largest difference of {count} logged losses", "nats", difference)


def _difference(setting: Setting, first: tuple[str, str], second: tuple[str, str]) -> tuple[int, float]:
    """Return the number of losses that two runs logged, and their largest difference."""
    a, b = (_losses(_folder(setting, *name)) for name in (first, second))
    if a.keys() != b.keys():
        raise RuntimeError(f"the runs logged different steps: {sorted(a)} and {sorted(b)}")
    return len(a), max(abs(a[step] - b[step]) for step in a)


def _losses(folder: Path) -> dict[int, float]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


if __name__ == "__main__":
    run(measure)
