"""Kill tokenize repeatedly: `python -m tests.helpers.kill_tokenize TRIALS TOKENIZER FOLDER`.

Everything is imported once. Each trial is a forked child that tokenizes and is killed at a random moment, followed by a child
that is not killed. Prints JSON: trials, number of kills before the end, and errors.
"""

import hashlib
import io
import json
import os
import random
import shutil
import signal
import sys
import time
from contextlib import redirect_stderr
from pathlib import Path

import torch
from accelerate import Accelerator

from data.sources import load_source
from pipelines.commands.tokenize import cache_writer, fill
from pipelines.settings.tokenize import Tokenize
from tokenizer import load_tokenizer

VIDEOS = "builtin:moving-digits:24:16"


def tokenize(tokenizer: torch.nn.Module, caches: Path) -> Path:
    config = Tokenize(videos=VIDEOS, caches=caches, shard_size=3, workers=1, keep_pixels="raw")
    source = load_source(VIDEOS)
    writer = cache_writer(config, source, tokenizer)
    if not writer.finished:
        with redirect_stderr(io.StringIO()):
            fill(Accelerator(cpu=True), writer, config, source, tokenizer)
        writer.finish(None)
    return writer.folder


def child(tokenizer: torch.nn.Module, caches: Path) -> int:
    """Fork a process that tokenizes; return its id."""
    process = os.fork()
    if process == 0:
        try:
            tokenize(tokenizer, caches)
            os._exit(0)
        except BaseException:
            import traceback

            traceback.print_exc()
            os._exit(1)
    return process


def contents(caches: Path) -> dict[str, str]:
    files = sorted(path for path in caches.rglob("*") if path.is_file() or path.is_symlink())
    return {str(path.relative_to(caches)): _sha256(path) for path in files}


def incomplete_files(caches: Path) -> list[str]:
    """Return files that have their final names but are incomplete. A record without its tar counts as nothing."""
    incomplete = []
    for tar in caches.glob("*/shards/*.tar"):
        record = tar.with_suffix(".json")
        if not _is_json(record) or json.loads(record.read_text())["sha256"] != _sha256(tar):
            incomplete.append(str(tar))
    for name in ("shards/*.json", "manifest.json", "plan.json"):
        incomplete += [str(path) for path in caches.glob(f"*/{name}") if not _is_json(path)]
    return incomplete


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _is_json(path: Path) -> bool:
    try:
        return isinstance(json.loads(path.read_text()), dict)
    except (OSError, ValueError):
        return False


def main(trials: int, tokenizer_folder: str, folder: Path) -> dict[str, object]:
    torch.set_num_threads(1)
    tokenizer = load_tokenizer(tokenizer_folder)
    durations = []
    # Durations of undisturbed runs.
    for i in range(2):
        began = time.perf_counter()
        os.waitpid(child(tokenizer, folder / f"straight{i}"), 0)
        durations.append(time.perf_counter() - began)
    expected = contents(folder / "straight0")
    draw = random.Random(0)
    early, wrong = 0, []
    for trial in range(4 * trials):
        # On a busy machine the first durations were too long, so kills come late and more trials are needed.
        if trial >= trials and early > 0.8 * trials:
            break
        caches = folder / f"trial{trial}"
        process = child(tokenizer, caches)
        time.sleep(draw.uniform(0, min(durations)))
        if os.waitpid(process, os.WNOHANG)[0] == 0:
            early += 1
            os.kill(process, signal.SIGKILL)
            os.waitpid(process, 0)
        wrong += [f"trial {trial}: {path} is incomplete" for path in incomplete_files(caches)]
        if os.waitpid(child(tokenizer, caches), 0)[1] != 0:
            wrong.append(f"trial {trial}: the next run fails")
        elif contents(caches) != expected:
            wrong.append(f"trial {trial}: {sorted(set(contents(caches).items()) ^ set(expected.items()))}")
        shutil.rmtree(caches)
    return {"trials": trials, "early": early, "seconds": min(durations), "wrong": wrong}


if __name__ == "__main__":
    print(json.dumps(main(int(sys.argv[1]), sys.argv[2], Path(sys.argv[3]))))
