"""Stop commands by signals at random moments: `python -m tests.helpers.stop_commands TRIALS PROJECT FOLDER COMMAND...`.

PROJECT is a folder with a cache and a tokenizer. Everything is imported once; each start is a forked child, in a session of its
own, that runs the whole command. A trial is a start that gets SIGTERM or SIGUSR1 at a random moment, and some of them a second
signal; the next trial continues it. After three stops, and at the end, the command runs to its end, and everything that it
wrote must equal, to the last bit, what an undisturbed run writes. Prints JSON: number of stops, longest time from a signal to
the end of the process, state at each stop, and errors.
"""

import hashlib
import json
import os
import random
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

from pipelines.commands import compare, pretrain_ar, tokenize
from pipelines.engine import device, signals, training
from tests.helpers.commands import DIGITS, TINY_MODEL
from tests.helpers.forked_commands import exit_code, fork_command
from tests.helpers.kill_pretrain import incomplete_files, result

_LEFT_OVER_PROCESSES = 5.0
"""Seconds in which helpers of multiprocessing end after their parent."""
_TRAIN = [*TINY_MODEL, "--steps", "16", "--save_every", "16", "--validate_every", "4"]
_ENTRY = """\
batch_size: 4
warmup: 1
precision: fp32
objective:
  class_path: ARVideo
  init_args: {width: 24, depth: 2, heads: 2, decoder_width: 24, decoder_depth: 1, decoder_heads: 2}
"""


@dataclass(frozen=True)
class Stopped:
    """A command to stop: how it is started, what it wrote at its end, and what may not be there after a stop."""

    main: Callable[[Path], tuple[Any, Any, list[str]]]
    """Folder of the trial -> settings class, main function, flags."""
    written: Callable[[Path], Any]
    wrong_after_stop: Callable[[Path], list[str]]


def _trained(run: Path) -> Any:
    """Return what a training run writes, except checkpoints before its end."""
    for early in sorted(run.glob("checkpoints/step_*"))[:-1]:
        shutil.rmtree(early)
    return result(run)


def train(workers: int) -> Stopped:
    def wrong(folder: Path) -> list[str]:
        run = folder / "run"
        file = run / "metrics.jsonl"
        logged = [json.loads(line)["step"] for line in file.read_text().splitlines()] if file.exists() else []
        saved = [int(path.name.removeprefix("step_")) for path in run.glob("checkpoints/step_*")]
        lost = logged and max(saved, default=0) != logged[-1]
        return incomplete_files(run) + ([f"steps {logged[-1:]} were logged, {saved} saved"] if lost else [])

    return Stopped(
        lambda folder: (
            pretrain_ar.Pretrain,
            pretrain_ar.main,
            [*_TRAIN, "--workers", str(workers), "--out", str(folder / "run")],
        ),
        lambda folder: _trained(folder / "run"),
        wrong,
    )


def _tokenize(folder: Path) -> tuple[Any, Any, list[str]]:
    flags = ["--videos", DIGITS, "--shard_size", "3", "--workers", "1", "--keep_pixels", "raw"]
    (tokenizer,) = Path("runs").glob("train_tokenizer-*")
    places = ["--tokenizer", str(tokenizer), "--caches", str(folder / "caches"), "--out", str(folder / "run")]
    return tokenize.Tokenize, tokenize.main, [*flags, *places]


def _shards(folder: Path) -> dict[str, str]:
    files = sorted(path for path in (folder / "caches").rglob("*") if path.is_file() or path.is_symlink())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def _unfinished_shards(folder: Path) -> list[str]:
    return [str(path) for pattern in ("*.claim", "*.tmp-*") for path in (folder / "caches").rglob(pattern)]


def _compare(folder: Path) -> tuple[Any, Any, list[str]]:
    (folder / "entry.yaml").write_text(_ENTRY)
    flags = ["--entries", str(folder / "entry.yaml"), "--seeds", "2", "--points", "2", "--budget", "clips"]
    return compare.Compare, compare.main, [*flags, "--amount", "400", "--out", str(folder / "run")]


def _compared(folder: Path) -> Any:
    summary = json.loads((folder / "run" / "summary.json").read_text())
    times = {"seconds", "clips_per_second", "peak_memory"}
    rows = [{k: v for k, v in row.items() if k not in times} for row in summary["table"]]
    for row in rows:
        for point in row["curve"]:
            del point["seconds"]
    files = sorted((folder / "run").glob("runs/*/**/*.safetensors"))
    return rows, {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


COMMANDS = {
    "train": train(workers=0),
    "train-workers": train(workers=2),
    "tokenize": Stopped(_tokenize, _shards, _unfinished_shards),
    "compare": Stopped(_compare, _compared, lambda folder: []),
}


def child(command: Stopped, folder: Path) -> int:
    """Fork a process that runs a command in a session of its own, with its output in FOLDER.log; return its id."""
    folder.mkdir(parents=True, exist_ok=True)
    return fork_command(Path(f"{folder}.log"), *command.main(folder), session=True)


def left_in_session(session: int) -> list[str]:
    """Return the processes of a session that still run some seconds after its leader has ended."""
    deadline = time.monotonic() + _LEFT_OVER_PROCESSES
    while True:
        left = []
        for process in psutil.process_iter():
            try:
                if os.getsid(process.pid) == session and process.status() != psutil.STATUS_ZOMBIE:
                    left.append(f"{process.pid} {' '.join(process.cmdline())[:100]}")
            except (psutil.Error, ProcessLookupError):
                continue
        if not left or time.monotonic() > deadline:
            return left
        time.sleep(0.05)


def stage(folder: Path) -> str:
    """Describe how far a command had come when it was stopped."""
    for sign in (
        "run/summary.json",
        "run/runs/*/probe-*.json",
        "run/runs/*/model",
        "run/checkpoints",
        "run/metrics.jsonl",
    ):
        if list(folder.glob(sign)):
            return f"with {sign}"
    if list(folder.glob("caches/*/shards/*.tar")):
        return "with caches/*/shards/*.tar"
    return "with run/" if (folder / "run").exists() else "start-up"


def run_to_end(command: Stopped, folder: Path) -> tuple[float, str]:
    """Run a command undisturbed; return its seconds and, if it fails, the end of its output."""
    began = time.monotonic()
    code = exit_code(child(command, folder))
    return (
        time.monotonic() - began,
        "" if code == 0 else f"exit code {code}: {Path(f'{folder}.log').read_text()[-500:]}",
    )


def stop(command: Stopped, folder: Path, delay: float, draw: random.Random) -> tuple[float | None, list[str]]:
    """Start a command and stop it; return the seconds from the signal to its end, None if it ended before, and errors."""
    number = draw.choice(signals.STOP_SIGNALS)
    whole_group, second = draw.random() < 0.3, draw.random() < 0.3
    process = child(command, folder)
    time.sleep(delay)
    if os.waitpid(process, os.WNOHANG)[0]:
        return None, []
    began = time.monotonic()
    (os.killpg if whole_group else os.kill)(process, number)
    if second:
        time.sleep(draw.uniform(0, 0.3))
        os.kill(process, signal.SIGTERM)
    code = exit_code(process)
    seconds = time.monotonic() - began
    wrong = [f"process {line} still runs" for line in left_in_session(process)]
    # A second signal may be the first one that a process gets after its start.
    expected = {0, 128 + number} | ({128 + signal.SIGTERM} if second else set())
    if signals.exit_code(code) not in expected:
        wrong.append(f"exit code {code} after {number.name}: {Path(f'{folder}.log').read_text()[-1500:]}")
    return seconds, [*wrong, *command.wrong_after_stop(folder)]


def trials(name: str, count: int, folder: Path) -> dict[str, Any]:
    """Stop a command `count` times."""
    command, draw = COMMANDS[name], random.Random(0)
    duration, error = run_to_end(command, folder / "straight")
    assert not error, error
    expected = command.written(folder / "straight")
    times: list[float] = []
    wrong: list[str] = []
    stages: Counter[str] = Counter()
    number = 0
    while len(times) < count and number < 4 * count:
        trial = folder / f"trial{number}"
        number += 1
        for _ in range(min(3, count - len(times))):
            seconds, errors = stop(command, trial, draw.uniform(0, duration), draw)
            wrong += [f"{trial.name}: {error}" for error in errors]
            if seconds is None:
                break
            times.append(seconds)
            stages[stage(trial)] += 1
        _, error = run_to_end(command, trial)
        if error:
            wrong.append(f"{trial.name}: the next start fails: {error}")
        elif command.written(trial) != expected:
            wrong.append(f"{trial.name}: wrote something else")
        else:
            shutil.rmtree(trial)
    return {"stops": len(times), "longest": max(times), "seconds": duration, "stages": stages, "wrong": wrong}


def main(count: int, project: Path, folder: Path, names: list[str]) -> dict[str, Any]:
    torch.set_num_threads(1)
    device.cores = lambda accelerator: 1
    training._LOG_EVERY = 1
    os.chdir(project)
    return {name: trials(name, count, folder / name) for name in names}


if __name__ == "__main__":
    print(json.dumps(main(int(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[4:])))
