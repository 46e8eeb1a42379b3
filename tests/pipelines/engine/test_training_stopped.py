"""A signal during a validation or a step that outlasts the patience loses nothing: the next start continues bit for bit."""

import json
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.commands import TINY_MODEL, last_line, start
from tests.helpers.forked import ENVIRONMENT, Forked

SLOW = """
import sys, time
from pathlib import Path
from ar_model.objectives import ARVideo
from pipelines.commands import pretrain_ar
from pipelines.engine import signals
from pipelines.engine.launch import command
from pipelines.settings.pretrain_ar import Pretrain

slow, sign, seconds = sys.argv[1], Path(sys.argv[2]), float(sys.argv[3])
sys.argv[:4] = ["pretrain_ar.py"]
signals.PATIENCE = 0.5
forward = ARVideo.forward


def slow_validation(*_):
    sign.touch()
    time.sleep(seconds)


def slow_step(objective, batch):
    if batch.get("step") == 3:
        sign.touch()
        time.sleep(seconds)
    return forward(objective, batch)


if slow == "validation":
    pretrain_ar.validate = slow_validation
else:
    ARVideo.forward = slow_step
command(Pretrain, pretrain_ar.main)
"""
FLAGS = [*TINY_MODEL, "--save_every", "6"]


def numbers(run: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


@pytest.mark.parametrize("slow, seconds, step", [("validation", 60, 3), ("step", 2, 4)])
def test_a_signal_during_a_long_validation_or_step(
    slow: str, seconds: int, step: int, finished_project: Path, tmp_path: Path
) -> None:
    straight, run, sign = (tmp_path / name for name in ("straight", "run", "sign"))
    last_line(start(finished_project, "pretrain_ar", *FLAGS, "--out", str(straight)))
    program = ["-c", SLOW, slow, str(sign), str(seconds), *FLAGS, "--out", str(run)]
    process = Forked(program, finished_project, ENVIRONMENT)
    while not sign.exists():
        assert process.alive
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    result = process.wait(20)
    assert result.returncode == 143, result.stderr
    assert max(path.name for path in (run / "checkpoints").iterdir()) == f"step_{step:06d}"
    assert "resuming" in start(finished_project, "pretrain_ar", *FLAGS, "--out", str(run)).stderr
    assert numbers(run) == numbers(straight)
    model = Path("model", "model.safetensors")
    assert (run / model).read_bytes() == (straight / model).read_bytes()
