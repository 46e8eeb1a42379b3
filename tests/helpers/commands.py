"""Commands started as a user starts them, in a new process or in this one."""

import importlib
import json
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from accelerate.state import AcceleratorState, GradientState, PartialState

from pipelines.engine.launch import command
from tests.helpers.forked import ENVIRONMENT, ROOT, Forked, Result

TINY_TOKENIZER = [
    *("--steps", "6", "--batch_size", "4", "--save_every", "3", "--warmup", "1"),
    *("--model.width", "16", "--model.depth", "1"),
]
TINY_MODEL = [
    *("--steps", "6", "--batch_size", "4", "--warmup", "1", "--validate_every", "3", "--save_every", "2"),
    *("--precision", "fp32", "--attention", "plain"),
    *("--objective.width", "24", "--objective.depth", "2", "--objective.heads", "2"),
    *("--objective.decoder_width", "24", "--objective.decoder_depth", "1", "--objective.decoder_heads", "2"),
]
DIGITS = "builtin:moving-digits:24:16"
TINIEST = [
    *(*TINY_TOKENIZER, "--videos", "builtin:moving-digits:8:2", "--clip.frames", "4", "--clip.size", "32"),
    *("--precision", "fp32"),
]
"""Flags of a tokenizer that trains in this process in less than a second."""


def start(folder: Path, script: str, *flags: str, launch: list[str] | None = None) -> Result:
    """Run a command in a folder in a forked process. With `launch`, for example [sys.executable], that program starts it."""
    program = [str(ROOT / "pipelines" / f"{script}.py"), *flags]
    if launch is None:
        return Forked(program, folder, ENVIRONMENT).wait(300)
    return subprocess.run([*launch, *program], cwd=folder, capture_output=True, text=True, timeout=300, env=ENVIRONMENT)


def begin_ranks(folder: Path, *program: str) -> list[Forked]:
    """Start a program in two processes that work together, without a launcher."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    group = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    group |= {"ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": ""}
    ranks = [{"RANK": rank, "LOCAL_RANK": rank} for rank in "01"]
    return [Forked([*program], folder, {**ENVIRONMENT, **group, **rank}) for rank in ranks]


def start_ranks(folder: Path, script: str, *flags: str) -> Result:
    """Run a command in two processes that train together, without a launcher. Return the result of the first one."""
    ranks = begin_ranks(folder, str(ROOT / "pipelines" / f"{script}.py"), *flags)
    first, second = [rank.wait(300) for rank in ranks]
    assert (second.returncode, second.stdout) == (first.returncode, ""), second.stderr
    return first


def python(folder: Path, *arguments: str) -> str:
    """Run this Python in a folder, with the packages of the project, and return what it prints."""
    result = Forked([*arguments], folder, {**ENVIRONMENT, "PYTHONPATH": str(ROOT)}).wait(300)
    assert result.returncode == 0, result.stderr
    return result.stdout


def last_line(result: Result) -> dict[str, Any]:
    """Return the summary of a successful run."""
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


def refused(result: Result) -> str:
    """Return the one error line of a run that ended with a user's mistake."""
    assert result.returncode == 2, (result.returncode, result.stderr)
    assert "Traceback" not in result.stderr
    errors = [line for line in result.stderr.splitlines() if ": error: " in line]
    assert len(errors) == 1, result.stderr
    assert result.stdout == ""
    return errors[0]


def kills(script: str, trials: int, *arguments: str) -> dict[str, Any]:
    """Run a helper that kills processes; return its result. The helper forks, which is unsafe in a process with threads."""
    result = subprocess.run(
        [sys.executable, "-m", f"tests.helpers.{script}", str(trials), *arguments],
        cwd=ROOT,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


SCHEMAS = {
    "train_tokenizer": "TrainTokenizer",
    "fit_tokenizer": "FitTokenizer",
    "evaluate_tokenizer": "EvaluateTokenizer",
    "tokenize": "Tokenize",
    "pretrain_ar": "Pretrain",
    "probe": "Probe",
    "compare": "Compare",
    "report": "Report",
    "export": "Export",
    "extract_features": "ExtractFeatures",
    "finetune": "Finetune",
    "evaluate": "Evaluate",
    "push_to_hub": "PushToHub",
    "search": "Search",
    "benchmark": "Benchmark",
}


class Call:
    """Run a command inside this process: (script, *flags) -> its summary, or its error line if it exits with `code`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self._monkeypatch, self._capsys = monkeypatch, capsys
        self.out = self.err = ""
        """Output of the last command."""

    def __call__(self, script: str, *flags: str, code: int = 2) -> Any:
        for state in (AcceleratorState, GradientState, PartialState):
            state._reset_state()
        self._monkeypatch.setattr(sys, "argv", [f"{script}.py", *flags])
        # One thread: two threads would wait for each other on busy cores.
        self._monkeypatch.setattr("pipelines.engine.device.cores", lambda accelerator: 1)
        module = importlib.import_module(f"pipelines.{script}")
        self._capsys.readouterr()
        interrupt = signal.getsignal(signal.SIGINT)
        try:
            command(getattr(module, SCHEMAS[script]), module.main)
        except SystemExit as stop:
            self.out, self.err = self._capsys.readouterr()
            assert stop.code == code, (stop.code, self.err)
            assert self.out == ""
            lines = [line for line in self.err.splitlines() if ": error: " in line]
            assert len(lines) == 1, self.err
            return lines[0]
        finally:
            # A training run that failed leaves its own signal handler.
            signal.signal(signal.SIGINT, interrupt)
        self.out, self.err = self._capsys.readouterr()
        return json.loads(self.out.splitlines()[-1])
