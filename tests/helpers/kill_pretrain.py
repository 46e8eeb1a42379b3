"""Kill pretrain_ar repeatedly: `python -m tests.helpers.kill_pretrain TRIALS PROJECT FOLDER`.

PROJECT is a folder with a cache. Everything is imported once; each start is a forked child that runs the whole command. A trial
is up to three starts that are killed at random moments, and one that is not. Prints JSON: number of kills before the end, state
of the run at each kill, and errors.
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
from pathlib import Path
from typing import Any

import torch
import xxhash

from data.files import compact
from pipelines.commands import pretrain_ar
from pipelines.engine import device, training
from tests.helpers.commands import TINY_MODEL
from tests.helpers.forked_commands import exit_code, fork_command

FLAGS = [*TINY_MODEL, "--steps", "16", "--save_every", "2", "--validate_every", "4"]
WHOLE = ["state.json", "model.safetensors", "optimizer.safetensors"]
"""Files of a checkpoint."""
SIGNS = [None, None, "checkpoints/.step_*", "model/*", "*.tmp-*"]
"""Files that a kill waits for after its random delay, as a sign that something is being written. None means no wait."""


def child(out: Path) -> int:
    """Fork a process that pre-trains, with its output in OUT.log; return its id."""
    return fork_command(Path(f"{out}.log"), pretrain_ar.Pretrain, pretrain_ar.main, [*FLAGS, "--out", str(out)])


def incomplete_files(out: Path) -> list[str]:
    """Return files and checkpoints that have their final names but are incomplete."""
    incomplete = []
    for step in out.glob("checkpoints/step_*"):
        try:
            hashes = json.loads((step / "state.json").read_text())["xxh3"]
            good = sorted(file.name for file in step.iterdir()) == sorted(WHOLE) and sorted(hashes) == sorted(WHOLE[1:])
            good &= all(
                xxhash.xxh3_128(step.joinpath(name).read_bytes()).hexdigest() == hashes[name] for name in hashes
            )
        except (OSError, ValueError, KeyError):
            good = False
        if not good:
            incomplete.append(step.name)
    for file in out.glob("*.json"):
        try:
            json.loads(file.read_text())
        except ValueError:
            incomplete.append(file.name)
    if (out / "config.yaml").exists() and "objective:" not in (out / "config.yaml").read_text():
        incomplete.append("config.yaml")
    return incomplete


def stage(out: Path) -> str:
    """Describe how far a run had come when it was killed."""
    if list(out.glob("checkpoints/.step_*")):
        return "while a checkpoint is written"
    if list(out.glob("model/*")) and not (out / "summary.json").exists():
        return "while the model is written"
    for name in ("summary.json", "checkpoints", "metrics.jsonl", "choices.json"):
        if (out / name).exists():
            return f"with {name}"
    return "start-up"


def result(out: Path) -> dict[str, Any]:
    """Return everything that a run writes, to the last bit, except times."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    files = sorted(file for file in out.rglob("*") if file.is_file())
    summary = json.loads((out / "summary.json").read_text())
    times = {"seconds", "clips_per_second", "peak_memory", "run"}
    return {
        "logged": [{k: float(v).hex() for k, v in line.items() if k not in times} for line in lines],
        "summary": compact({k: v for k, v in summary.items() if k not in times}),
        "names": [str(file.relative_to(out)) for file in files],
        "sha256": [hashlib.sha256(file.read_bytes()).hexdigest() for file in files if file.suffix == ".safetensors"],
    }


def main(trials: int, project: Path, folder: Path) -> dict[str, Any]:
    torch.set_num_threads(1)
    device.cores = lambda accelerator: 1
    training._LOG_EVERY = 1
    os.chdir(project)
    durations = []
    for i in range(2):
        began = time.perf_counter()
        assert exit_code(child(folder / f"straight{i}")) == 0, (folder / f"straight{i}.log").read_text()
        durations.append(time.perf_counter() - began)
    expected = result(folder / "straight0")
    # Two checkpoints of model and optimizer, the model, and the copy of its tokenizer.
    assert len(expected["logged"]) == 16 + 4 and len(expected["sha256"]) == 2 * 2 + 1 + 1
    draw, early, wrong = random.Random(0), 0, []
    stages: Counter[str] = Counter()
    for trial in range(4 * trials):
        # On a busy machine the first durations were too long, so kills come late and more trials are needed.
        if trial >= trials and early >= trials:
            break
        out = folder / f"trial{trial}"
        for _ in range(draw.randint(1, 3)):
            process = child(out)
            time.sleep(draw.uniform(0, min(durations)))
            sign = draw.choice(SIGNS)
            while not (ended := os.waitpid(process, os.WNOHANG)[0]) and sign and not list(out.glob(sign)):
                time.sleep(0.0005)
            if ended:
                break
            os.kill(process, signal.SIGKILL)
            os.waitpid(process, 0)
            early += 1
            stages[stage(out)] += 1
            wrong += [f"trial {trial}: {name} is incomplete" for name in incomplete_files(out)]
        if exit_code(child(out)) != 0:
            wrong.append(f"trial {trial}: the next start fails: {Path(f'{out}.log').read_text()[-300:]}")
            continue
        actual = result(out)
        wrong += [f"trial {trial}: other {key}: {actual[key]}" for key in expected if actual[key] != expected[key]]
        shutil.rmtree(out)
    return {"early": early, "seconds": min(durations), "stages": stages, "wrong": wrong}


if __name__ == "__main__":
    print(json.dumps(main(int(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]))))
