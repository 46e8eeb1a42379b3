"""A comparison trains every objective alike, probes every model once, goes on where it stopped, and says so on a page."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from data.cache import TokenCache
from pipelines.commands import compare
from pipelines.engine.run import read_json
from pipelines.reporting.comparison_page import _caveats, _lead
from tests.helpers.caches import MakeCache
from tests.helpers.commands import ENVIRONMENT, Call

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
    for name in names:
        settings = {"batch_size": 4, "warmup": 1, "precision": "fp32", "objective": ENTRIES[name]}
        (folder / f"{name}.yaml").write_text(json.dumps(settings))
    return ["--entries", *(str(folder / f"{name}.yaml") for name in names)]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory, make_cache: MakeCache) -> Path:
    return make_cache(tmp_path_factory.mktemp("compared"), videos=24, codes_shape=(2, 4, 4), keep_pixels="raw")


@pytest.fixture(scope="module")
def finished(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A comparison of two objectives with two seeds, by the command as users start it."""
    folder = tmp_path_factory.mktemp("comparison")
    script = Path(compare.__file__)
    command = [sys.executable, str(script), *flags_of(folder, cache)]
    result = subprocess.run(command, cwd=folder, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-2000:]
    (folder / "said.json").write_text(result.stdout.splitlines()[-1])
    return folder


def copied(finished: Path, cache: Path, folder: Path) -> tuple[Path, list[str]]:
    """The finished comparison in another folder, and the flags that go on with it there."""
    out = shutil.copytree(finished / "out", folder / "out")
    (out / "config.yaml").write_text((out / "config.yaml").read_text().replace(str(finished), str(folder)))
    return out, flags_of(folder, cache)


def flags_of(folder: Path, cache: Path) -> list[str]:
    settings = ["--seeds", "2", "--points", "2", "--budget", "clips", "--amount", "23", "--out", str(folder / "out")]
    return [*entries(folder, "order", "blocks"), "--cache", str(cache), *settings]


def test_every_entry_has_the_budget_and_every_number(finished: Path) -> None:
    said = read_json(finished / "said.json")
    assert (said["seeds"], said["classes"], said["labelled"], said["budget"]) == (2, 2, 24, "23 clips")
    assert [row["entry"] for row in said["table"]] == ["order", "blocks"]
    for row in said["table"]:
        assert (row["steps"], row["clips"]) == (6, 24)  # of 4 clips each
        assert [point["step"] for point in row["curve"]] == [0, 3, 6]
        assert row["curve"][-1]["mean"] == row["linear"]["mean"]
        assert row["curve"][0]["mean"] == row["untrained_linear"]["mean"]
        assert {probe: len(layers) for probe, layers in row["layers"].items()} == dict.fromkeys(compare.PROBES, 2)
        assert all(0 <= row[probe]["mean"] <= 1 and row[probe]["stderr"] >= 0 for probe in compare.PROBES)
        assert row["clips_per_second"]["mean"] > 0 and row["peak_memory"] > 2**20


def test_the_page_names_what_was_compared_and_how(finished: Path) -> None:
    page = (finished / "out" / "index.html").read_text()
    for text in ("order", "blocks", "23 clips", "2 seeds", "24 labelled", "attentive", "clips/s", "most common class"):
        assert text in page, text
    assert "{{" not in page


def test_only_what_is_missing_is_done_again(
    finished: Path, cache: Path, tmp_path: Path, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, flags = copied(finished, cache, tmp_path)
    before = read_json(out / "summary.json")
    (out / "summary.json").unlink()
    (out / "runs" / "blocks-seed1" / "probe-model.json").unlink()
    probed: list[Any] = []
    probe = compare.side_by_side
    monkeypatch.setattr(compare, "side_by_side", lambda work, calls, *a: probed.extend(calls) or probe(work, calls, *a))
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: pytest.fail("a training was started again"))
    again = call("compare", *flags)
    assert len(probed) == 1
    assert [row["linear"] for row in again["table"]] == [row["linear"] for row in before["table"]]
    call("compare", *flags)
    assert "nothing is left to do" in call.err


def test_a_model_that_cannot_be_read_ends_a_comparison_with_one_line(
    finished: Path, cache: Path, tmp_path: Path, call: Call
) -> None:
    """Said by a process of its own."""
    out, flags = copied(finished, cache, tmp_path)
    (out / "summary.json").unlink()
    (out / "runs" / "blocks-seed1" / "probe-model.json").unlink()
    (out / "runs" / "blocks-seed1" / "model" / "model.safetensors").write_bytes(b"torn")
    assert "blocks-seed1/model: holds no pre-trained model that can be read" in call("compare", *flags)


def test_entries_that_were_changed_are_not_mixed_with_what_is_there(
    finished: Path, cache: Path, tmp_path: Path, call: Call
) -> None:
    out, flags = copied(finished, cache, tmp_path)
    assert call("compare", *flags)["seeds"] == 2
    settings = read_json(tmp_path / "order.yaml")
    (tmp_path / "order.yaml").write_text(json.dumps({**settings, "lr": 0.01}))
    assert "other entries; choose another --out" in call("compare", *flags)


def test_an_entry_has_no_say_in_seeds_folders_and_lengths(cache: Path, tmp_path: Path, call: Call) -> None:
    """A finished run's own config.yaml can be an entry."""
    flags = entries(tmp_path, "order")
    settings = read_json(tmp_path / "order.yaml")
    own = {
        "seed": 3,
        "out": str(tmp_path / "elsewhere"),
        "cache": "nowhere",
        "steps": 77,
        "plan": True,
        "validate_every": 1,
    }
    (tmp_path / "order.yaml").write_text(json.dumps({**settings, **own}))
    flags += ["--cache", str(cache), "--seeds", "2", "--points", "1", "--amount", "4", "--out", str(tmp_path / "out")]
    (row,) = call("compare", *flags)["table"]
    assert (row["steps"], [point["step"] for point in row["curve"]]) == (4, [0, 4])
    runs = [tmp_path / "out" / "runs" / f"order-seed{seed}" / "model" / "model.safetensors" for seed in (0, 1)]
    assert runs[0].read_bytes() != runs[1].read_bytes() and not (tmp_path / "elsewhere").exists()
    page = (tmp_path / "out" / "index.html").read_text()
    assert "Errors (±) are of 2 seeds" in page


def test_one_seed_says_nothing_of_differences() -> None:
    best, other = _of("a", 0.5, 0.3, error=None), _of("b", 0.4, 0.3, error=None)
    said = _lead(best, [other], {"seeds": 1, "n": 100})
    assert "one seed" in said and "± 0.000" not in said and "ahead" not in said and "seeds" not in said


def test_a_lead_is_held_against_the_errors_of_both() -> None:
    leads = [
        _lead(_of("a", 0.5, 0.3, error=error), [_of("b", 0.48, 0.3, error=error)], {"seeds": 5, "n": 60000})
        for error in (0.01, 0.03)
    ]
    assert ["not more" in lead for lead in leads] == [False, True]


def test_a_lead_within_the_error_of_drawing_clips_is_said_to_be() -> None:
    leads = [_lead(_of("a", 0.5, 0.3), [_of("b", 0.47, 0.3)], {"seeds": 5, "n": n}) for n in (60, 6000)]
    assert ["larger than the lead" in lead for lead in leads] == [True, False]


def test_what_takes_from_the_figures_is_said_on_the_page() -> None:
    summary = {
        "one_frame": {"mean": 0.41},
        "motion_energy": {"mean": 0.2},
        "budget": "60 seconds",
        "chance": 0.2,
        "seeds": 5,
    }
    rows = [_of("a", 0.5, 0.3), _of("b", 0.4, 0.97, seconds=80, warmup=50, knn=0.05), _of("c", 0.5, 0.48, error=0.03)]
    said = _caveats(rows, summary)
    for what in (
        "own untrained network by more than one standard error:</b> b (0.970), c (0.480)",
        "No better than one frame, 16x16 colours, without a network (0.410):</b> b<",
        "short training foretold the steps:</b> b (80)",
        "larger budget would say more:</b> b (50 of 90 steps)",
        "name such groups:</b> b (0.050)",
    ):
        assert what in said, what
    assert _caveats(rows[:1], summary) == ""


def _of(
    entry: str,
    mean: float,
    untrained: float,
    *,
    error: float | None = 0.0,
    seconds: float = 60,
    warmup: int = 10,
    knn: float = 0.3,
) -> dict[str, Any]:
    return {
        "entry": entry,
        "attentive": {"mean": mean, "stderr": error},
        "untrained_attentive": {"mean": untrained, "stderr": error},
        "knn": {"mean": knn},
        "seconds": {"mean": seconds},
        "warmup": warmup,
        "steps": 90,
    }


def test_a_contrast_without_other_videos_is_refused_before_anything_is_trained(
    cache: Path, tmp_path: Path, call: Call
) -> None:
    flags = entries(tmp_path, "blocks")
    settings = read_json(tmp_path / "blocks.yaml")
    (tmp_path / "blocks.yaml").write_text(json.dumps({**settings, "batch_size": 4, "accumulate": 4}))
    line = call("compare", *flags, "--cache", str(cache), "--out", str(tmp_path / "out"))
    assert (
        "blocks.yaml: VIMPAC tells clips of different videos apart: batch_size / accumulate must be at least 2" in line
    )


def test_time_becomes_steps_by_a_short_training(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def timed(jobs: Any, *_: Any) -> None:
        for job in jobs:
            job.out.mkdir(parents=True)
            pace = {"order": 0.5, "blocks": 2.0}[job.name]
            lines = [{"step": step, "loss": 1.0, "seconds": 30 + pace * step} for step in (10, 20, 40)]
            (job.out / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    monkeypatch.setattr(compare, "train", timed)
    files = entries(tmp_path, "order", "blocks")[1:]
    config = compare.Compare(entries=files, budget="seconds", amount=60)
    opened = TokenCache.open(str(cache))
    found = compare._steps(config, tmp_path, opened, {}, None)  # type: ignore[arg-type]
    assert found == {"order": 120, "blocks": 30}
    monkeypatch.setattr(compare, "train", lambda *_: pytest.fail("timed again"))
    assert compare._steps(config, tmp_path, opened, {}, None) == found  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "objective, made, said",
    [
        ("tubes", {"keep_pixels": "none"}, "--keep_pixels"),
        ("blocks", {"views": 1}, "--clip.views 2"),
        ("order", {"codes_shape": (2, 3, 3)}, "do not divide the grid"),
    ],
)
def test_a_cache_that_an_entry_cannot_use_is_refused_before_anything_is_trained(
    tmp_path: Path, make_cache: MakeCache, call: Call, objective: str, made: dict[str, Any], said: str
) -> None:
    folder = make_cache(tmp_path / "caches", videos=8, **{"codes_shape": (2, 4, 4), "keep_pixels": "raw", **made})
    line = call("compare", *entries(tmp_path, objective), "--cache", str(folder), "--out", str(tmp_path / "out"))
    assert f"{objective}.yaml" in line and said in line
    assert not (tmp_path / "out").exists()


def test_entries_that_are_not_there_or_have_one_name_are_refused(tmp_path: Path, cache: Path, call: Call) -> None:
    assert "gone.yaml is no file" in call("compare", "--entries", str(tmp_path / "gone.yaml"), "--cache", str(cache))
    (tmp_path / "wrong.yaml").write_text("stepps: 3")
    line = call("compare", "--entries", str(tmp_path / "wrong.yaml"), "--cache", str(cache))
    assert "wrong.yaml: error: " in line and "stepps" in line
    (tmp_path / "inside.yaml").write_text("objective:\n  class_path: ARVideo\n  init_args: {keep: much}")
    assert "inside.yaml: error: keep: must be" in call(
        "compare", "--entries", str(tmp_path / "inside.yaml"), "--cache", str(cache)
    )
    first, second = tmp_path / "a", tmp_path / "b"
    first.mkdir(), second.mkdir()
    flags = entries(first, "order") + entries(second, "order")[1:]
    assert "different file names" in call("compare", *flags, "--cache", str(cache))
