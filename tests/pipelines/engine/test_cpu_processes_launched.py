"""Training is the same with one or several processes, DDP or FSDP, whole or accumulated batches, and configs/accelerate."""

import json
import math
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from safetensors.torch import load_file

from ar_model.inputs import CodeSpec
from ar_model.objectives import ARVideo
from data.sources import Video
from pipelines.engine import training
from pipelines.engine.sharding import name_layers
from tests.helpers.caches import MakeCache
from tests.helpers.commands import ENVIRONMENT, ROOT, Call, Result, last_line
from tests.helpers.non_finite_rank import POISONED

CONFIGS = ROOT / "pipelines" / "configs" / "accelerate"
STEPS, SAVED = 20, 5
FLAGS = [
    *("--steps", str(STEPS), "--batch_size", "4", "--warmup", "1", "--precision", "fp32", "--attention", "plain"),
    # The gradient norms are above 0.1, so gradients are clipped.
    *("--validate_every", "5", "--save_every", str(SAVED), "--clip_gradient", "0.1"),
    *("--objective.width", "24", "--objective.depth", "2", "--objective.heads", "2"),
    *("--objective.decoder_width", "24", "--objective.decoder_depth", "1", "--objective.decoder_heads", "2"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, make_cache: MakeCache) -> Path:
    """Folder with a cache of codes and a codebook, which is a buffer of the model.

    65 clips are held out. Two processes validate on 33 and 32 of them, so that the first process has one batch more.
    """
    folder = tmp_path_factory.mktemp("scale")
    splits = ["train"] * 24 + ["val"] * 65
    videos = [Video(f"{i:03d}.mp4", i, label="a", split=split) for i, split in enumerate(splits)]
    book_VC = np.random.default_rng(0).standard_normal((64, 5), np.float32)
    make_cache(folder / "caches", videos, codes_shape=(4, 4, 4), codebook_VC=book_VC, shard_size=50)
    return folder


def launch(config: str, *flags: str) -> list[str]:
    """Return the command of `accelerate launch` with a file of configs/accelerate, for GPUs unless "--cpu" is a flag."""
    return [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(CONFIGS / config), *flags]


def two(config: str, *flags: str) -> list[str]:
    """Return the command of `launch` for two processes."""
    return launch(config, "--num_processes", "2", "--main_process_port", free_port(), *flags)


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


ON_CPU = {**ENVIRONMENT, "ACCELERATE_USE_CPU": "true"}
"""Environment that keeps processes on the CPU although accelerate starts them for GPUs."""


def begin(folder: Path, launcher: list[str], out: Path, *flags: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*launcher, str(ROOT / "pipelines" / "pretrain_ar.py"), *FLAGS, *flags, "--out", str(out)],
        cwd=folder,
        env=ON_CPU,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def end(process: subprocess.Popen[str]) -> Result:
    out, errors = process.communicate(timeout=120)
    return Result(process.args, process.returncode, out, errors)


def train(folder: Path, launcher: list[str], out: Path, *flags: str) -> Result:
    return end(begin(folder, launcher, out, *flags))


@pytest.fixture(scope="module")
def one(folder: Path) -> Path:
    """Run of one process, with which all other runs are compared."""
    out = folder / "one"
    last_line(train(folder, launch("one_gpu.yaml", "--cpu"), out))
    assert distribution(out) == (1, "NO")
    return out


def distribution(run: Path) -> tuple[int, str]:
    """Return the number of processes of a run and accelerate's name for their type."""
    environment = json.loads((run / "environment.json").read_text())
    return environment["processes"], environment["distributed"]


def curve(run: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


def assert_same(run: Path, other: Path) -> None:
    """Compare every logged number, and every tensor of both checkpoints and of the final model, up to rounding in fp32."""
    ours, theirs = curve(run), curve(other)
    assert [line["step"] for line in ours] == [5, 10, 10, 15, 20, 20]
    for a, b in zip(ours, theirs, strict=True):
        # Validation losses are rounded to 5 digits.
        assert a == pytest.approx(b, rel=1e-6, abs=1.1e-5 if "val_loss" in a else 0)
    files = sorted(path.relative_to(other) for path in other.rglob("*.safetensors"))
    assert len(files) == 5
    for file in files:
        a, b = load_file(run / file), load_file(other / file)
        assert a.keys() == b.keys()
        for name in a:
            torch.testing.assert_close(a[name], b[name], rtol=1e-5, atol=2e-6, msg=lambda m, name=name: f"{name}: {m}")


def cut_back(run: Path, copy: Path) -> Path:
    """Copy a finished run as if it had been killed after the last checkpoint but one."""
    shutil.copytree(run, copy)
    shutil.rmtree(copy / "model")
    shutil.rmtree(copy / "checkpoints" / f"step_{STEPS:06d}")
    (copy / "summary.json").unlink()
    return copy


@pytest.mark.parametrize("path", sorted(CONFIGS.iterdir()), ids=lambda path: path.name)
def test_accelerate_reads_the_configuration(path: Path) -> None:
    config = load_config_from_file(str(path))
    assert config.distributed_type == {"one_gpu": "NO", "fsdp": "FSDP"}.get(path.stem, "MULTI_GPU")
    assert config.num_machines == (2 if path.stem == "several_nodes" else 1)
    assert (config.num_processes == 1) == (path.stem == "one_gpu")


def test_fsdp_gathers_one_block_at_a_time() -> None:
    objective = ARVideo(CodeSpec(shape=(4, 4, 4), vocab_size=8), width=12, heads=1, decoder_width=12, decoder_heads=1)
    name_layers(objective)
    assert objective._no_split_modules == ["Block", "CrossBlock"]


def test_two_processes_train_like_one(folder: Path, one: Path, tmp_path: Path) -> None:
    last_line(train(folder, two("several_gpus.yaml"), tmp_path / "run"))
    assert distribution(tmp_path / "run") == (2, "MULTI_CPU")
    assert_same(tmp_path / "run", one)


def test_an_fsdp_run_that_was_killed_and_started_again_equals_one_process(
    folder: Path, one: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    process = begin(folder, two("fsdp.yaml"), run)
    while not list(run.glob("checkpoints/step_*")) and process.poll() is None:
        time.sleep(0.01)
    launcher = psutil.Process(process.pid)
    for member in (launcher, *launcher.children(recursive=True)):
        member.kill()
    process.communicate()
    assert not (run / "summary.json").exists()
    again = train(folder, two("fsdp.yaml"), run)
    last_line(again)
    assert "resuming" in again.stderr
    assert distribution(run) == (2, "FSDP")
    assert_same(run, one)


def on_two_nodes(folder: Path, launcher: list[str], out: Path) -> Result:
    """Run two nodes on this machine; return the result of the first node."""
    nodes = [begin(folder, [*launcher, "--main_process_ip", "127.0.0.1", "--machine_rank", rank], out) for rank in "01"]
    first, second = [end(node) for node in nodes]
    assert (second.returncode, second.stdout) == (0, ""), second.stderr
    return first


def test_two_nodes_train_like_one_process(folder: Path, one: Path, tmp_path: Path) -> None:
    last_line(on_two_nodes(folder, two("several_nodes.yaml"), tmp_path / "run"))
    assert distribution(tmp_path / "run") == (2, "MULTI_CPU")
    assert_same(tmp_path / "run", one)


def test_two_fsdp_nodes_resume_a_run_of_one_process(folder: Path, one: Path, tmp_path: Path) -> None:
    run = cut_back(one, tmp_path / "run")
    first = on_two_nodes(folder, two("fsdp.yaml", "--cpu", "--num_machines", "2"), run)
    last_line(first)
    assert "from step 15" in first.stderr
    assert distribution(run) == (2, "FSDP")
    assert_same(run, one)


def test_one_process_resumes_an_fsdp_run(
    call: Call, folder: Path, one: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The FSDP run ends because one of its processes gets a NaN loss."""
    run = tmp_path / "run"
    flags = [*FLAGS, "--cache", str(next((folder / "caches").iterdir())), "--out", str(run)]
    launcher = [*two("fsdp.yaml", "--module"), "tests.helpers.non_finite_rank", *flags]
    stopped = subprocess.run(launcher, cwd=ROOT, env=ON_CPU, capture_output=True, text=True, timeout=120)
    (line,) = [line for line in stopped.stderr.splitlines() if ": error: " in line]
    assert f"step {POISONED + 1}: the gradient is not finite (loss " in line
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["step_000005", "step_000010"]

    monkeypatch.chdir(folder)
    call("pretrain_ar", *flags)
    assert "from step 10" in call.err
    assert_same(run, one)


def test_nodes_that_do_not_share_the_run_folder_are_an_error(
    call: Call, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setattr("accelerate.Accelerator.gather", lambda self, start: torch.cat([start, start + 250]))
    line = call("pretrain_ar", *FLAGS, "--out", str(tmp_path / "run"))
    assert "the ranks found different checkpoints, of steps [0, 250]; all nodes must share this folder" in line


def test_a_batch_that_the_processes_do_not_divide_is_refused(folder: Path, tmp_path: Path) -> None:
    result = train(folder, two("several_gpus.yaml"), tmp_path / "run", "--batch_size", "5")
    (line,) = [line for line in result.stderr.splitlines() if ": error: " in line]
    assert line.startswith("pretrain_ar: error: batch_size")
    assert "processes (2), got 5" in line
    assert "exitcode  : 2 " in result.stderr  # reported by the launcher, whose own exit code is 1


def test_a_tokenizer_is_not_trained_with_fsdp(call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("accelerate.Accelerator.is_fsdp2", True)
    line = call("train_tokenizer", "--videos", "builtin:moving-digits:8:2", "--out", str(tmp_path / "run"))
    assert line.startswith("train_tokenizer: error: ") and "FSDP" in line


def test_accumulation_gives_the_losses_of_the_whole_batch(
    call: Call, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "_LOG_EVERY", 1)
    monkeypatch.chdir(folder)
    for accumulate in ("1", "4"):
        call(
            "pretrain_ar", *FLAGS, "--batch_size", "8", "--accumulate", accumulate, "--out", str(tmp_path / accumulate)
        )
    whole, parts = ([line["loss"] for line in curve(tmp_path / a) if "loss" in line] for a in "14")
    assert len(whole) == STEPS
    assert all(math.isclose(a, b, rel_tol=1e-6) for a, b in zip(whole, parts, strict=True))
