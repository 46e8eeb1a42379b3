"""evaluate_tokenizer --pretrain fills caches, trains on each of them for equal seconds, and adds the probes to the table."""

import json
from pathlib import Path

import pytest

from data.cache import TokenCache
from pipelines.commands import compare, learned_features
from pipelines.engine.config import read_settings
from tests.helpers.commands import Call
from tests.pipelines.commands.test_compare import ENTRIES

pytestmark = pytest.mark.usefixtures("forked_jobs")
NAMES = ["linear-2x8x8-64", "linear-2x8x8-3x64"]
FLAGS = ["--videos", "builtin:moving-digits:30:20", "--clip.frames", "4", "--clip.size", "32", "--pretrain", "1"]


def test_the_table_has_the_probes_of_trained_and_untrained_networks(
    call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("pipelines.evaluation.tokenizer_metrics._SECONDS", 0.001)
    monkeypatch.setattr("pipelines.commands.evaluate_tokenizer.memory_of", lambda *_: 2**20)
    entry = tmp_path / "entry.yaml"
    entry.write_text(json.dumps({"batch_size": 4, "warmup": 1, "precision": "fp32", "objective": ENTRIES["order"]}))
    monkeypatch.setattr(learned_features, "_ENTRY", entry)
    monkeypatch.setattr(compare, "_TIMED_STEPS", 12)
    summary = call("evaluate_tokenizer", "--tokenizers", *NAMES, *FLAGS)
    first, second = summary["tokenizers"]
    for row in (first, second):
        for probe in ("untrained_linear", "linear", "untrained_attentive", "attentive"):
            assert 0 <= row[probe]["mean"] <= 1
    assert (first["bytes_per_clip"], second["bytes_per_clip"]) == (2 * 2 * 4 * 4, 2 * 2 * 4 * 4 * 3)
    assert second["psnr"]["mean"] > first["psnr"]["mean"]
    assert summary["n"] == 20 and summary["chance"] < 0.2
    table = call.out.splitlines()
    assert "untrained attentive" in table[0] and "bytes/clip" in table[0]
    assert f"chance {summary['chance']:.3f}" in table[3] and "motion energy" in table[3]
    runs = sorted(Path(summary["page"]).parent.glob("runs/*"))
    assert len(runs) == 2, "one training run for each tokenizer"
    settings = [read_settings(run / "config.yaml") for run in runs]
    layouts = [TokenCache.open(own["cache"]).layout.codes_per_place for own in settings]
    assert sorted(layouts) == [1, 3]
    assert call("evaluate_tokenizer", "--tokenizers", *NAMES, *FLAGS) == summary
