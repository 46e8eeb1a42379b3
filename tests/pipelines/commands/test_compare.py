"""A comparison trains all objectives at the same budget, probes each model once, and resumes where it stopped."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from ar_model.objectives import VIMPAC
from data.cache import TokenCache
from data.sources import Video
from pipelines.commands import compare
from pipelines.commands.pretrain_ar import warnings_of
from pipelines.engine.code_spec import code_spec
from pipelines.engine.config import read_settings
from pipelines.engine.run_files import read_json
from pipelines.evaluation.comparison import PROBES, Entry
from pipelines.reporting.comparison_page import bits_by_conditioning
from pipelines.settings.pretrain_ar import Pretrain
from tests.helpers.cache_contents import equal_cuts
from tests.helpers.caches import MakeCache
from tests.helpers.commands import Call, last_line, start

# The fixture `finished` is a real comparison: other tests fork its training runs.
pytestmark = pytest.mark.usefixtures("forked_jobs")

SIZE = {"width": 12, "depth": 2, "heads": 1}
ENTRIES = {
    "order": {
        "class_path": "ARVideo",
        "init_args": {**SIZE, "clusters": [1, 2, 2], "decoder_width": 12, "decoder_heads": 1},
    },
    "blocks": {"class_path": "VIMPAC", "init_args": {**SIZE, "head_width": 8}},
    "tubes": {"class_path": "VideoMAE", "init_args": {**SIZE, "ratio": 0.5, "decoder_width": 12, "decoder_heads": 1}},
}


def entries(folder: Path, *names: str) -> list[str]:
    """Write entries into a folder, and return their flags."""
    for name in names:
        settings = {"batch_size": 4, "warmup": 1, "precision": "fp32", "objective": ENTRIES[name]}
        (folder / f"{name}.yaml").write_text(json.dumps(settings))
    return ["--entries", *(str(folder / f"{name}.yaml") for name in names)]


def flags_of(folder: Path, cache: Path) -> list[str]:
    """Flags of a comparison of two objectives with two seeds, with its entries and its result in a folder."""
    settings = ["--seeds", "2", "--points", "2", "--budget", "clips", "--amount", "23", "--out", str(folder / "out")]
    return [*entries(folder, "order", "blocks"), "--cache", str(cache), *settings]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory, make_cache: MakeCache) -> Path:
    # With an official split, the attentive probes have one fold, which saves a minute.
    videos = [
        Video(f"{i % 2}/{i:03d}.mp4", 100 + i, label=str(i % 2), split="train" if i % 3 else "test") for i in range(24)
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tests.helpers.cache_contents.some_cuts", equal_cuts)
        return make_cache(tmp_path_factory.mktemp("cache"), videos, codes_shape=(2, 4, 4), keep_pixels="raw")


@pytest.fixture(scope="module")
def finished(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a finished comparison, started by its command, with the last line of stdout in summary.json, and stderr."""
    folder = tmp_path_factory.mktemp("comparison")
    result = start(folder, "compare", *flags_of(folder, cache), launch=[sys.executable])
    (folder / "summary.json").write_text(json.dumps(last_line(result)))
    (folder / "stderr").write_text(result.stderr)
    return folder


def copied(finished: Path, cache: Path, folder: Path) -> tuple[Path, list[str]]:
    """Copy the finished comparison into another folder, and return its result folder and the flags that resume it."""
    out = shutil.copytree(finished / "out", folder / "out")
    (out / "config.yaml").write_text((out / "config.yaml").read_text().replace(str(finished), str(folder)))
    return out, flags_of(folder, cache)


def test_every_entry_has_the_budget_and_all_results(finished: Path) -> None:
    summary = read_json(finished / "summary.json")
    facts = [summary[key] for key in ("seeds", "classes", "labelled", "budget")]
    assert facts == [2, 2, 24, "23 clips"]
    assert [row["entry"] for row in summary["table"]] == ["order", "blocks"]
    for row in summary["table"]:
        assert (row["steps"], row["clips"]) == (6, 24), "batches of 4 clips"
        assert [point["step"] for point in row["curve"]] == [0, 3, 6]
        assert row["curve"][-1]["mean"] == row["linear"]["mean"]
        assert row["curve"][0]["mean"] == row["untrained_linear"]["mean"]
        assert {probe: len(layers) for probe, layers in row["layers"].items()} == dict.fromkeys(PROBES, 2)
        assert all(0 <= row[probe]["mean"] <= 1 and row[probe]["stderr"] >= 0 for probe in PROBES)
        assert row["clips_per_second"]["mean"] > 0 and row["peak_memory"] > 2**20
        gain = row["linear"]["mean"] - row["untrained_linear"]["mean"]
        assert row["gain"]["linear"]["mean"] == pytest.approx(gain, abs=2e-4)
    for probe, lead in summary["leads"].items():
        order = sorted(summary["table"], key=lambda row: -row[probe]["mean"])
        assert (lead["best"], lead["second"]) == tuple(row["entry"] for row in order)
        assert lead["mean"] == pytest.approx(order[0][probe]["mean"] - order[1][probe]["mean"], abs=2e-4)


def test_the_page_names_entries_budget_seeds_and_clips(finished: Path) -> None:
    page = (finished / "out" / "index.html").read_text()
    for text in ("order", "blocks", "23 clips", "2 seeds", "24 labelled", "attentive", "clips/s", "most common class"):
        assert text in page, text
    assert "{{" not in page


def test_a_warning_of_training_is_said_once_and_is_on_the_page(finished: Path, cache: Path) -> None:
    """All views of a video are equal, which matters for the contrast of `blocks` only."""
    summary = read_json(finished / "summary.json")
    ((note, concerned),) = summary["notes"].items()
    with torch.device("meta"):
        objectives = [VIMPAC(code_spec(TokenCache.open(cache)), contrast=contrast) for contrast in (1.0, 0.0)]
    assert [warnings_of(objective, TokenCache.open(cache)) for objective in objectives] == [[note], []]
    assert concerned == ["blocks"]
    lines = (finished / "stderr").read_text().splitlines()
    (said,) = [number for number, line in enumerate(lines) if note in line]
    assert (
        "blocks" in lines[said] and said < [number for number, line in enumerate(lines) if "training runs" in line][0]
    )
    assert f"{note}:</b> blocks" in (finished / "out" / "index.html").read_text()


def test_the_clips_of_an_official_split_were_not_in_pretraining(finished: Path) -> None:
    assert read_json(finished / "summary.json")["in_pretraining"] == 0
    assert "none of them was in pre-training" in (finished / "out" / "index.html").read_text()


def test_a_resumed_comparison_computes_only_missing_results(
    finished: Path, cache: Path, tmp_path: Path, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, flags = copied(finished, cache, tmp_path)
    before = read_json(out / "summary.json")
    (out / "summary.json").unlink()
    (out / "runs" / "blocks-seed1" / "probe-model.json").unlink()
    probed: list[Any] = []
    run_in_parallel = compare.run_in_parallel

    def recorded(work: Any, calls: Any, *more: Any) -> None:
        probed.extend(calls)
        run_in_parallel(work, calls, *more)

    monkeypatch.setattr(compare, "run_in_parallel", recorded)
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: pytest.fail("a training run was started again"))
    again = call("compare", *flags)
    assert len(probed) == 1
    assert [row["linear"] for row in again["table"]] == [row["linear"] for row in before["table"]]
    call("compare", *flags)
    assert "nothing is left to do" in call.err


def test_a_model_that_a_probe_process_cannot_read_ends_a_comparison_with_one_line(
    finished: Path, cache: Path, tmp_path: Path, call: Call
) -> None:
    out, flags = copied(finished, cache, tmp_path)
    (out / "summary.json").unlink()
    (out / "runs" / "blocks-seed1" / "probe-model.json").unlink()
    (out / "runs" / "blocks-seed1" / "model" / "model.safetensors").write_bytes(b"torn")
    assert "blocks-seed1/model: " in call("compare", *flags)


def test_a_comparison_is_not_resumed_with_changed_entries(
    finished: Path, cache: Path, tmp_path: Path, call: Call
) -> None:
    _, flags = copied(finished, cache, tmp_path)
    assert call("compare", *flags)["seeds"] == 2
    settings = read_json(tmp_path / "order.yaml")
    (tmp_path / "order.yaml").write_text(json.dumps({**settings, "lr": 0.01}))
    assert "--out" in call("compare", *flags)


def test_seeds_folders_and_steps_of_an_entry_are_ignored(cache: Path, tmp_path: Path, call: Call) -> None:
    """The config.yaml of a finished run can be an entry."""
    flags = entries(tmp_path, "order")
    ignored = {"seed": 3, "out": str(tmp_path / "elsewhere"), "cache": "nowhere", "steps": 77, "plan": True}
    settings = {**read_json(tmp_path / "order.yaml"), **ignored, "validate_every": 1}
    (tmp_path / "order.yaml").write_text(json.dumps(settings))
    flags += ["--cache", str(cache), "--seeds", "2", "--points", "1", "--amount", "4", "--out", str(tmp_path / "out")]
    (row,) = call("compare", *flags)["table"]
    assert (row["steps"], [point["step"] for point in row["curve"]]) == (4, [0, 4])
    runs = [tmp_path / "out" / "runs" / f"order-seed{seed}" / "model" / "model.safetensors" for seed in (0, 1)]
    assert runs[0].read_bytes() != runs[1].read_bytes() and not (tmp_path / "elsewhere").exists()
    assert "2 seeds" in (tmp_path / "out" / "index.html").read_text(), "a page of one entry has errors too"


def test_a_contrastive_loss_on_batches_of_one_video_is_refused_before_training(
    cache: Path, tmp_path: Path, call: Call
) -> None:
    flags = entries(tmp_path, "blocks")
    settings = read_json(tmp_path / "blocks.yaml")
    (tmp_path / "blocks.yaml").write_text(json.dumps({**settings, "batch_size": 4, "accumulate": 4}))
    line = call("compare", *flags, "--cache", str(cache), "--out", str(tmp_path / "out"))
    assert "blocks.yaml: VIMPAC" in line and "batch_size / accumulate must be at least 2" in line


def test_a_budget_of_seconds_is_converted_to_steps_by_a_short_training_run(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def timed(jobs: Any, *_: Any) -> None:
        for job in jobs:
            job.out.mkdir(parents=True)
            seconds_per_step = {"order": 0.5, "blocks": 2.0}[job.name]
            lines = [{"step": step, "loss": 1.0, "seconds": 30 + seconds_per_step * step} for step in (10, 20, 40)]
            (job.out / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    monkeypatch.setattr(compare, "train", timed)
    config = compare.Compare(entries=entries(tmp_path, "order", "blocks")[1:], budget="seconds", amount=60)
    opened = TokenCache.open(str(cache))
    named = {name: Entry(Pretrain(), "", opened, "") for name in ("order", "blocks")}
    steps = compare._steps(config, tmp_path, named, None)  # type: ignore[arg-type]
    assert steps == {"order": 120, "blocks": 30}
    monkeypatch.setattr(compare, "train", lambda *_: pytest.fail("timed again"))
    assert compare._steps(config, tmp_path, named, None) == steps  # type: ignore[arg-type]


def test_entries_with_caches_of_their_own_compare_tokenizers(tmp_path: Path, make_cache: MakeCache, call: Call) -> None:
    """One code and two codes per place, of the same videos."""
    videos = [Video(f"{i:03d}.mp4", 100 + i, label=str(i % 2), split="train" if i % 3 else "test") for i in range(12)]
    layouts = {"one": {}, "two": {"codes_per_place": 2}}
    files = []
    for name, layout in layouts.items():
        cache = make_cache(tmp_path, videos, name=name, codes_shape=(2, 4, 4), keep_pixels="raw", **layout)
        settings = {
            "batch_size": 4,
            "warmup": 1,
            "precision": "fp32",
            "objective": ENTRIES["order"],
            "cache": str(cache),
        }
        files.append(tmp_path / f"{name}.yaml")
        files[-1].write_text(json.dumps(settings))
    flags = ["--seeds", "1", "--points", "1", "--amount", "2", "--out", str(tmp_path / "out")]
    summary = call("compare", "--entries", *map(str, files), *flags)
    assert [row["cache"].rpartition("-")[0] for row in summary["table"]] == ["one", "two"]
    heads = [read_settings(tmp_path / "out" / "runs" / f"{name}-seed0" / "config.yaml")["cache"] for name in layouts]
    assert len(set(heads)) == 2
    assert len(bits_by_conditioning(summary["table"])) == 2, "bits of different tokenizers are not comparable"
    other = make_cache(tmp_path, videos[:-1], name="other", codes_shape=(2, 4, 4), keep_pixels="raw")
    files[1].write_text(json.dumps({**read_json(files[1]), "cache": str(other)}))
    assert "other videos or labels" in call("compare", "--entries", *map(str, files), *flags)


@pytest.mark.parametrize(
    "objective, change, part",
    [
        ("tubes", {"keep_pixels": "none"}, "--keep_pixels"),
        ("blocks", {"views": 1}, "--clip.views 2"),
        ("order", {"codes_shape": (2, 3, 3)}, "1x2x2"),
    ],
)
def test_a_cache_that_does_not_fit_an_entry_is_refused_before_training(
    tmp_path: Path, make_cache: MakeCache, call: Call, objective: str, change: dict[str, Any], part: str
) -> None:
    folder = make_cache(tmp_path / "caches", videos=8, **{"codes_shape": (2, 4, 4), "keep_pixels": "raw", **change})
    line = call("compare", *entries(tmp_path, objective), "--cache", str(folder), "--out", str(tmp_path / "out"))
    assert f"{objective}.yaml" in line and part in line
    assert not (tmp_path / "out").exists()


def test_missing_invalid_and_equally_named_entries_are_refused(tmp_path: Path, cache: Path, call: Call) -> None:
    def refused(*files: Path) -> str:
        return call("compare", "--entries", *map(str, files), "--cache", str(cache))

    assert "gone.yaml" in refused(tmp_path / "gone.yaml")
    (tmp_path / "wrong.yaml").write_text("stepps: 3")
    line = refused(tmp_path / "wrong.yaml")
    assert "wrong.yaml: error: " in line and "stepps" in line
    (tmp_path / "inside.yaml").write_text("objective:\n  class_path: ARVideo\n  init_args: {keep: much}")
    assert "inside.yaml: error: keep: " in refused(tmp_path / "inside.yaml")
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        entries(tmp_path / folder, "order")
    assert "'order'" in refused(tmp_path / "a" / "order.yaml", tmp_path / "b" / "order.yaml")
