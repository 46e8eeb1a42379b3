"""The ablations of ARVideo: each file changes the settings that its name says, and compare trains it."""

import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from ar_model.inputs import CodeSpec
from data.cache import TokenCache
from pipelines.engine.config import parse
from pipelines.engine.sweep import Job, train
from pipelines.settings.pretrain_ar import Pretrain
from tests.helpers.caches import MakeCache
from tests.helpers.commands import ROOT, Call

FOLDER = ROOT / "pipelines" / "configs" / "ablations"
CODES = CodeSpec(shape=(8, 8, 8), vocab_size=1000, levels=((8, 5, 5, 5),))
CHANGES: dict[str, dict[str, Any]] = {
    "default": {},
    "targets_1.0": {"targets": 1.0},
    "targets_0.1": {"targets": 0.1},
    "ranks_0.5": {"ranks": 0.5},
    "targets_1.0_ranks_0.5": {"targets": 1.0, "ranks": 0.5},
    "unit_token": {"clusters": (1, 1, 1)},
    "unit_slice": {"clusters": (1, 8, 8)},
    "unit_spatial": {"clusters": (1, 4, 4)},
    "unit_column": {"clusters": (8, 1, 1)},
    "unit_temporal": {"clusters": (2, 1, 1)},
    "unit_4x4x4": {"clusters": (4, 4, 4)},
    "order_spatial_first": {"order": "spatial-first"},
    "order_temporal_first": {"order": "temporal-first"},
    "keep_0.1": {"keep": 0.1},
    "keep_0.5": {"keep": 0.5},
    "keep_1.0": {"keep": 1.0},
    "no_causal_mask": {"causal": False},
    "decoder_self": {"decoder_self": True},
    "sine_cosine_positions": {"rope": False},
}


def parsed(*flags: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Settings of the objective, and all other settings."""
    settings, _ = parse(Pretrain, flags)
    with torch.device("meta"):
        objective = settings.objective(CODES)
    others = {key: value for key, value in vars(settings).items() if key != "objective"}
    return {"class": type(objective).__name__, **objective._hub_mixin_config}, others


def test_every_file_is_known() -> None:
    assert {path.stem for path in FOLDER.iterdir()} == set(CHANGES)


@pytest.mark.parametrize("name", CHANGES)
def test_a_file_changes_only_what_its_name_says(name: str) -> None:
    default, other_defaults = parsed()
    settings, others = parsed("--config", str(FOLDER / f"{name}.yaml"))
    changes = {key: value for key, value in settings.items() if value != default[key]}
    assert {key: tuple(value) if key == "clusters" else value for key, value in changes.items()} == CHANGES[name]
    assert others == other_defaults


def test_compare_refuses_a_unit_that_does_not_divide_the_grid(
    tmp_path: Path, make_cache: MakeCache, call: Call
) -> None:
    cache = make_cache(tmp_path / "caches", videos=8, codes_shape=(6, 8, 8))
    files = [str(FOLDER / f"{name}.yaml") for name in ("default", "unit_column")]
    line = call("compare", "--entries", *files, "--cache", str(cache), "--out", str(tmp_path / "out"))
    assert "unit_column.yaml: clusters of 8x1x1" in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("code", "stderr", "reason"),
    [
        (2, "a progress bar\npretrain_ar: error: no space\n", "pretrain_ar: error: no space"),
        (-9, "", "-9"),
    ],
)
def test_a_failed_training_run_ends_a_comparison_with_its_last_line_or_exit_code(
    tmp_path: Path, make_cache: MakeCache, monkeypatch: pytest.MonkeyPatch, code: int, stderr: str, reason: str
) -> None:
    cache = TokenCache.open(str(make_cache(tmp_path / "caches", videos=8)))
    result = subprocess.CompletedProcess([], code, "", stderr)
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: result)
    with pytest.raises(ValueError, match=f"^keep_0.5, seed 3: .*{reason}$"):
        train([Job("keep_0.5", cache.address, tmp_path / "run", 800, 3, [])], torch.device("cpu"))
