"""A tokenize that is killed at any moment is completed by the next one, byte for byte."""

import hashlib
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from .conftest import DIGITS, ENVIRONMENT, ROOT, last_line, start


def contents(cache: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted((cache / "shards").iterdir())}


@pytest.mark.parametrize("trial", [0, *(pytest.param(i, marks=pytest.mark.soak) for i in range(1, 40))])
def test_a_killed_tokenize_is_completed(house: Path, answers: dict[str, Any], tmp_path: Path, trial: int) -> None:
    tokenizer = answers["train_tokenizer"]["run"]
    flags = [
        "--videos",
        DIGITS,
        "--tokenizer",
        tokenizer,
        "--shard_size",
        "7",
        "--caches",
        str(tmp_path),
        "--keep_pixels",
        "raw",
    ]
    command = [sys.executable, str(ROOT / "pipelines" / "tokenize.py"), *flags]
    process = subprocess.Popen(
        command,
        cwd=house,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        env=ENVIRONMENT,
    )
    while not list(tmp_path.glob("*/shards/*")) and process.poll() is None:
        time.sleep(0.001)
    time.sleep(random.Random(trial).uniform(0, 0.4))
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    made = last_line(start(house, "tokenize", *flags))
    again = last_line(start(house, "tokenize", *flags[:-3], str(tmp_path / "straight"), *flags[-2:]))
    assert contents(Path(made["cache"])) == contents(Path(again["cache"]))
    assert len(contents(Path(made["cache"]))) == 12
