"""Every objective trains reproducibly, resumes bit for bit, splits its batch among processes, and saves snapshots."""

import hashlib
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from ar_model.objectives import load_objective
from data.cache import TokenCache
from data.loading import evaluation_batches
from tests.helpers.cache_contents import equal_cuts
from tests.helpers.caches import MakeCache
from tests.helpers.commands import Call, last_line, start, start_ranks
from tests.pipelines.engine.test_cpu_processes import processes

SIZE = ["--objective.width", "12", "--objective.depth", "2", "--objective.heads", "1"]
OBJECTIVES = {
    "VideoMAE": ["--objective.ratio", "0.5", "--objective.decoder_width", "12", "--objective.decoder_heads", "1"],
    "VIMPAC": ["--objective.head_width", "8"],
    "MAM2": ["--objective.ratio", "0.5", "--objective.align", "1"],
}


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory, make_cache: MakeCache) -> Path:
    return make_cache(tmp_path_factory.mktemp("objectives"), videos=24, codes_shape=(2, 4, 4), keep_pixels="raw")


def flags(name: str, cache: Path, out: Path) -> list[str]:
    lengths = ["--steps", "8", "--batch_size", "8", "--warmup", "1", "--save_every", "3", "--validate_every", "4"]
    return [
        *("--objective", name, *SIZE, *OBJECTIVES[name], *lengths, "--precision", "fp32", "--attention", "plain"),
        *("--cache", str(cache), "--out", str(out)),
    ]


def weights(run: Path) -> str:
    return hashlib.sha256((run / "model" / "model.safetensors").read_bytes()).hexdigest()


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_resumed_run_ends_like_one_that_was_never_stopped(name: str, cache: Path, tmp_path: Path, call: Call) -> None:
    """Resume from step 6 of 8, without the files that were written later. Also repeat the run from the start."""
    summaries = [call("pretrain_ar", *flags(name, cache, tmp_path / run)) for run in ("straight", "again")]
    assert weights(tmp_path / "straight") == weights(tmp_path / "again")
    stopped = shutil.copytree(tmp_path / "straight", tmp_path / "stopped")
    (stopped / "summary.json").unlink()
    shutil.rmtree(stopped / "checkpoints" / "step_000008")
    shutil.rmtree(stopped / "model")
    summaries.append(call("pretrain_ar", *flags(name, cache, stopped)))
    assert "from step 6" in call.err
    assert weights(stopped) == weights(tmp_path / "straight")
    assert len({(summary["loss"], summary["bits_per_code"]) for summary in summaries}) == 1


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_non_finite_gradient_stops_training(name: str, cache: Path, tmp_path: Path) -> None:
    """A huge learning rate makes the weights useless in the first step. The second step ends in one line and keeps all files."""
    huge_rate = ["--lr", "1e38", "--warmup", "0", "--save_every", "1"]
    result = start(tmp_path, "pretrain_ar", *flags(name, cache, tmp_path / "run"), *huge_rate)
    assert result.returncode == 1 and "Traceback" not in result.stderr
    (line,) = [line for line in result.stderr.splitlines() if ": error: " in line]
    assert "step 2: the gradient is not finite" in line
    assert (tmp_path / "run" / "checkpoints" / "step_000001").exists()
    assert not (tmp_path / "run" / "summary.json").exists()


@pytest.mark.parametrize("name", OBJECTIVES)
def test_two_processes_train_the_same_model(name: str, cache: Path, tmp_path: Path, call: Call) -> None:
    one = call("pretrain_ar", *flags(name, cache, tmp_path / "one"))
    two = last_line(start_ranks(tmp_path, "pretrain_ar", *flags(name, cache, tmp_path / "two")))
    assert processes(tmp_path / "two") == 2
    assert two["loss"] == pytest.approx(one["loss"], rel=1e-5)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_snapshots_are_models_from_before_the_end(name: str, cache: Path, tmp_path: Path, call: Call) -> None:
    call("pretrain_ar", *flags(name, cache, tmp_path / "with"), "--snapshots")
    call("pretrain_ar", *flags(name, cache, tmp_path / "without"))
    assert weights(tmp_path / "with") == weights(tmp_path / "without")
    (snapshot,) = (tmp_path / "with" / "snapshots").iterdir()
    assert snapshot.name == "step_000004"
    batch = next(iter(evaluation_batches(TokenCache.open(str(cache)), [0, 1], 2, pixels=True)))
    before, after = (load_objective(folder).features(batch)[-1] for folder in (snapshot, tmp_path / "with" / "model"))
    assert before.shape == after.shape == (2, 33 if name == "VIMPAC" else 32, 12)
    assert not torch.allclose(before, after)


def test_a_setting_of_another_objective_is_refused_in_one_line(cache: Path, tmp_path: Path, call: Call) -> None:
    wrong: list[Any] = ["--objective", "VIMPAC", "--objective.keep", "0.5", "--cache", str(cache)]
    assert "keep" in call("pretrain_ar", *wrong, "--out", str(tmp_path))


def test_contrast_between_equal_views_is_said_once(
    cache: Path, tmp_path: Path, call: Call, make_cache: MakeCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the second cache, both views of a video are the same cut."""
    monkeypatch.setattr("tests.helpers.cache_contents.some_cuts", equal_cuts)
    equal = make_cache(tmp_path, videos=24, codes_shape=(2, 4, 4))
    for run, (chosen, contrast, warned) in enumerate([(equal, "1", 1), (equal, "0", 0), (cache, "1", 0)]):
        settings = flags("VIMPAC", chosen, tmp_path / str(run))
        call("pretrain_ar", *settings, "--objective.contrast", contrast, "--steps", "1")
        lines = [line for line in call.err.splitlines() if "equal views" in line]
        assert len(lines) == warned
        if warned:
            assert re.search(r"\b(\d+) of \1 videos", lines[0]) and "--clip.scales" in lines[0]
