"""`pretrain_ar --plan` predicts the cost of a run and writes nothing."""

import json
import os
import subprocess
import sys
from functools import partial
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
from data.loading import BatchPlan, TokenDataset, batches
from pipelines.engine.code_spec import code_spec
from pipelines.engine.device import matrix_peak
from pipelines.engine.plan import example_batch, plan
from pipelines.engine.run import Run
from pipelines.settings.pretrain_ar import Pretrain
from tests.helpers.caches import MakeCache
from tests.helpers.commands import ROOT, Call

SMALL = [
    *("--objective.clusters", "[1,2,2]", "--objective.width", "24", "--objective.depth", "1", "--objective.heads", "2"),
    *("--objective.decoder_width", "24", "--objective.decoder_depth", "1", "--objective.decoder_heads", "2"),
    *("--precision", "fp32", "--attention", "plain", "--batch_size", "4"),
]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make_cache: MakeCache) -> Path:
    """A folder with a cache of 20 videos (2 held out) of 2 x 4 x 4 codes. Peak matmul throughput is set to 10 MFLOP/s."""
    make_cache(tmp_path / "caches", 20, codes_shape=(2, 4, 4))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("pipelines.engine.plan.matrix_peak", lambda device, dtype: 1e7)
    return tmp_path


def files_of(folder: Path) -> set[Path]:
    return set(folder.rglob("*"))


def test_the_plan_shows_the_cost_of_a_run_and_writes_nothing(call: Call, here: Path) -> None:
    before = files_of(here)
    numbers = call("pretrain_ar", "--plan", *SMALL, "--steps", "9", "--validate_every", "3")
    assert files_of(here) == before
    cache = TokenCache.open(next((here / "caches").iterdir()))
    sizes = {"width": 24, "depth": 1, "heads": 2, "decoder_width": 24, "decoder_depth": 1, "decoder_heads": 2}
    objective = ARVideo(code_spec(cache), clusters=(1, 2, 2), **sizes)  # type: ignore[arg-type]
    counts = {"total": sum(p.numel() for p in objective.parameters())}
    counts |= {name: sum(p.numel() for p in getattr(objective, name).parameters()) for name in ("encoder", "decoder")}
    assert numbers["parameters"] == {**counts, "rest": counts["total"] - counts["encoder"] - counts["decoder"]}
    # A quarter of the 4 tokens of 7 of the 8 clusters.
    assert numbers["tokens"] == {"seen": 7, "predicted": 7}
    assert numbers["videos"] == {"train": 18, "held_out": 2}
    assert (numbers["steps"], numbers["epochs"], numbers["validations"]) == (9, 2.0, 3)
    assert numbers["cache_bytes"] == sum(path.stat().st_size for path in (here / "caches").rglob("*.tar"))
    assert numbers["memory"]["weights"] >= 4 * counts["total"] == numbers["memory"]["gradients"]
    assert numbers["memory"]["optimizer"] == pytest.approx(8 * counts["total"], rel=0.01)
    assert numbers["memory"]["buckets"] == 0
    assert numbers["seconds"] == pytest.approx(numbers["flop"] / 5e6, abs=0.05), "at half of the matrix-product peak"
    lines = call.out.splitlines()[:-1]
    for name in (
        *("parameters", "  encoder", "tokens seen", "tokens predicted", "FLOPs of a step", "memory of a step"),
        *("passes over the data", "cache", "peak matmul throughput", "time of the run"),
    ):
        assert [line.startswith(name) for line in lines].count(True) == 1, call.out


def test_the_plan_says_that_a_run_does_not_fit(call: Call, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    memory = SimpleNamespace(total=10**12)
    monkeypatch.setattr("psutil.virtual_memory", lambda: memory)
    assert call("pretrain_ar", "--plan", *SMALL)["memory_here"] == 10**12
    assert "does not fit" not in call.err
    memory.total = 10**6
    call("pretrain_ar", "--plan", *SMALL)
    assert "does not fit" in call.err and "--batch_size" in call.err


def test_the_plan_counts_the_flops_of_a_real_run(call: Call, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The count includes all matmuls of the steps and of two validations."""
    # Timing the attention kernels would be counted too.
    monkeypatch.setattr("pipelines.engine.network._attention", lambda *_: "plain")
    flags = [*SMALL, "--accumulate", "4", "--recompute", "--steps", "3", "--validate_every", "2"]
    with FlopCounterMode(display=False) as counter:
        call("pretrain_ar", *flags)
    numbers = call("pretrain_ar", "--plan", *flags)
    assert numbers["flop"] == counter.get_total_flops()
    assert numbers["validations"] == 2


def test_gradient_accumulation_activation_checkpointing_and_bf16_save_memory(call: Call, here: Path) -> None:
    flags = ["pretrain_ar", "--plan", *SMALL, "--batch_size", "256"]
    variants = ([], ["--accumulate", "4"], ["--recompute"], ["--precision", "bf16"])
    whole, parts, recomputed, bf16 = (call(*flags, *variant) for variant in variants)
    assert parts["flop_per_step"] == bf16["flop_per_step"] == whole["flop_per_step"] < recomputed["flop_per_step"]
    assert parts["memory"]["others"] == pytest.approx(whole["memory"]["others"] / 4, rel=0.1)
    assert parts["memory"]["gradients"] == whole["memory"]["gradients"]
    assert recomputed["memory"]["others"] < 0.8 * whole["memory"]["others"]
    assert bf16["memory"]["others"] < 0.8 * whole["memory"]["others"]
    assert (whole["precision"], bf16["precision"]) == ("fp32", "bf16")


def test_a_batch_too_large_to_trace_costs_what_its_trace_would_give(
    call: Call, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The FLOPs of VIMPAC's contrastive loss are quadratic in the clips.
    size = ["--objective.width", "24", "--objective.depth", "1", "--objective.heads", "2"]
    flags = ["pretrain_ar", "--plan", "--objective", "VIMPAC", *size, *SMALL[-6:], "--batch_size", "48"]
    traced = call(*flags)
    monkeypatch.setattr("pipelines.engine.plan.TRACED_CLIPS", 16)
    extrapolated = call(*flags)
    assert (traced["extrapolated"], extrapolated["extrapolated"]) == (False, True)
    assert extrapolated["flop_per_step"] == traced["flop_per_step"]
    for use, size_in_bytes in traced["memory"].items():
        assert extrapolated["memory"][use] == pytest.approx(size_in_bytes, rel=0.05)
    # Tracing this batch would take days.
    assert call(*flags, "--batch_size", str(10**9))["flop_per_step"] > 10**9 / 48 * traced["flop_per_step"] * 0.999


def planned(here: Path, processes: int = 1, sharded: bool = False, **settings: Any) -> dict[str, Any]:
    """Return the plan of several processes, made by the first one."""
    cache = TokenCache.open(next((here / "caches").iterdir()))
    accelerator = SimpleNamespace(
        num_processes=processes,
        process_index=0,
        is_main_process=True,
        is_fsdp2=sharded,
        device=torch.device("cpu"),
        mixed_precision="no",
        wait_for_everyone=lambda: None,
    )
    settings["objective"] = partial(ARVideo, clusters=(1, 2, 2), width=24, depth=2, targets=1.0)
    limits = {"validation_clips": 512, "validation_batch": 32}
    return plan(cast(Accelerator, accelerator), Pretrain(**settings), cache, **limits)


def test_processes_share_the_batch(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, two, half = planned(here, batch_size=64), planned(here, 2, batch_size=64), planned(here, batch_size=32)
    assert (one["flop_per_step"], one["flop"]) == (two["flop_per_step"], two["flop"])
    assert two["seconds"] == pytest.approx(one["seconds"] / 2, rel=0.01)
    copied = half["memory"]["gradients"]
    assert two["memory"]["buckets"] == copied, "DistributedDataParallel keeps a copy of the gradients"
    assert two["memory"]["peak"] == half["memory"]["peak"] + copied
    assert two["memory"]["others"] == half["memory"]["others"]
    validation = two["memory"]["validation"] - copied
    assert half["memory"]["weights"] < validation < half["memory"]["validation"], (
        "each process validates one clip, not both"
    )
    lines = capsys.readouterr().out.splitlines()
    assert ["on 2 processes" in line for line in lines].count(True) == 2, "in the rows of FLOPs and peak throughput"
    assert [line.startswith("  buckets") for line in lines].count(True) == 1, "only in the second of three plans"
    with pytest.raises(ValueError, match=r"batch_size .* processes \(3\), got 64"):
        planned(here, 3, batch_size=64)


def test_fsdp_divides_weights_gradients_and_moments(here: Path) -> None:
    four, quarter = (planned(here, n, n == 4, batch_size=4 * n)["memory"] for n in (4, 1))
    for name in ("weights", "gradients", "optimizer"):
        assert four[name] == quarter[name] // 4
    assert (four["others"], four["buckets"]) == (quarter["others"], 0)
    assert four["peak"] - four["others"] == (quarter["peak"] - quarter["others"]) // 4
    assert four["validation"] < quarter["validation"] - four["weights"] - four["optimizer"]


def test_a_validation_stores_no_activations(here: Path) -> None:
    """Validation and step both have two clips and predict all targets."""
    numbers = planned(here, batch_size=2)["memory"]
    assert 0 < numbers["validation"] - numbers["weights"] - numbers["optimizer"] < numbers["others"] / 2


def test_a_cache_with_a_codebook_and_pixels(call: Call, tmp_path: Path, make_cache: MakeCache) -> None:
    book = np.random.default_rng(0).standard_normal((64, 5)).astype(np.float32)
    folder = make_cache(tmp_path, 20, codes_shape=(2, 4, 4), codebook_VC=book, keep_pixels="raw")
    numbers = call("pretrain_ar", "--plan", *SMALL, "--cache", str(folder), "--objective.input", "pixels")
    assert numbers["tokens"] == {"seen": 7, "predicted": 7}


@pytest.mark.parametrize("pixels, pairs", [(False, False), (True, False), (False, True), (True, True)])
def test_the_planned_batch_has_the_keys_shapes_and_dtypes_of_the_loader(
    tmp_path: Path, make_cache: MakeCache, pixels: bool, pairs: bool
) -> None:
    cache = TokenCache.open(make_cache(tmp_path, 6, codes_shape=(2, 4, 4), views=2, keep_pixels="raw"))
    dataset = TokenDataset(cache, range(6), BatchPlan(samples=6, batch_size=4, seed=0), pixels=pixels, pairs=pairs)
    (loaded,) = batches(dataset, range(1), workers=0)
    planned = example_batch(cache, 4, pixels=pixels, pairs=pairs)
    assert {key: (value.shape, value.dtype) for key, value in planned.items()} == {
        key: (value.shape, value.dtype) for key, value in loaded.items()
    }
    assert torch.equal(planned["slices_B"], loaded["slices_B"]), "no video is padded"


def test_errors_of_the_run_are_errors_of_the_plan(call: Call, here: Path) -> None:
    before = files_of(here)
    flags = ["pretrain_ar", "--plan", *SMALL]
    assert "batch_size 4 must be a multiple of accumulate, got 3" in call(*flags, "--accumulate", "3")
    assert "clusters of 2x3x3 tokens do not divide" in call(*flags, "--objective.clusters", "[2,3,3]")
    assert "pixels; the cache" in call(*flags, "--objective.input", "pixels")
    assert "--attention flex does not run here" in call(*flags, "--attention", "flex")
    assert "no finished cache" in call(*flags, "--caches", "nowhere")
    assert files_of(here) == before


def test_plan_does_not_change_the_run_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    """The name of the run folder is a hash of the settings, which does not depend on --plan."""
    names = {
        Run("pretrain_ar", SimpleNamespace(out=None), f"plan: {flag}\nlr: 0.1\n").folder.name
        for flag in ("true", "false")
    }
    assert len(names) == 1


def test_the_peak_is_the_fastest_matmul(monkeypatch: pytest.MonkeyPatch) -> None:
    # Matrices wider than 2048 are not measured, because the matmul of that width takes longer than 0.1 s.
    seconds = {512: [0.5, 0.02, 0.01, 0.02, 0.3], 1024: [0.05] * 5, 2048: [0.5] * 5}
    monkeypatch.setattr("pipelines.engine.device._seconds", lambda a, b, device: seconds[len(a)].pop())
    assert matrix_peak(torch.device("cpu"), torch.float32) == 2 * 1024**3 / 0.05


MEASURED = [
    *("--objective.targets", "1.0", "--objective.width", "256", "--objective.heads", "4", "--objective.depth", "4"),
    *("--batch_size", "8", "--attention", "plain"),
]


@pytest.mark.skipif(sys.platform != "linux", reason="needs the C library of Linux to return freed memory")
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
def test_the_planned_memory_is_that_of_a_real_step(
    call: Call, tmp_path: Path, make_cache: MakeCache, more: list[str]
) -> None:
    flags = [*MEASURED, *more, "--cache", str(make_cache(tmp_path, 40, codes_shape=(8, 8, 8)))]
    numbers = call("pretrain_ar", "--plan", *flags)["memory"]["peak"]
    assert numbers > 1e8, "other allocations of the process are small in comparison"
    result = subprocess.run(
        [sys.executable, "-m", "tests.helpers.step_memory", *flags, "--out", str(tmp_path / "run")],
        cwd=ROOT,
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "OMP_WAIT_POLICY": "PASSIVE"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    assert numbers == pytest.approx(json.loads(result.stdout.splitlines()[-1]), rel=0.15)
