"""The pre-training benchmark uses the fastest setting of each model and counts the FLOPs of the papers' models."""

from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import torch

from data.sources import load_source
from pipelines import benchmarks
from pipelines.benchmarks import Row, pretrain_growth, pretrain_speed
from pipelines.benchmarks.entrants import Entrant, Shape, fastest, ours, tube_mask, videomae
from pipelines.benchmarks.pretrain_speed import flop_of
from tests.helpers.forked import START_METHOD

pytest.importorskip("transformers", reason="the benchmark needs transformers")

CPU = torch.device("cpu")
TINY = Shape(frames=4, side=32, tubelet=(2, 8, 8), width=24, depth=1, heads=2, batch=2, clusters=(1, 2, 2))


def only_sdpa(*_: object) -> list[dict[str, Any]]:
    """Replace `_variants` with a single setting, to keep the test quick."""
    return [{"attention": "sdpa", "compiled": False}]


def test_every_row_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pretrain_speed, "_variants", only_sdpa)
    monkeypatch.setattr(pretrain_speed, "SETTINGS", {"targets 0.25": pretrain_speed.SETTINGS["targets 0.25"]})
    monkeypatch.setattr(pretrain_speed, "_worker_counts", lambda: [0])
    monkeypatch.setattr(benchmarks, "get_context", lambda _: get_context(START_METHOD))
    source = load_source("builtin:moving-digits:4:0")
    rows = list(pretrain_speed.measure(tmp_path, source, CPU, 0.1, TINY))
    names = [row.what for row in rows]
    counts = {
        "ViT of width": 1,
        "FLOP per step": 1,
        "fraction of peak matmul throughput": 1,
        "peak memory": 1,
        "from disk": 1,
        "share of the time": pretrain_speed.LARGEST,
    }
    assert {part: sum(part in name for name in names) for part in counts} == counts
    # The memory of a tiny step may fit into memory that the process already has.
    assert all(row.ours > 0 for row in rows if "memory" not in row.what)


def test_growth_writes_its_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pretrain_growth, "FRAMES", (2, 4))
    monkeypatch.setattr(pretrain_growth, "BOXES", ((1, 2, 2), (1, 1, 1)))
    monkeypatch.setattr(pretrain_growth, "VOCABULARIES", ((8, 5), (8, 8)))
    rows: list[Row] = list(pretrain_growth.measure(tmp_path / "new", CPU, 0.1, TINY))
    # Three curves for each of two settings, and one curve of the public model.
    assert len(rows) == 7
    for what in ("tokens", "clusters", "vocabulary"):
        assert (tmp_path / "new" / f"growth-{what}.svg").read_text().startswith("<svg")


def test_vit_b_has_the_flops_of_the_papers() -> None:
    """The forward and backward pass together take three times the FLOPs of the forward pass, except in the first layer.

    The first layer needs no gradient of its input.
    """
    one = Shape(batch=1)
    billions = {
        "VideoMAE": flop_of(partial(videomae, one), "eager") / 6e9,
        "ours": flop_of(partial(ours, one, targets=1.0), "reference") / 6e9,
    }
    # 160 tokens in the encoder, 1,568 in the decoder. The public code embeds all 1,568 tubelets, 1,408 more than it encodes.
    # The embedding needs two of three matmuls: the forward pass and the gradient of its weights.
    assert billions["VideoMAE"] == pytest.approx(33.6 + 1408 * 1536 * 768 * 2 / 3e9, rel=0.01)
    # 300 tokens in the encoder, 1,470 queries.
    assert billions["ours"] == pytest.approx(46.4, rel=0.01)


def test_the_tube_mask_hides_the_same_nine_tenths_of_each_time_slice() -> None:
    mask_BTS = tube_mask(Shape(batch=3)).view(3, 8, 196)
    assert (mask_BTS.sum(2) == 176).all() and (mask_BTS == mask_BTS[:, :1]).all()


def test_the_fastest_setting_is_chosen_and_a_failing_one_is_reported() -> None:
    laps = {"slow": [3.0, 2.0], "fast": [1.5, 9.0], "lean": [1.55, 9.0], "fat": [1.5, 9.0]}
    sizes = {"slow": 1, "fast": 3, "lean": 2, "fat": 4}

    class Fake(Entrant):
        def __init__(self, name: str) -> None:
            self.name = name
            self._laps = list(laps.get(name, []))

        def step(self, batch: object = None) -> None:
            if self.name == "broken":
                raise RuntimeError("no kernel")

        def seconds(self) -> float:
            return self._laps.pop(0)

        def memory(self) -> int:
            return sizes[self.name]

    best, tried = fastest(lambda name: Fake(name), [{"name": name} for name in ("slow", "broken", "fast")])
    assert best().name == "fast" and "broken: does not run (RuntimeError)" in tried
    best, _ = fastest(lambda name: Fake(name), [{"name": name} for name in sizes])
    # "lean" is within 5 % of the fastest and needs less memory.
    assert best().name == "lean"
    with pytest.raises(ValueError, match="broken"):
        fastest(lambda name: Fake(name), [{"name": "broken"}])
