"""Training from the weights of an earlier run: they are the start, the run is a new one, and other models are refused."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ar_model.objectives import load_objective
from tests.helpers.caches import MakeCache
from tests.helpers.commands import TINY_MODEL, Call

SMALL = [*TINY_MODEL, "--objective.clusters", "[1,3,3]"]
Pretrain = Callable[..., Any]


@pytest.fixture
def pretrain(call: Call, make_cache: MakeCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Pretrain:
    """Function like `call` for pretrain_ar with small settings: (name of a cache, flags). The run `first` is finished."""
    monkeypatch.chdir(tmp_path)
    make_cache(tmp_path / "own", 10)
    make_cache(tmp_path / "more videos", 14)
    make_cache(tmp_path / "longer clips", 10, codes_shape=(4, 3, 3))
    make_cache(tmp_path / "other tokenizer", 10, tokenizer="another")

    def run(caches: str, *flags: str) -> Any:
        return call("pretrain_ar", *SMALL, "--caches", caches, *flags)

    run("own", "--out", "first")
    return run


def parameters(run: str) -> dict[str, torch.Tensor]:
    return dict(load_objective(run).named_parameters())


@pytest.mark.parametrize("caches", ["own", "more videos", "longer clips"])
def test_training_starts_from_the_weights(pretrain: Pretrain, caches: str) -> None:
    # Without a learning rate, training changes nothing.
    pretrain(caches, "--init", "first", "--out", "second", "--lr", "1e-30")
    first, second = parameters("first"), parameters("second")
    assert first.keys() == second.keys()
    assert all(torch.allclose(first[name], second[name], atol=1e-12) for name in first)
    pretrain(caches, "--out", "random", "--lr", "1e-30")
    random = parameters("random")
    assert not all(torch.allclose(first[name], random[name], atol=1e-3) for name in first)


def test_the_run_is_a_new_one_that_depends_on_the_weights(pretrain: Pretrain) -> None:
    names = {pretrain("own")["run"], pretrain("own", "--init", "first")["run"]}
    # Another run in the same place is another start.
    shutil.rmtree("first")
    pretrain("own", "--out", "first", "--seed", "7")
    names.add(pretrain("own", "--init", "first")["run"])
    assert len(names) == 3


def test_other_models_are_refused(pretrain: Pretrain, call: Call, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    mistakes = [
        ("own", ["--init", "absent"], "--init absent: not a run folder"),
        ("own", ["--init", "empty"], "--init empty: not a run folder"),
        ("own", ["--init", "first", "--objective.width", "48"], "--init first: other settings of the objective"),
        ("own", ["--init", "first", "--objective.depth", "3"], "encoder.blocks.2"),
        ("other tokenizer", ["--init", "first"], "--init first: was trained on codes of another tokenizer"),
    ]
    for caches, flags, message in mistakes:
        assert message in pretrain(caches, *flags, "--out", "refused")
    vimpac = ["--objective", "VIMPAC", "--objective.width", "24", "--objective.depth", "2", "--objective.heads", "2"]
    error = call("pretrain_ar", *vimpac, "--caches", "own", "--init", "first", "--out", "refused")
    assert "--init first: is a run of ARVideo, must be one of VIMPAC" in error
    assert not Path("refused").exists()


def test_pixels_need_no_common_tokenizer(call: Call, make_cache: MakeCache, tmp_path: Path) -> None:
    flags = [
        *TINY_MODEL,
        "--objective.clusters",
        "[1,2,2]",
        "--objective.input",
        "pixels",
        "--objective.target",
        "pixels",
    ]
    runs = [str(tmp_path / name) for name in ("first", "second")]
    for run, tokenizer, more in ((runs[0], "one", []), (runs[1], "another", ["--init", runs[0]])):
        cache = make_cache(tmp_path / tokenizer, 10, codes_shape=(2, 4, 4), keep_pixels="raw", tokenizer=tokenizer)
        assert call("pretrain_ar", *flags, "--cache", str(cache), "--out", run, *more)["step"] == 6
