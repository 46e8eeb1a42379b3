"""The quality benchmark trains each setting by the seeds, compares at equal time too, and goes on where it stopped."""

import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from ar_model.objectives import ARVideo
from data.cache import TokenCache
from data.files import write_json
from pipelines.benchmark import Benchmark
from pipelines.benchmarks import Row, pretrain_quality
from pipelines.engine.code_spec import code_spec
from pipelines.engine.config import parse
from pipelines.settings.pretrain_ar import Pretrain
from tests.helpers.caches import MakeCache

CPU = torch.device("cpu")
SMALL = {"width": 12, "depth": 1, "heads": 1, "decoder_width": 12, "decoder_depth": 1, "decoder_heads": 1}
SECONDS = {"targets-0.25": [40.0, 10.0], "targets-1.0": [15.0, 16.0]}
BITS = {"targets-0.25": [5.0, 6.0], "targets-1.0": [3.0, 5.0]}


class Trainings:
    """Stands for pretrain_ar: notes with which flags it is started, and writes what a run leaves behind."""

    def __init__(self, cache: TokenCache) -> None:
        self.cache, self.flags = cache, {}

    def __call__(self, command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        script = next(i for i, word in enumerate(command) if word.endswith("pretrain_ar.py"))
        words = [word for flag in command[script + 1 :] for word in flag.split("=")]
        flags = dict(zip(words[::2], words[1::2], strict=True))
        out = Path(flags["--out"])
        self.flags[out.name] = flags
        name, seed = out.name.split("-seed")
        ARVideo(code_spec(self.cache), **SMALL).save(out / "model")
        (out / "checkpoints").mkdir()
        bits, seconds = (numbers.get(name, [4.0, 4.0])[int(seed)] for numbers in (BITS, SECONDS))
        write_json(out / "summary.json", {"bits_per_code": bits, "seconds": seconds, "step": int(flags["--steps"])})
        return subprocess.CompletedProcess(command, 0, "", "")


@pytest.fixture
def trainings(tmp_path: Path, make_cache: MakeCache, monkeypatch: pytest.MonkeyPatch) -> Trainings:
    folder = make_cache(tmp_path / "caches", videos=24, codes_shape=(8, 8, 8))
    trainings = Trainings(TokenCache.open(str(folder)))
    monkeypatch.setattr(subprocess, "run", trainings)
    return trainings


def measure(trainings: Trainings, folder: Path, *only: str) -> list[Row]:
    return list(pretrain_quality.measure(folder, trainings.cache, CPU, 0.25, only))


def test_settings_are_compared_at_equal_steps_and_at_equal_time(trainings: Trainings, tmp_path: Path) -> None:
    rows = {row.what: row for row in measure(trainings, tmp_path / "runs", "targets 1.0")}
    longer = "targets 0.25, for as long as targets 1.0 takes"
    assert list(rows) == [
        f"{what}, {name}"
        for what in ("linear probe", "held-out codes", "the fastest training")
        for name in ("targets 0.25", longer, "targets 1.0")
    ]
    bits = rows["held-out codes, targets 1.0"]
    assert (bits.ours, bits.error, bits.peer, bits.alternative) == (4.0, 1.0, 5.5, "targets 0.25")
    assert rows["held-out codes, targets 0.25"].peer is None
    assert 0 <= rows["linear probe, targets 1.0"].ours <= 1
    asked = {out: (flags["--steps"], flags.get("--objective.targets")) for out, flags in trainings.flags.items()}
    assert asked == {
        **{f"targets-0.25-seed{seed}": ("200", None) for seed in (0, 1)},
        **{f"targets-1.0-seed{seed}": ("200", "1.0") for seed in (0, 1)},
        **{f"targets-0.25-for-as-long-as-targets-1.0-takes-seed{seed}": ("300", None) for seed in (0, 1)},
    }
    assert {flags["--seed"] for flags in trainings.flags.values()} == {"0", "1"}


def test_what_is_finished_is_not_trained_again(trainings: Trainings, tmp_path: Path) -> None:
    first = measure(trainings, tmp_path, "keep 0.5")
    trainings.flags.clear()
    assert measure(trainings, tmp_path, "keep 0.5") == first
    assert not trainings.flags


def test_a_setting_that_does_not_exist_is_refused_before_anything_is_trained(
    trainings: Trainings, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=r"only: 'keep 2' is none of: targets 0.25; "):
        measure(trainings, tmp_path, "targets 1.0", "keep 2")
    assert not trainings.flags


def test_a_training_that_fails_ends_it_with_its_last_line(
    trainings: Trainings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(command, 2, "", "a bar\npretrain_ar: error: no space\n")

    monkeypatch.setattr(subprocess, "run", fail)
    with pytest.raises(ValueError, match=r"^(keep 0.5|targets 0.25), seed \d: pretrain_ar: error: no space$"):
        measure(trainings, tmp_path, "keep 0.5")


def test_a_training_that_is_killed_without_a_word_ends_it_with_its_code(
    trainings: Trainings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(subprocess, "run", lambda command, **_: subprocess.CompletedProcess(command, -9, "", ""))
    with pytest.raises(ValueError, match=r"seed 0: exit code -9$"):
        measure(trainings, tmp_path, "keep 0.5")


def test_a_setting_that_the_grid_does_not_allow_is_refused_before_anything_is_trained(
    tmp_path: Path, make_cache: MakeCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = TokenCache.open(str(make_cache(tmp_path / "caches", videos=8, codes_shape=(6, 8, 8))))
    trainings = Trainings(cache)
    monkeypatch.setattr(subprocess, "run", trainings)
    with pytest.raises(ValueError, match="unit: column: clusters of 8x1x1 tokens do not divide .*; --only chooses"):
        measure(trainings, tmp_path, "keep 0.5", "unit: column")
    assert not trainings.flags


def test_settings_are_named_for_this_benchmark_only() -> None:
    with pytest.raises(ValueError, match="only names settings of quality"):
        Benchmark("cache", only=["keep 0.5"])


@pytest.mark.parametrize("name", pretrain_quality.SETTINGS)
def test_each_setting_makes_another_model(name: str, trainings: Trainings) -> None:
    flags = [f"--objective.{key}={value}" for key, value in pretrain_quality.SETTINGS[name].items()]
    codes = code_spec(trainings.cache)
    made, plain = (parse(Pretrain, argv)[0].objective(codes)._hub_mixin_config for argv in (flags, []))
    assert len([key for key in plain if made[key] != plain[key]]) == len(flags)
