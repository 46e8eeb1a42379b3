"""A non-finite value stops training before the update, with one line that names the samples. The checkpoint is kept."""

import os
import socket
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState

from pipelines.engine import non_finite
from pipelines.engine.launch import command
from pipelines.settings.training import Training
from tests.helpers.commands import TINIEST, Call, last_line, start
from tests.helpers.forked import ENVIRONMENT, ROOT, Forked
from tests.helpers.non_finite_training import POISONED, SAVED, STEPS, Toy, learn

FLAGS = [
    *("--steps", str(STEPS), "--save_every", "2", "--validate_every", "4", "--batch_size", "2", "--warmup", "0"),
    *("--precision", "fp32"),
]
VALUES = ["nan", "inf", "-inf"]


@pytest.fixture
def train(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Any:
    """Function (toy, *flags) -> exit code and stderr of a training run."""

    def run(toy: Toy, *flags: str) -> tuple[int, str]:
        for state in (AcceleratorState, GradientState, PartialState):
            state._reset_state()
        monkeypatch.setattr(sys, "argv", ["toy.py", *FLAGS, "--out", str(tmp_path / "run"), *flags])
        monkeypatch.setattr("pipelines.engine.device.cores", lambda accelerator: 1)
        capsys.readouterr()
        try:
            command(Training, lambda config, settings: learn(toy, config, settings).losses)
        except SystemExit as stop:
            return int(str(stop.code)), capsys.readouterr().err
        return 0, capsys.readouterr().err

    return run


@pytest.mark.parametrize("delayed", [False, True], ids=["read at once", "read one step later, as on a GPU"])
@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize("poison", ["loss", "gradient", "input"])
def test_a_non_finite_value_stops_the_training_without_an_update(
    train: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, poison: str, value: str, delayed: bool
) -> None:
    monkeypatch.setattr(non_finite, "DELAYED_ON", {"cpu"} if delayed else set())
    toy = Toy(poison, float(value))
    code, errors = train(toy)
    assert code == 1
    assert "Traceback" not in errors
    (line,) = [line for line in errors.splitlines() if ": error: " in line]
    assert line.startswith(f"toy: error: step {POISONED + 1}: the gradient is not finite (loss ")
    assert line.endswith(f": {10 * POISONED}, {10 * POISONED + 1}, {10 * POISONED + 2}"), "the rows of the samples"
    assert len(toy.snapshot) > 12 and toy.state() == toy.snapshot, "weights, moments and files are as before the step"
    checkpoints = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert checkpoints == [f"step_{SAVED - 2:06d}", f"step_{SAVED:06d}"]
    assert not (tmp_path / "run" / "summary.json").exists()


def test_a_run_stopped_by_a_non_finite_value_resumes_from_its_checkpoint(train: Any, tmp_path: Path) -> None:
    whole = Toy("none", 0.0)
    assert train(whole, "--out", str(tmp_path / "whole"))[0] == 0
    assert train(Toy("loss", float("nan")))[0] == 1
    again = Toy("none", 0.0)
    code, errors = train(again)
    assert code == 0
    assert f"from step {SAVED}" in errors
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), again.parameters(), strict=True))


@pytest.mark.parametrize("poison", ["loss", "gradient", "input"])
def test_one_poisoned_part_of_an_accumulated_step_is_enough(train: Any, poison: str) -> None:
    class Once(Toy):
        def forward(self, batch: dict[str, Any]) -> dict[str, torch.Tensor]:
            if self.snapshot:
                # The second part of the step is finite.
                self.poison = "none"
            return super().forward(batch)

    toy = Once(poison, float("inf"))
    code, errors = train(toy, "--accumulate", "2")
    assert code == 1
    parts = [10 * part + i for part in (2 * POISONED, 2 * POISONED + 1) for i in range(3)]
    assert f": {', '.join(map(str, parts))}" in errors, "the rows of both parts"
    assert toy.state() == toy.snapshot


# --- a real tokenizer: its uint8 input is finite, but its weights may become huge


HUGE = [*TINIEST, "--lr", "1e38", "--warmup", "0", "--save_every", "1", "--out", "run", "--model.name"]


def test_huge_weights_end_with_one_line(tmp_path: Path) -> None:
    result = start(tmp_path, "train_tokenizer", *HUGE, "vq3d-2x8x8-fsq1000")
    assert result.returncode == 1, result.stderr
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    (line,) = [line for line in result.stderr.splitlines() if ": error: " in line]
    assert "not finite" in line and "samples of the step" in line


@pytest.mark.parametrize("quantizer", ["emavq32", "lfq64", "simvq64"])
def test_huge_weights_end_with_one_line_for_every_quantizer(
    call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quantizer: str
) -> None:
    monkeypatch.chdir(tmp_path)
    line = call("train_tokenizer", *HUGE, f"vq3d-2x8x8-{quantizer}", code=1)
    assert "not finite" in line and "samples of the step" in line


# --- two processes


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Results of both ranks of tests.helpers.non_finite_training."""
    folder = tmp_path_factory.mktemp("ranks") / "run"
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    both = {**ENVIRONMENT, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    both |= {"ACCELERATE_USE_CPU": "true"}
    program = ["-m", "tests.helpers.non_finite_training", str(folder)]
    processes = [Forked(program, ROOT, {**both, "RANK": rank, "LOCAL_RANK": rank}) for rank in ("0", "1")]
    answers = [last_line(process.wait(120)) for process in processes]
    assert sorted(os.listdir(folder / "checkpoints")) == [f"step_{SAVED - 2:06d}", f"step_{SAVED:06d}"]
    return answers


def test_a_non_finite_loss_of_one_rank_stops_all_ranks(ranks: list[dict[str, Any]]) -> None:
    for answer in ranks:
        assert answer["stopped"].startswith(f"step {POISONED + 1}: the gradient is not finite")
        assert not answer["learned"]


def test_ranks_with_different_tokenizers_are_stopped(ranks: list[dict[str, Any]]) -> None:
    assert ranks[0]["equal"] == ranks[1]["equal"] > 0
    assert all(answer["unequal"].startswith("step 8: ") and "differ" in answer["unequal"] for answer in ranks)
