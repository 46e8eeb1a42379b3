"""`accelerate launch --num_processes 2` gives the same cache, the same shards and the same training as one process."""

import hashlib
import socket
import sys
from pathlib import Path
from typing import Any

import pytest

from .conftest import DIGITS, TINY_MODEL, TINY_TOKENIZER, last_line, start


def launcher() -> list[str]:
    with socket.socket() as probe:  # a port that is free now, so that two test runs do not meet
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    flags = [
        "--cpu",
        "--num_processes",
        "2",
        "--main_process_port",
        port,
        "--num_machines",
        "1",
        "--mixed_precision",
        "no",
    ]
    return [sys.executable, "-m", "accelerate.commands.launch", *flags, "--dynamo_backend", "no"]


def hashes(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def test_two_processes_write_the_same_cache(house: Path, answers: dict[str, Any], tmp_path: Path) -> None:
    flags = ["--videos", DIGITS, "--tokenizer", answers["train_tokenizer"]["run"], "--shard_size", "7"]
    made = last_line(start(house, "tokenize", *flags, "--caches", str(tmp_path / "caches"), launch=launcher()))
    assert made["key"] == answers["tokenize"]["key"]
    one, two = house / answers["tokenize"]["cache"], Path(made["cache"])
    assert hashes(two / "shards") == hashes(one / "shards")
    assert len(hashes(two / "shards")) == 12
    assert (two / "manifest.json").read_bytes() == (one / "manifest.json").read_bytes()


def test_two_processes_train_the_same_model(house: Path, answers: dict[str, Any], tmp_path: Path) -> None:
    two = last_line(start(house, "pretrain_ar", *TINY_MODEL, "--out", str(tmp_path / "two"), launch=launcher()))
    assert two["loss"] == pytest.approx(answers["pretrain_ar"]["loss"], abs=1e-4)


def test_two_processes_train_the_same_tokenizer(house: Path, answers: dict[str, Any], tmp_path: Path) -> None:
    flags = ["--videos", DIGITS, *TINY_TOKENIZER, "--precision", "fp32"]
    one = last_line(start(house, "train_tokenizer", *flags, "--out", str(tmp_path / "one")))
    two = last_line(start(house, "train_tokenizer", *flags, "--out", str(tmp_path / "two"), launch=launcher()))
    assert two["psnr"] == pytest.approx(one["psnr"], abs=0.01)
