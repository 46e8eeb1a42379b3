"""Summaries and files of the commands, and the second call of a command, which does not repeat finished work."""

import csv
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from data.cache import TokenCache
from tests.helpers.commands import DIGITS, TINY_MODEL, TINY_TOKENIZER, last_line, start

Answers = dict[str, dict[str, Any]]

KEYS = {
    "train_tokenizer": "run tokenizer step psnr code_usage dead_codes perplexity skipped seconds",
    "tokenize": "cache key tokenizer videos skipped clips codes reused seconds",
    "pretrain_ar": "run objective step loss bits_per_code unigram_bits clips_per_second seconds",
    "probe": "run cache protocol n skipped chance linear knn untrained one_frame motion_energy layer",
    "report": "page",
}


@pytest.mark.parametrize("pipeline", KEYS)
def test_the_last_line_has_the_promised_keys(answers: Answers, pipeline: str) -> None:
    assert set(KEYS[pipeline].split()) <= set(answers[pipeline])


def test_probe_results_are_means_with_errors_in_0_to_1(answers: Answers) -> None:
    for name in ("linear", "knn", "untrained", "one_frame", "motion_energy"):
        result = answers["probe"][name]
        assert 0 <= result["mean"] <= 1
        assert 0 < result["stderr"] < 0.5
    assert answers["probe"]["n"] == 16
    assert (answers["probe"]["in_pretraining"], answers["probe"]["notes"]) == (0, [])
    assert answers["probe"]["chance"] == 0.125


def test_the_report_says_whether_training_helped(finished_project: Path, answers: Answers) -> None:
    gain = answers["probe"]["gain"]["linear"]
    linear, untrained = answers["probe"]["linear"]["mean"], answers["probe"]["untrained"]["mean"]
    assert gain["mean"] == pytest.approx(linear - untrained, abs=2e-4)
    page = (finished_project / answers["report"]["page"]).read_text()
    assert ("no better than the untrained network" in page) == (
        not all(one["ahead"] for one in answers["probe"]["gain"].values())
    )


def test_a_probe_keeps_its_predictions_and_the_accuracy_of_each_class(finished_project: Path, answers: Answers) -> None:
    result = answers["probe"]
    with open(finished_project / result["predictions"], newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == result["n"] == sum(one["n"] for one in result["per_class"].values())
    for probe in ("linear", "knn"):
        assert np.mean([float(row[f"{probe}_right"]) for row in rows]) == pytest.approx(result[probe]["mean"], abs=1e-3)
        for name, one in result["per_class"].items():
            share = np.mean([float(row[f"{probe}_right"]) for row in rows if row["label"] == name])
            assert share == pytest.approx(one[probe], abs=1e-3)
        # The prediction is that of the first of two repetitions.
        for row in rows:
            assert (row[probe] == row["label"]) in {1.0: [True], 0.0: [False], 0.5: [True, False]}[
                float(row[f"{probe}_right"])
            ]
    page = (finished_project / answers["report"]["page"]).read_text()
    assert "class, the worst first" in page and all(name in page for name in result["per_class"])


def test_an_attentive_probe_covers_every_layer_and_is_reported(copy_of: Callable[[], Path], answers: Answers) -> None:
    """Both commands start in a new interpreter, as for a user."""
    project, run = copy_of(), answers["pretrain_ar"]["run"]
    flags = ["--attentive", "true", "--run", run, "--seeds", "1"]
    result = last_line(start(project, "probe", *flags, launch=[sys.executable]))
    assert len(result["attentive_layers"]) == len(result["layers"]) == 2
    assert result["attentive_training"] == {"steps": 100, "epochs": 100.0}
    assert 0 <= result["untrained_attentive"]["mean"] <= 1 and "AdamW" in result["protocol"]
    assert result["linear"]["mean"] == result["layers"][result["layer"] - 1]["mean"]
    attentive = [layer["mean"] for layer in result["attentive_layers"]]
    assert result["attentive"]["mean"] == attentive[result["attentive_layer"] - 1]
    flags = ["--run", run, "--out", "page with attentive"]
    page = Path(last_line(start(project, "report", *flags, launch=[sys.executable]))["page"])
    assert "untrained network, attentive" in (project / page).read_text()


def test_a_run_folder_holds_its_files(finished_project: Path, answers: Answers) -> None:
    for pipeline in ("train_tokenizer", "pretrain_ar"):
        folder = finished_project / answers[pipeline]["run"]
        names = ["config.yaml", "environment.json", "metrics.jsonl", "model/model.safetensors", "summary.json"]
        assert [name for name in names if not (folder / name).exists()] == []
        assert json.loads((folder / "summary.json").read_text()) == answers[pipeline]
        assert len(list((folder / "checkpoints").iterdir())) == 2
    samples = sorted(path.name for path in (finished_project / answers["train_tokenizer"]["run"] / "samples").iterdir())
    assert samples == ["step_000006.mp4", "step_000006.png"]


def test_metrics_hold_training_and_validation_lines(finished_project: Path, answers: Answers) -> None:
    lines = [
        json.loads(line)
        for line in (finished_project / answers["pretrain_ar"]["run"] / "metrics.jsonl").read_text().splitlines()
    ]
    validated = {line["step"]: line["val_bits_per_code"] for line in lines if "val_bits_per_code" in line}
    assert list(validated) == [3, 6]
    assert validated[6] == answers["pretrain_ar"]["bits_per_code"]
    assert all({"loss", "lr", "seconds"} <= set(line) for line in lines if "loss" in line)


def test_the_cache_holds_every_video_once(finished_project: Path, answers: Answers) -> None:
    cache = TokenCache.open(finished_project / answers["tokenize"]["cache"])
    assert len(cache) == 40
    assert len({video.path for video in cache.videos}) == 40
    codes = np.stack([cache.codes(i) for i in range(len(cache))])
    assert codes.size == answers["tokenize"]["codes"]
    share = np.bincount(codes.ravel()) / codes.size
    entropy = -(share[share > 0] * np.log2(share[share > 0])).sum()
    assert answers["pretrain_ar"]["unigram_bits"] == pytest.approx(entropy, abs=1e-3)


def test_a_second_tokenize_decodes_nothing(finished_project: Path, answers: Answers, tmp_path: Path) -> None:
    flags = ["--videos", DIGITS, "--tokenizer", answers["train_tokenizer"]["run"], "--workers", "1"]
    flags += ["--shard_size", "100", "--out", str(tmp_path / "elsewhere")]
    again = last_line(start(finished_project, "tokenize", *flags))
    assert again["reused"]
    assert not answers["tokenize"]["reused"]
    assert again["key"] == answers["tokenize"]["key"]
    assert again["cache"] == answers["tokenize"]["cache"]


def test_a_finished_run_prints_its_summary_again(finished_project: Path, answers: Answers) -> None:
    for script, flags in (("train_tokenizer", ["--videos", DIGITS, *TINY_TOKENIZER]), ("pretrain_ar", TINY_MODEL)):
        again = start(finished_project, script, *flags)
        assert last_line(again) == answers[script]
        assert "nothing is left to do" in again.stderr


def test_the_written_configuration_runs_again(finished_project: Path, answers: Answers, tmp_path: Path) -> None:
    config = finished_project / answers["pretrain_ar"]["run"] / "config.yaml"
    assert yaml.safe_load(config.read_text())["steps"] == 6
    again = last_line(start(finished_project, "pretrain_ar", "--config", str(config), "--out", str(tmp_path / "again")))
    assert again["loss"] == answers["pretrain_ar"]["loss"]


def test_the_report_is_one_self_contained_page(finished_project: Path, answers: Answers) -> None:
    page = (finished_project / answers["report"]["page"]).read_text()
    assert not re.search(r"""(src|href)=["'](?!data:|#)""", page)
    assert not re.search("{{ [a-z]+ }}", page), "a part of the template is not filled"
    assert page.count("<svg") >= 3
    assert "data:image/png;base64," in page
    for command in ("tokenize.py", "pretrain_ar.py", "probe.py", "train_tokenizer.py"):
        assert command in page
