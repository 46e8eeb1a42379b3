"""An interrupted training run resumes bit for bit. Learning rate and optimizer are pure functions of the settings."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from vector_quantize_pytorch.vector_quantize_pytorch import Codebook

from data.loading import Batch
from data.sources import load_source
from pipelines.engine import checkpoints, training
from pipelines.engine.learning_rate import lr_at
from pipelines.engine.training import make_optimizer
from pipelines.settings.training import Training
from tests.helpers.commands import ENVIRONMENT, ROOT, TINIEST, TINY_MODEL, Call, last_line, start


def validation_losses(run: Path) -> dict[int, str]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: float(line["val_loss"]).hex() for line in lines if "val_loss" in line}


def weights(run: Path) -> str:
    return hashlib.sha256((run / "model" / "model.safetensors").read_bytes()).hexdigest()


@pytest.mark.parametrize("workers", ["0", "2"])
def test_a_killed_run_resumes_bit_for_bit(finished_project: Path, tmp_path: Path, workers: str) -> None:
    flags = [*TINY_MODEL, "--steps", "40", "--save_every", "4", "--validate_every", "20"]
    straight = last_line(start(finished_project, "pretrain_ar", *flags, "--out", str(tmp_path / "straight")))
    flags_of_killed = [*flags, "--workers", workers, "--out", str(tmp_path / "killed")]
    command = [sys.executable, str(ROOT / "pipelines" / "pretrain_ar.py"), *flags_of_killed]
    process = subprocess.Popen(
        command,
        cwd=finished_project,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        env=ENVIRONMENT,
    )
    while not list((tmp_path / "killed" / "checkpoints").glob("step_*")) and process.poll() is None:
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    resumed = start(finished_project, "pretrain_ar", *flags_of_killed)
    answer = last_line(resumed)
    assert "resuming" in resumed.stderr or (tmp_path / "killed" / "summary.json").exists()
    assert answer["loss"] == straight["loss"]
    assert validation_losses(tmp_path / "killed") == validation_losses(tmp_path / "straight")
    assert weights(tmp_path / "killed") == weights(tmp_path / "straight")


def test_ctrl_c_saves_a_checkpoint(finished_project: Path, tmp_path: Path) -> None:
    flags = [*TINY_MODEL, "--steps", "5000", "--save_every", "5000", "--validate_every", "5000", "--out", str(tmp_path)]
    command = [sys.executable, str(ROOT / "pipelines" / "pretrain_ar.py"), *flags]
    process = subprocess.Popen(command, cwd=finished_project, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT)
    while not (tmp_path / "metrics.jsonl").exists() and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "interrupted" in error and "continue" in error
    assert "Traceback" not in error
    (saved,) = (tmp_path / "checkpoints").iterdir()
    assert int(saved.name.removeprefix("step_")) >= 10


def test_accumulation_gives_the_same_weights_as_the_whole_batch(finished_project: Path, tmp_path: Path) -> None:
    whole = last_line(start(finished_project, "pretrain_ar", *TINY_MODEL, "--out", str(tmp_path / "whole")))
    parts = last_line(
        start(finished_project, "pretrain_ar", *TINY_MODEL, "--accumulate", "4", "--out", str(tmp_path / "parts"))
    )
    assert parts["loss"] == pytest.approx(whole["loss"], abs=1e-5)


def test_the_learning_rate_is_a_function_of_the_step() -> None:
    config = Training(steps=100, warmup=10, lr=1.0)
    assert lr_at(0, config) == pytest.approx(0.1)
    assert lr_at(9, config) == pytest.approx(1.0)
    assert lr_at(10, config) == pytest.approx(1.0)
    assert lr_at(55, config) == pytest.approx(0.505)
    assert lr_at(99, config) < 0.02
    assert all(lr_at(step, config) >= lr_at(step + 1, config) for step in range(10, 99))


def _trained(seed: int) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))
    optimizer = make_optimizer(module, Training())
    for _ in range(3):
        module(torch.randn(5, 3)).square().mean().backward()
        optimizer.step()
    return module, optimizer


def _state(optimizer: torch.optim.Optimizer) -> list[Any]:
    return [
        v for group in optimizer.param_groups for p in group["params"] for _, v in sorted(optimizer.state[p].items())
    ]


def test_a_checkpoint_restores_weights_and_moments(tmp_path: Path) -> None:
    module, optimizer = _trained(0)
    checkpoints.save(tmp_path, module, optimizer, {"step": 3, "seconds": 1.5}, extra_modules={}, keep=2)
    other, other_optimizer = _trained(1)
    assert checkpoints.load(tmp_path, other, other_optimizer, extra_modules={}) == {"step": 3, "seconds": 1.5}
    assert all(torch.equal(a, b) for a, b in zip(module.parameters(), other.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(_state(optimizer), _state(other_optimizer), strict=True))


def test_the_newest_checkpoints_are_kept_and_a_broken_one_is_skipped(tmp_path: Path) -> None:
    module, optimizer = _trained(0)
    for step in (1, 2, 3):
        checkpoints.save(tmp_path, module, optimizer, {"step": step, "seconds": 0.0}, extra_modules={}, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_000002", "step_000003"]
    broken = tmp_path / "step_000003" / "model.safetensors"
    broken.write_bytes(broken.read_bytes()[:50])
    assert checkpoints.load(tmp_path, module, optimizer, extra_modules={}) == {"step": 2, "seconds": 0.0}
    (tmp_path / "step_000002" / "state.json").write_text("{")
    with pytest.raises(ValueError, match="none of its 2 checkpoints can be read"):
        checkpoints.load(tmp_path, module, optimizer, extra_modules={})


def test_the_next_start_deletes_checkpoints_that_a_killed_save_left(finished_project: Path, tmp_path: Path) -> None:
    """The process was killed in its last save, after the rename. Nothing is left to save, but old checkpoints must be deleted."""
    flags = [*TINY_MODEL, "--out", str(tmp_path)]
    last_line(start(finished_project, "pretrain_ar", *flags))
    folder = tmp_path / "checkpoints"
    shutil.copytree(folder / "step_000004", folder / "step_000002")
    shutil.copytree(folder / "step_000004", folder / ".step_000006.tmp")
    (tmp_path / "summary.json").unlink()
    last_line(start(finished_project, "pretrain_ar", *flags))
    assert sorted(path.name for path in folder.iterdir()) == ["step_000004", "step_000006"]


def test_an_unfinished_checkpoint_is_ignored(tmp_path: Path) -> None:
    (tmp_path / ".step_000009.tmp").mkdir(parents=True)
    module, optimizer = _trained(0)
    assert checkpoints.load(tmp_path, module, optimizer, extra_modules={}) is None


# --- tokenizers


class Stopped(BaseException):
    """Raised in place of killing the process."""


def train_tokenizer(call: Call, folder: Path, flags: list[str], stop: int | None = None) -> dict[int, list[int]]:
    """Train in this process, up to step `stop` if it is given; return the rows of every step."""
    rows: dict[int, list[int]] = {}
    step_of = training._step

    def watched_step(*arguments: Any) -> Any:
        *others, watch, step, networks, guard = arguments
        if step == stop:
            raise Stopped
        rows[step] = []

        def record_rows(batch: Batch) -> None:
            rows[step].extend(batch["row_B"].tolist())
            watch(batch)

        return step_of(*others, record_rows, step, networks, guard)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "_step", watched_step)
        patch.setattr(training, "_LOG_EVERY", 1)
        try:
            call("train_tokenizer", *TINIEST, *flags, "--out", str(folder))
        except Stopped:
            assert stop is not None
    return rows


def logged(run: Path) -> list[dict[str, str]]:
    """Return all logged numbers of a run, to the last bit."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: float(value).hex() for key, value in line.items() if key != "seconds"} for line in lines]


def tensor_hashes(run: Path) -> dict[str, str]:
    """Return the hashes of all saved weights and moments of a run."""
    files = sorted(run.rglob("*.safetensors"))
    return {str(file.relative_to(run)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def test_damaged_videos_read_before_a_stop_are_recorded(call: Call, video_folder: Path, tmp_path: Path) -> None:
    """The run resumes from step 3, and no validation has recorded the videos of the steps before."""
    videos = tmp_path / "videos"
    for split in ("train", "val"):
        shutil.copytree(video_folder, videos / split)
    for number in range(4):
        (videos / "train" / "left" / f"damaged {number}.mp4").write_text("no video")
    flags = ["--videos", str(videos), "--validate_every", "100"]
    rows = train_tokenizer(call, tmp_path / "run", flags, stop=3)
    paths = [video.path for video in load_source(str(videos)).videos]
    read = {paths[row] for step in rows for row in rows[step] if "damaged" in paths[row]}
    assert read and read <= json.loads((tmp_path / "run" / "skipped.json").read_text()).keys()


EMAVQ = ["--model.name", "vq3d-2x8x8-emavq32", "--model.options", "{decay: 0.3}"]
"""A quantizer whose short moving average makes codes die soon."""
ADVERSARIAL = ["--average", "0", "--loss.discriminator"]
TOKENIZERS = {
    "fsq": ["--average", "0"],
    "emavq": ["--average", "0", *EMAVQ],
    "averaged": ["--average", "0.9"],
    "averaged emavq": ["--average", "0.9", *EMAVQ],
    "simvq in bf16": [
        *("--average", "0", "--model.name", "vq3d-2x8x8-simvq64", "--precision", "bf16", "--clip.frames", "8"),
    ],
    "causal": ["--model.name", "vq3d-causal-2x8x8-fsq240", "--clip.frames", "5", "--model.stem", "haar"],
    "3d from the start": [*ADVERSARIAL, "3d", "--loss.adversarial_start", "0"],
    "3d, stopped before its start": [*ADVERSARIAL, "3d", "--loss.adversarial_start", "5"],
    "patch from the start": [*ADVERSARIAL, "patch", "--loss.adversarial_start", "0"],
    "patch, stopped before its start": [*ADVERSARIAL, "patch", "--loss.adversarial_start", "5"],
}


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_a_stopped_tokenizer_run_resumes_bit_for_bit(
    call: Call, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run stops after step 5, so the step after the checkpoint of step 4, which was saved for a validation, is repeated."""
    if "patch" in kind:
        pytest.importorskip("taming")
    revived: list[int] = []
    replace = Codebook.replace

    def counted_replace(*arguments: Any, **settings: Any) -> None:
        revived.append(1)
        replace(*arguments, **settings)

    monkeypatch.setattr(Codebook, "replace", counted_replace)
    flags = [*TOKENIZERS[kind], "--validate_every", "2"]
    straight = train_tokenizer(call, tmp_path / "straight", flags)
    assert len(revived) > 3 or "emavq" not in kind, "codes must be revived before the stop and after it"
    train_tokenizer(call, tmp_path / "stopped", flags, stop=5)
    assert {path.name for path in (tmp_path / "stopped" / "checkpoints").iterdir()} == {"step_000003", "step_000004"}
    again = train_tokenizer(call, tmp_path / "stopped", flags)
    assert again == {step: straight[step] for step in (4, 5)}
    lines, files = logged(tmp_path / "straight"), tensor_hashes(tmp_path / "straight")
    assert len(lines) == 6 + 3
    active = [line["adversarial_weight"] != "0x0.0p+0" for line in lines if "adversarial_weight" in line]
    if "before its start" in kind:
        assert active == [False] * 5 + [True]
    elif "from the start" in kind:
        assert active == [True] * 6
    else:
        assert active == []
    assert ("checkpoints/step_000006/average.safetensors" in files) == (flags[1] != "0")
    assert logged(tmp_path / "stopped") == lines
    assert tensor_hashes(tmp_path / "stopped") == files


def test_a_killed_tokenizer_run_resumes_bit_for_bit(tmp_path: Path) -> None:
    """Like the test above, but the process is killed."""
    flags = [*TINIEST, *TOKENIZERS["averaged emavq"], "--steps", "60", "--validate_every", "20"]
    last_line(start(tmp_path, "train_tokenizer", *flags, "--out", "straight"))
    command = [sys.executable, str(ROOT / "pipelines" / "train_tokenizer.py"), *flags, "--out", "killed"]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(command, cwd=tmp_path, start_new_session=True, env=ENVIRONMENT, **quiet)
    while not list((tmp_path / "killed" / "checkpoints").glob("step_*")) and process.poll() is None:
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "killed" / "summary.json").exists()
    resumed = start(tmp_path, "train_tokenizer", *flags, "--out", "killed")
    assert "resuming" in resumed.stderr
    last_line(resumed)
    assert logged(tmp_path / "killed") == logged(tmp_path / "straight")
    assert tensor_hashes(tmp_path / "killed") == tensor_hashes(tmp_path / "straight")


def test_a_resumed_run_keeps_its_number_of_threads(call: Call, tmp_path: Path) -> None:
    """On another number of cores, other threads would change the last bits."""
    flags = [*TINIEST, "--out", str(tmp_path / "run")]
    call("train_tokenizer", *flags)
    (tmp_path / "run" / "summary.json").unlink()
    choices = tmp_path / "run" / "choices.json"
    recorded = json.loads(choices.read_text())
    name = "threads of 1 processes"
    assert recorded[name] == "1"
    before = torch.get_num_threads()
    for wrong in ("0", "many", 10**9):
        choices.write_text(json.dumps({**recorded, name: wrong}))
        assert str(choices) in call("train_tokenizer", *flags)
    choices.write_text(json.dumps({**recorded, name: "2"}))
    call("train_tokenizer", *flags)
    assert torch.get_num_threads() == 2 and "2 threads" in call.err
    torch.set_num_threads(before)


@pytest.mark.soak
@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_a_hundred_steps_are_the_same_for_any_stop_and_number_of_workers(call: Call, tmp_path: Path) -> None:
    """The runs stop at the first, a middle and the last step and between two epochs, and have 0, 2 or 4 workers."""
    flags = [*TOKENIZERS["averaged emavq"], "--videos", "builtin:moving-digits:10:2", "--steps", "100"]
    straight = train_tokenizer(call, tmp_path / "straight", flags)
    assert len(straight) == 100
    for workers in ("0", "2", "4"):
        for stop in (1, 37, 50, 99):
            out, more = tmp_path / f"{workers}-{stop}", [*flags, "--workers", workers]
            rows = train_tokenizer(call, out, more, stop=stop) | train_tokenizer(call, out, more)
            assert rows == straight
            assert logged(out) == logged(tmp_path / "straight")
            assert tensor_hashes(out) == tensor_hashes(tmp_path / "straight")
