"""`accelerate launch --num_processes 2` gives the same cache, shards and weights as one process."""

import hashlib
import json
import socket
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.commands import DIGITS, TINY_MODEL, TINY_TOKENIZER, last_line, start, start_ranks


def launcher() -> list[str]:
    # A free port, so that two test runs do not collide.
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    flags = ["--cpu", "--num_processes", "2", "--main_process_port", port, "--num_machines", "1"]
    flags += ["--mixed_precision", "no", "--dynamo_backend", "no"]
    return [sys.executable, "-m", "accelerate.commands.launch", *flags]


def processes(folder: Path) -> int:
    """Return the number of processes that a run had."""
    return int(json.loads((folder / "environment.json").read_text())["processes"])


def hashes(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def test_two_processes_write_the_same_cache(finished_project: Path, answers: dict[str, Any], tmp_path: Path) -> None:
    flags = ["--videos", DIGITS, "--tokenizer", answers["train_tokenizer"]["run"], "--shard_size", "7"]
    flags += ["--out", str(tmp_path / "run")]
    made = last_line(
        start(finished_project, "tokenize", *flags, "--caches", str(tmp_path / "caches"), launch=launcher())
    )
    assert processes(tmp_path / "run") == 2
    assert made["key"] == answers["tokenize"]["key"]
    one, two = finished_project / answers["tokenize"]["cache"], Path(made["cache"])
    assert hashes(two / "shards") == hashes(one / "shards")
    assert len(hashes(two / "shards")) == 12
    assert (two / "manifest.json").read_bytes() == (one / "manifest.json").read_bytes()


@pytest.mark.soak
def test_two_processes_train_the_same_model(finished_project: Path, answers: dict[str, Any], tmp_path: Path) -> None:
    two = last_line(
        start(finished_project, "pretrain_ar", *TINY_MODEL, "--out", str(tmp_path / "two"), launch=launcher())
    )
    assert processes(tmp_path / "two") == 2
    assert two["loss"] == pytest.approx(answers["pretrain_ar"]["loss"], abs=1e-4)


@pytest.mark.soak
def test_two_processes_train_the_same_tokenizer(
    finished_project: Path, answers: dict[str, Any], tmp_path: Path
) -> None:
    flags = ["--videos", DIGITS, *TINY_TOKENIZER, "--precision", "fp32"]
    one = last_line(start(finished_project, "train_tokenizer", *flags, "--out", str(tmp_path / "one")))
    two = last_line(
        start(finished_project, "train_tokenizer", *flags, "--out", str(tmp_path / "two"), launch=launcher())
    )
    assert processes(tmp_path / "two") == 2
    assert two["psnr"] == pytest.approx(one["psnr"], abs=0.01)


def test_validation_works_with_fewer_clips_than_processes(
    finished_project: Path, answers: dict[str, Any], tmp_path: Path
) -> None:
    tokenizer = str(answers["train_tokenizer"]["run"])
    few = ["--videos", "builtin:moving-digits:24:1", "--tokenizer", tokenizer, "--caches", str(tmp_path / "caches")]
    cache = last_line(start(finished_project, "tokenize", *few, "--out", str(tmp_path / "few")))["cache"]
    flags = [*TINY_MODEL, "--cache", cache, "--out"]
    one = last_line(start(finished_project, "pretrain_ar", *flags, str(tmp_path / "one")))
    two = last_line(start_ranks(finished_project, "pretrain_ar", *flags, str(tmp_path / "two")))
    assert processes(tmp_path / "two") == 2
    assert two["loss"] == pytest.approx(one["loss"], abs=1e-4)


def test_a_mistake_ends_both_processes(tmp_path: Path) -> None:
    result = start(tmp_path, "tokenize", "--videos", "nowhere", launch=launcher())
    assert result.returncode != 0
    assert "nowhere: no such folder" in result.stderr
