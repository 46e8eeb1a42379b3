"""`accelerate launch --num_processes 2` gives the same cache, the same shards and the same training as one process."""

import hashlib
import json
import socket
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.commands import DIGITS, TINY_MODEL, TINY_TOKENIZER, last_line, start


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


def processes(folder: Path) -> int:
    """How many processes a run really had."""
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


def test_two_processes_train_the_same_model(finished_project: Path, answers: dict[str, Any], tmp_path: Path) -> None:
    two = last_line(
        start(finished_project, "pretrain_ar", *TINY_MODEL, "--out", str(tmp_path / "two"), launch=launcher())
    )
    assert processes(tmp_path / "two") == 2
    assert two["loss"] == pytest.approx(answers["pretrain_ar"]["loss"], abs=1e-4)


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


def test_a_process_without_a_clip_to_validate_on_does_not_keep_the_others_waiting(
    finished_project: Path, answers: dict[str, Any], tmp_path: Path
) -> None:
    tokenizer = str(answers["train_tokenizer"]["run"])
    few = ["--videos", "builtin:moving-digits:24:1", "--tokenizer", tokenizer, "--caches", str(tmp_path / "caches")]
    cache = last_line(start(finished_project, "tokenize", *few))["cache"]
    one = last_line(
        start(finished_project, "pretrain_ar", *TINY_MODEL, "--cache", cache, "--out", str(tmp_path / "one"))
    )
    two = last_line(
        start(
            finished_project,
            "pretrain_ar",
            *TINY_MODEL,
            "--cache",
            cache,
            "--out",
            str(tmp_path / "two"),
            launch=launcher(),
        )
    )
    assert two["loss"] == pytest.approx(one["loss"], abs=1e-4)


def test_a_mistake_in_two_processes_ends_all_of_them(tmp_path: Path) -> None:
    result = start(tmp_path, "tokenize", "--videos", "nowhere", launch=launcher())
    assert result.returncode != 0
    assert "nowhere: no such folder" in result.stderr
