"""Features of videos and of their codes are equal, windows have their times, damage is named, and a stopped run continues."""

import csv
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data.clip_spec import ClipSpec
from data.clips import ClipCuts, iter_clips
from data.sources import load_source
from pipelines.inference import load_model
from pipelines.inference.feature_files import FeatureFolder
from tests.helpers.commands import TINY_MODEL, Call
from tests.helpers.videos import moving_square

STEPS = ["--steps", "1", *TINY_MODEL[2:], "--validate_every", "1", "--save_every", "1"]
CLIP = ["--clip.frames", "4", "--clip.size", "32", "--clip.stride", "2"]


@pytest.fixture
def project(call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, video_folder: Path) -> Path:
    """Folder with `videos` (20 frames at 10 per second, one damaged file), `run`, and caches of drawn and of dense views."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(video_folder, tmp_path / "videos")
    (tmp_path / "videos/left/damaged.mp4").write_bytes((video_folder / "left/clip 0.mp4").read_bytes()[:1500])
    tokenize = ["tokenize", "--videos", "videos", *CLIP, "--workers", "0"]
    call(
        *tokenize, "--tokenizer", "linear-2x8x8-2x15", "--clip.views", "2", "--out", "drawn", "--caches", "drawn caches"
    )
    tokenizer = json.loads((tmp_path / "drawn/summary.json").read_text())["tokenizer"]
    call(*tokenize, "--tokenizer", tokenizer, "--clip.views", "dense", "--caches", "dense caches")
    call("pretrain_ar", *STEPS, "--caches", "drawn caches", "--objective.clusters", "[1,2,2]", "--out", "run")
    return tmp_path


def extracted(folder: str) -> tuple[np.ndarray, list[Any]]:
    parts = list(FeatureFolder(Path(folder)).read())
    return np.concatenate([features_N for features_N, _ in parts]), [row for _, rows in parts for row in rows]


@pytest.mark.parametrize("windows", ["middle", "dense"])
@pytest.mark.parametrize("pool, shape", [("clip", (24,)), ("slices", (2, 24)), ("none", (32, 24))])
def test_features_of_videos_and_of_their_codes_are_equal(
    call: Call, project: Path, windows: str, pool: str, shape: tuple[int, ...]
) -> None:
    flags = ["--run", "run", "--windows", windows, "--pool", pool, "--precision", "fp32", "--shard_size", "4"]
    summary = call("extract_features", *flags, "--videos", "videos", "--workers", "1", "--out", "of videos")
    assert (summary["videos"], summary["skipped"], summary["width"]) == (6, 1, 24)
    assert summary["damaged"][0]["path"] == "left/damaged.mp4" and "skipped left/damaged.mp4: " in call.err
    assert summary["windows"] == {"middle": 6, "dense": 6 * 3}[windows]
    assert summary["source"] == str(project / "videos") and summary["clip"]["stride"] == 2
    caches = "drawn caches" if windows == "middle" else "dense caches"
    (cache,) = Path(caches).iterdir()
    of_codes = call("extract_features", *flags, "--cache", str(cache), "--out", "of codes")
    assert (of_codes["source"], of_codes["cache"], of_codes["clip"]["stride"]) == (None, str(project / cache), 2)
    (features_N, rows), (of_codes_N, rows_of_codes) = extracted("of videos"), extracted("of codes")
    assert [row.view for row in rows[:3]] == [0, 1, 2] if windows == "dense" else {row.view for row in rows} == {0}
    assert rows == rows_of_codes and features_N.shape == (summary["windows"], *shape)
    assert np.array_equal(features_N, of_codes_N)


def test_windows_have_their_times_and_the_index_lists_them(call: Call, project: Path) -> None:
    call("extract_features", "--run", "run", "--videos", "videos", "--windows", "dense", "--out", "dense")
    _, rows = extracted("dense")
    # 20 frames at 10 frames per second: every clip of four frames has stride 2, and the last one is padded.
    assert [(row.start, row.end) for row in rows[:3]] == [(0.0, 0.8), (0.8, 1.6), (1.6, 2.0)]
    with open("dense/index.csv", newline="") as file:
        index = list(csv.DictReader(file))
    assert [row["path"] for row in index] == [row.path for row in rows]
    assert index[1] | {} == {
        "shard": "000000.npz",
        "row": "1",
        "path": "left/clip 0.mp4",
        "label": "left",
        "group": "",
        "split": "",
        "view": "1",
        "start": "0.8",
        "end": "1.6",
    }
    call("extract_features", "--run", "run", "--videos", "videos", "--out", "middle")
    _, rows = extracted("middle")
    source = load_source("videos")
    *_, cuts = iter_clips(source, source.videos[0], ClipSpec(frames=4, size=32, stride=2))
    assert isinstance(cuts, ClipCuts)
    assert rows[0].start == cuts.views[0].start / 10 and rows[0].end == (cuts.views[0].start + 8) / 10


def test_windows_of_parts_have_the_times_of_the_video(call: Call, project: Path) -> None:
    Path("videos/list.csv").write_text("path,label,start,end\nleft/clip 0.mp4,a,0.5,1.5\nleft/clip 0.mp4,b,1.5,\n")
    tokenizer = json.loads(Path("drawn/summary.json").read_text())["tokenizer"]
    cache = call("tokenize", "--videos", "videos/list.csv", "--tokenizer", tokenizer, *CLIP, "--workers", "0")["cache"]
    for source in (["--videos", "videos/list.csv"], ["--cache", cache]):
        call("extract_features", "--run", "run", *source, "--out", f"parts {source[0]}")
    features_N, rows = extracted("parts --videos")
    # Ten frames and five frames: a clip spans seven, from the second frame and from the first one.
    assert [(row.label, row.start, row.end) for row in rows] == [("a", 0.6, 1.4), ("b", 1.5, 2.0)]
    of_codes_N, rows_of_codes = extracted("parts --cache")
    assert np.array_equal(features_N, of_codes_N) and rows == rows_of_codes


def test_a_layer_is_that_of_the_model(call: Call, project: Path) -> None:
    call(
        "extract_features",
        "--run",
        "run",
        "--videos",
        "videos",
        "--layer",
        "1",
        "--precision",
        "fp32",
        "--out",
        "first",
    )
    features_N, rows = extracted("first")
    expected = load_model("run").features(f"videos/{rows[2].path}").pooled[0]
    assert torch.allclose(torch.from_numpy(features_N[2]), expected, atol=1e-5)
    call(
        "extract_features", "--run", "run", "--videos", "videos", "--layer", "2", "--precision", "fp32", "--out", "last"
    )
    call("extract_features", "--run", "run", "--videos", "videos", "--precision", "fp32", "--out", "default")
    assert np.array_equal(extracted("last")[0], extracted("default")[0])
    assert not np.array_equal(extracted("last")[0], features_N)


def test_a_stopped_run_makes_only_the_missing_shards(
    call: Call, project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = ["--run", "run", "--videos", "videos", "--shard_size", "2"]
    call("extract_features", *flags, "--out", "whole")
    shutil.copytree("whole", "stopped")
    for name in ("summary.json", "index.csv", "shards/000001.json", "shards/000003.npz", "shards/000003.json"):
        Path("stopped", name).unlink()
    written: list[int] = []
    write = FeatureFolder.write
    monkeypatch.setattr(FeatureFolder, "write", lambda self, n, *rest: (written.append(n), write(self, n, *rest))[1])
    call("extract_features", *flags, "--out", "stopped")
    assert written == [1, 3]
    for file in Path("whole").rglob("*.npz"):
        assert file.read_bytes() == Path("stopped", file.relative_to("whole")).read_bytes()
    assert Path("whole/index.csv").read_text() == Path("stopped/index.csv").read_text()
    assert call("extract_features", *flags, "--out", "stopped") == call("extract_features", *flags, "--out", "stopped")
    assert written == [1, 3]


def test_new_videos_are_another_run(call: Call, project: Path, make_video: Callable[..., Path]) -> None:
    first = call("extract_features", "--run", "run", "--videos", "videos")["out"]
    make_video(project / "videos/left/new.mp4", moving_square(-1, 5))
    assert call("extract_features", "--run", "run", "--videos", "videos")["out"] != first


MISTAKES = [
    ("--layer 3 --videos videos", "layer must be from 1 to 2 for run, got 3"),
    ("--layer 0 --videos videos", "layer must be at least 1, got 0"),
    ("--videos videos --cache c", "videos videos and cache c exclude each other"),
    ("--videos absent", "absent: no such folder or list file"),
    ("--windows dense", "views of .*drawn caches.* are not dense; give --videos"),
    ("--run absent", "absent: holds no pre-trained model"),
    ("--run videos", "videos: holds no pre-trained model"),
    ("--videos videos --tokenizer absent", "the tokenizer of run/model does not load"),
    ("--videos damaged", "damaged: none of the 1 videos can be used"),
]


def test_mistakes_are_one_line(call: Call, project: Path) -> None:
    Path("damaged").mkdir()
    shutil.copy("videos/left/damaged.mp4", "damaged")
    for flags, message in MISTAKES:
        words = flags.split()
        error = call("extract_features", *([] if "--run" in words else ["--run", "run"]), *words, "--out", "refused")
        assert re.search(message, error), (flags, error)
        shutil.rmtree("refused", ignore_errors=True)


def test_the_cache_of_another_tokenizer_is_refused(call: Call, project: Path) -> None:
    other = ["--tokenizer", "linear-2x8x8-2x8", *CLIP, "--caches", "others", "--workers", "0"]
    cache = call("tokenize", "--videos", "videos", *other)["cache"]
    assert "was made by another tokenizer" in call("extract_features", "--run", "run", "--cache", cache)
