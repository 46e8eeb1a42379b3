"""`pretrain_ar --plan` says what a run will cost, and does nothing of it."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from torch.utils.flop_counter import FlopCounterMode

from ar_model.objectives import ARVideo
from data.cache import TokenCache
from pipelines.engine.code_spec import code_spec
from pipelines.engine.device import matrix_peak
from pipelines.engine.plan import Model, Validation, plan
from pipelines.engine.run import Run
from pipelines.settings.pretrain_ar import Pretrain
from tests.helpers.caches import MakeCache
from tests.helpers.commands import ROOT, Call

SMALL = [
    "--objective.clusters",
    "[1,2,2]",
    "--objective.width",
    "24",
    "--objective.depth",
    "1",
    "--objective.heads",
    "2",
]
SMALL += ["--objective.decoder_width", "24", "--objective.decoder_depth", "1", "--objective.decoder_heads", "2"]
SMALL += ["--precision", "fp32", "--attention", "plain", "--batch_size", "4"]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make_cache: MakeCache) -> Path:
    """A folder with a cache of 20 videos, 2 of them held out, of 2 x 4 x 4 codes; the fastest product makes 10 MFLOP a second."""
    make_cache(tmp_path / "caches", 20, codes_shape=(2, 4, 4))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("pipelines.engine.plan.matrix_peak", lambda device, dtype: 1e7)
    return tmp_path


def written(folder: Path) -> set[Path]:
    return set(folder.rglob("*"))


def test_it_says_what_a_run_costs_and_writes_nothing(call: Call, here: Path) -> None:
    before = written(here)
    told = call("pretrain_ar", "--plan", *SMALL, "--steps", "9", "--validate_every", "3")
    assert written(here) == before
    cache = TokenCache.open(next((here / "caches").iterdir()))
    sizes = {"width": 24, "depth": 1, "heads": 2, "decoder_width": 24, "decoder_depth": 1, "decoder_heads": 2}
    objective = ARVideo(code_spec(cache), clusters=(1, 2, 2), **sizes)  # type: ignore[arg-type]
    counts = {"total": sum(p.numel() for p in objective.parameters())}
    counts |= {name: sum(p.numel() for p in getattr(objective, name).parameters()) for name in ("encoder", "decoder")}
    assert told["parameters"] == {**counts, "rest": counts["total"] - counts["encoder"] - counts["decoder"]}
    assert told["tokens"] == {"seen": 7, "predicted": 7}  # a quarter of 4, of 7 of the 8 clusters
    assert told["videos"] == {"train": 18, "held_out": 2}
    assert (told["steps"], told["epochs"], told["validations"]) == (9, 2.0, 3)
    assert told["cache_bytes"] == sum(path.stat().st_size for path in (here / "caches").rglob("*.tar"))
    assert told["memory"]["weights"] >= 4 * counts["total"] == told["memory"]["gradients"]
    assert told["memory"]["optimizer"] == pytest.approx(8 * counts["total"], rel=0.01)
    assert told["memory"]["buckets"] == 0
    assert told["seconds"] == pytest.approx(told["flop"] / 5e6, abs=0.05), "at half of the fastest product"
    lines = call.out.splitlines()[:-1]
    for start in (
        "parameters",
        "  encoder",
        "tokens seen",
        "tokens predicted",
        "arithmetic of a step",
        "memory of a step",
    ):
        assert [line.startswith(start) for line in lines].count(True) == 1, call.out
    for start in ("passes over the data", "cache", "fastest product", "time of the run"):
        assert [line.startswith(start) for line in lines].count(True) == 1, call.out


def test_the_run_itself_counts_as_much(call: Call, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All matrix products of a real run, of its steps and of its two validations."""
    monkeypatch.setattr(
        "pipelines.commands.pretrain_ar._attention", lambda *_: "plain"
    )  # the trial of kernels counts too
    flags = [*SMALL, "--accumulate", "4", "--recompute", "--steps", "3", "--validate_every", "2"]
    with FlopCounterMode(display=False) as counter:
        call("pretrain_ar", *flags)
    told = call("pretrain_ar", "--plan", *flags)
    assert told["flop"] == counter.get_total_flops()
    assert told["validations"] == 2


def test_what_saves_memory_and_what_it_costs(call: Call, here: Path) -> None:
    flags = ["pretrain_ar", "--plan", *SMALL, "--batch_size", "256"]
    ways = ([], ["--accumulate", "4"], ["--recompute"], ["--precision", "bf16"])
    whole, parts, recomputed, bf16 = (call(*flags, *way) for way in ways)
    assert parts["flop_per_step"] == bf16["flop_per_step"] == whole["flop_per_step"] < recomputed["flop_per_step"]
    assert parts["memory"]["others"] == pytest.approx(whole["memory"]["others"] / 4, rel=0.1)
    assert parts["memory"]["gradients"] == whole["memory"]["gradients"]
    assert recomputed["memory"]["others"] < 0.8 * whole["memory"]["others"]
    assert bf16["memory"]["others"] < 0.8 * whole["memory"]["others"]
    assert (whole["precision"], bf16["precision"]) == ("fp32", "bf16")


def planned(here: Path, processes: int = 1, sharded: bool = False, **settings: Any) -> dict[str, Any]:
    """The plan of several processes, of which this one is the first."""
    cache = TokenCache.open(next((here / "caches").iterdir()))
    codes = code_spec(cache)
    accelerator = SimpleNamespace(
        num_processes=processes,
        process_index=0,
        is_main_process=True,
        is_fsdp2=sharded,
        device=torch.device("cpu"),
        mixed_precision="no",
        wait_for_everyone=lambda: None,
    )
    model = Model(lambda: ARVideo(codes, clusters=(1, 2, 2), width=24, depth=2, targets=1.0), "auto", False, False)
    return plan(cast(Accelerator, accelerator), Pretrain(**settings), cache, model, Validation(512, 32))


def test_processes_share_the_batch(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, two, half = planned(here, batch_size=64), planned(here, 2, batch_size=64), planned(here, batch_size=32)
    assert (one["flop_per_step"], one["flop"]) == (two["flop_per_step"], two["flop"])
    assert two["seconds"] == pytest.approx(one["seconds"] / 2, rel=0.01)
    copied = half["memory"]["gradients"]
    assert two["memory"]["buckets"] == copied, "DistributedDataParallel has a copy of the gradients"
    assert two["memory"]["peak"] == half["memory"]["peak"] + copied
    assert two["memory"]["others"] == half["memory"]["others"]
    validation = two["memory"]["validation"] - copied
    assert half["memory"]["weights"] < validation < half["memory"]["validation"], "each has one clip, not both"
    lines = capsys.readouterr().out.splitlines()
    assert ["on 2 processes" in line for line in lines].count(True) == 2, "of the arithmetic and of the fastest product"
    assert [line.startswith("  buckets") for line in lines].count(True) == 1, "of the second of three plans"
    with pytest.raises(ValueError, match="batch_size 64 does not divide evenly among 3 processes"):
        planned(here, 3, batch_size=64)


def test_under_fsdp_they_share_what_lasts(here: Path) -> None:
    four, quarter = (planned(here, n, n == 4, batch_size=4 * n)["memory"] for n in (4, 1))
    for name in ("weights", "gradients", "optimizer"):
        assert four[name] == quarter[name] // 4
    assert (four["others"], four["buckets"]) == (quarter["others"], 0)
    assert four["peak"] - four["others"] == (quarter["peak"] - quarter["others"]) // 4
    assert four["validation"] < quarter["validation"] - four["weights"] - four["optimizer"]


def test_a_validation_keeps_nothing_for_a_backward_pass(here: Path) -> None:
    """Its two clips are as many as those of a step, and all targets are predicted in both."""
    told = planned(here, batch_size=2)["memory"]
    assert 0 < told["validation"] - told["weights"] - told["optimizer"] < told["others"] / 2


def test_a_cache_with_a_codebook_and_pixels(call: Call, tmp_path: Path, make_cache: MakeCache) -> None:
    book = np.random.default_rng(0).standard_normal((64, 5)).astype(np.float32)
    folder = make_cache(tmp_path, 20, codes_shape=(2, 4, 4), codebook_VC=book, keep_pixels="raw")
    told = call("pretrain_ar", "--plan", *SMALL, "--cache", str(folder), "--objective.input", "pixels")
    assert told["tokens"] == {"seen": 7, "predicted": 7}


def test_what_the_run_refuses_is_refused(call: Call, here: Path) -> None:
    before = written(here)
    flags = ["pretrain_ar", "--plan", *SMALL]
    assert "batch_size 4 must be a multiple of accumulate, got 3" in call(*flags, "--accumulate", "3")
    assert "clusters of 2x3x3 tokens do not divide" in call(*flags, "--objective.clusters", "[2,3,3]")
    assert "the cache holds none" in call(*flags, "--objective.input", "pixels")
    assert "--attention flex does not run here" in call(*flags, "--attention", "flex")
    assert "no finished cache" in call(*flags, "--caches", "nowhere")
    assert written(here) == before


def test_a_planned_run_is_the_same_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its folder is named after its settings: after --plan the run itself has the name that it had without."""
    names = {
        Run("pretrain_ar", SimpleNamespace(out=None), f"plan: {flag}\nlr: 0.1\n").folder.name
        for flag in ("true", "false")
    }
    assert len(names) == 1


def test_the_fastest_product_of_some(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = {512: [0.5, 0.02, 0.01, 0.02, 0.3], 1024: [0.05] * 5, 2048: [0.5] * 5}  # wider ones are not asked for
    monkeypatch.setattr("pipelines.engine.device._seconds", lambda a, b, device: seconds[len(a)].pop())
    assert matrix_peak(torch.device("cpu"), torch.float32) == 2 * 1024**3 / 0.05


MEASURED = [
    *("--objective.targets", "1.0", "--objective.width", "256", "--objective.heads", "4", "--objective.depth", "4"),
    *("--batch_size", "8", "--attention", "plain"),
]


@pytest.mark.skipif(sys.platform != "linux", reason="asks the C library of Linux to give freed memory back")
@pytest.mark.parametrize(
    "more",
    [
        ["--precision", "fp32"],
        pytest.param(["--precision", "fp32", "--recompute", "--batch_size", "16"], marks=pytest.mark.soak),
        pytest.param(["--precision", "bf16"], marks=pytest.mark.soak),
        pytest.param(["--precision", "fp32", "--accumulate", "2"], marks=pytest.mark.soak),
        pytest.param(["--precision", "fp32", "--attention", "sdpa"], marks=pytest.mark.soak),
    ],
)
def test_memory_is_what_a_real_step_takes(call: Call, tmp_path: Path, make_cache: MakeCache, more: list[str]) -> None:
    flags = [*MEASURED, *more, "--cache", str(make_cache(tmp_path, 40, codes_shape=(8, 8, 8)))]
    told = call("pretrain_ar", "--plan", *flags)["memory"]["peak"]
    assert told > 1e8, "a process's own comings and goings are small beside it"
    result = subprocess.run(
        [sys.executable, "-m", "tests.helpers.step_memory", *flags, "--out", str(tmp_path / "run")],
        cwd=ROOT,
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "OMP_WAIT_POLICY": "PASSIVE"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    assert told == pytest.approx(json.loads(result.stdout.splitlines()[-1]), rel=0.15)
