"""A search lists the nearest videos with moving pictures, and every mistake is one line."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from pipelines.engine.run_list import list_runs
from pipelines.reporting import search_page
from tests.helpers.commands import TINY_MODEL, Call
from tests.helpers.features import at_angles, window, write_features

ANGLES = (120, 250, 0, 10, 130, 240)
"""Corners of two regular triangles, whose angles standardisation does not change."""
LABELS = ("one", "two", "one", "two", "two", None)


def digits(folder: Path, **summary: Any) -> Path:
    """Write features of five windows of built-in videos, two of the first one, and of a video that is gone."""
    paths = ["train/000000", "train/000000", "train/000001", "train/000002", "train/000003", "gone"]
    views = [0, 1, 0, 0, 0, 0]
    rows = [window(path, label, view=view) for path, label, view in zip(paths, LABELS, views, strict=True)]
    return write_features(folder, at_angles(*ANGLES), rows, **summary).folder


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_row_has_its_nearest_videos_as_json_and_on_a_page(call: Call, work: Path) -> None:
    digits(work / "features")
    found = call("search", "--features", "features", "--query", "2")
    assert found["query"] == {"path": "train/000001", "label": "one", "start": 0.0, "end": 2.0, "row": 2}
    assert [near["path"] for near in found["nearest"]] == ["train/000002", "train/000000", "gone", "train/000003"]
    assert found["nearest"][0].keys() == {"path", "label", "start", "end", "similarity"}
    cosines = np.cos(np.deg2rad([10, 110, 120, 130]))
    assert np.allclose([near["similarity"] for near in found["nearest"]], cosines, atol=1e-4)
    assert found["nearest"][1]["start"] == 2.0, "the nearer one of two windows"
    # The label of the first window of train/000000 counts for the video.
    assert (found["queries"], found["recall"].keys(), found["groups"]) == (5, {"1", "5", "10"}, False)
    page = Path(found["page"]).read_text()
    assert Path(found["page"]).parent.parent == Path("runs") and Path(found["page"]).name == "search.html"
    for near in found["nearest"]:
        assert near["path"] in page and f"{near['similarity']:.3f}" in page
    assert page.count("data:image/webp;base64,") == 4 and "gone has disappeared" in page
    assert f"{found['map']:.3f}" in page and found["protocol"][1:] in page
    # The second search reads the stored evaluation.
    again = Path(call("search", "--features", "features", "--query", "1")["page"]).read_text()
    assert all(text.index("recall at 5<") < text.index("recall at 10<") for text in (page, again))
    entry, _ = sorted(list_runs(Path("runs")), key=lambda entry: entry.what != "2")
    assert (entry.command, entry.what, entry.state) == ("search", "2", "finished")
    assert "4 nearest" in entry.numbers and f"{found['recall']['1']:.3f}" in entry.numbers
    assert call("search", "--features", "features", "--query", "2") == found


def test_the_path_of_a_video_is_its_first_window(call: Call, work: Path) -> None:
    digits(work / "features")
    found = call("search", "--query", "train/000000", "--features", "features", "--k", "1", "--out", "here")
    assert found["query"]["row"] == 0 and found["page"] == "here/search.html"
    assert [near["path"] for near in found["nearest"]] == ["train/000003"]


def test_pictures_end_at_a_size_of_the_page(call: Call, work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    digits(work / "features")
    monkeypatch.setattr(search_page, "PICTURE_BYTES", 1)
    page = Path(call("search", "--features", "features", "--query", "2")["page"]).read_text()
    assert page.count("data:image/webp;base64,") == 1 and page.count("train/00000") >= 4


def test_videos_that_are_gone_leave_a_note(call: Call, work: Path) -> None:
    digits(work / "features", source="/absent/videos")
    found = call("search", "--features", "features", "--query", "0")
    page = Path(found["page"]).read_text()
    assert len(found["nearest"]) == 4 and "data:image" not in page and "/absent/videos" in page


def test_videos_without_labels_have_no_recall(call: Call, work: Path) -> None:
    write_features(work / "features", at_angles(0, 10), [window("train/000000"), window("train/000001")])
    found = call("search", "--features", "features", "--query", "0")
    assert (found["recall"], found["map"], found["queries"]) == (None, None, 0)
    assert "no labels" in Path(found["page"]).read_text()


def test_groups_are_stated(call: Call, work: Path) -> None:
    rows = [window(f"train/00000{i}", label, group) for i, (label, group) in enumerate(["ag", "ag", "ah", "bh"])]
    write_features(work / "features", at_angles(0, 10, 90, 120), rows)
    found = call("search", "--features", "features", "--query", "0")
    # The nearest videos may be of the group of the query.
    assert found["groups"] and found["nearest"][0]["path"] == "train/000001"
    assert (found["queries"], found["single"], found["recall"]["5"]) == (3, 1, 1.0)
    notes = [note for note in found["notes"] if "group" in note]
    assert len(notes) == 2 and all(note[1:] in Path(found["page"]).read_text() for note in notes)


MISTAKES = [
    ("--features features --query 6", "query 6: must be a row of features, from 0 to 5"),
    ("--features features --query absent.mp4", "absent.mp4: is neither a video in the index of features, nor a row"),
    ("--features features --query 0 --k 0", "k must be at least 1, got 0"),
    ("--features features", "query must name"),
    ("--query 0", "no finished run of extract_features in runs"),
    ("--features absent --query 0", "absent: not a run folder"),
    ("--features empty --query 0", "empty: not a run folder"),
    ("--features unfinished --query 0", "unfinished: not finished"),
    ("--features tokens --query 0", "tokens: holds all tokens"),
    ("--features incomplete --query 0", "incomplete: has 3 windows, expected 6"),
    ("--features truncated --query 0", r"truncated/shards/000001.npz: cannot be read"),
    ("--features flipped --query 0", r"flipped/shards/000001.npz: cannot be read"),
    ("--features missing --query 0", r"missing/shards/000001.npz: cannot be read"),
    ("--features nan --query 0", r"nan/shards/000000.npz: 1 of 3 windows have features that are not finite.*000001"),
    ("--features old --query 0", r"old/shards/000000.json: rows\[0\]: view is missing"),
    ("--features alone --query 0", "alone: has no other video than that of the query"),
    ("--features features --query file.mp4", "the model of features is gone"),
]


def test_mistakes_are_one_line(call: Call, work: Path) -> None:
    Path("empty").mkdir()
    Path("file.mp4").write_bytes(b"no video")
    for name in ("features", "unfinished", "incomplete", "truncated", "flipped", "missing", "nan", "old"):
        digits(work / name)
    digits(work / "tokens", pool="none")
    Path("unfinished/summary.json").unlink()
    Path("incomplete/shards/000001.json").unlink()
    damaged = Path("truncated/shards/000001.npz")
    content = damaged.read_bytes()
    damaged.write_bytes(content[:200])
    place = content.index(at_angles(*ANGLES)[3:].tobytes())
    Path("flipped/shards/000001.npz").write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
    Path("missing/shards/000001.npz").unlink()
    features_NF = at_angles(*ANGLES)[:3]
    features_NF[2, 0] = np.nan
    np.savez("nan/shards/000000.npz", features=features_NF)
    record = json.loads(Path("old/shards/000000.json").read_text())
    del record["rows"][0]["view"]
    Path("old/shards/000000.json").write_text(json.dumps(record))
    write_features(work / "alone", at_angles(0, 10), [window("train/000000"), window("train/000000", view=1)])
    for flags, message in MISTAKES:
        error = call("search", *flags.split(), "--out", "refused")
        assert re.search(message, error), (flags, error)
        shutil.rmtree("refused", ignore_errors=True)


@pytest.fixture
def project(call: Call, work: Path, video_folder: Path) -> Path:
    """Folder with `videos` and their features `runs/extract_features-*` by the model of `run`."""
    shutil.copytree(video_folder, "videos")
    clip = ["--clip.frames", "4", "--clip.size", "32", "--clip.stride", "2"]
    call("tokenize", "--videos", "videos", *clip, "--tokenizer", "linear-2x8x8-2x15", "--workers", "0")
    steps = ["--steps", "1", *TINY_MODEL[2:], "--validate_every", "1", "--save_every", "1"]
    call("pretrain_ar", *steps, "--objective.clusters", "[1,2,2]", "--out", "run")
    return work


def test_a_file_is_searched_with_the_model_of_the_features(call: Call, project: Path) -> None:
    features = call("extract_features", "--run", "run", "--videos", "videos", "--windows", "dense", "--pool", "slices")
    shutil.copy("videos/left/clip 1.mkv", "another name.mkv")
    found = call("search", "--query", "another name.mkv")
    assert found["features"] == features["out"] and features["out"] in call.err
    assert len(found["nearest"]) == len({near["path"] for near in found["nearest"]}) == 6
    assert found["query"]["row"] is None and found["query"]["label"] is None
    assert Path(found["page"]).read_text().count("data:image/webp") == 7
    # A file of the folder is its own video, which is left out.
    found = call("search", "--query", "videos/left/clip 1.mkv", "--features", features["out"])
    assert len(found["nearest"]) == 5 and "left/clip 1.mkv" not in {near["path"] for near in found["nearest"]}


def test_a_file_is_cut_as_the_windows_of_the_features(call: Call, project: Path) -> None:
    clip = ["--clip.frames", "4", "--clip.size", "32", "--clip.stride", "5"]
    tokenizer = json.loads(next(Path("runs").glob("fit_tokenizer-*/summary.json")).read_text())["run"]
    flags = ["--tokenizer", tokenizer, "--keep_pixels", "raw", "--workers", "0"]
    cache = call("tokenize", "--videos", "videos", *clip, *flags)["cache"]
    call("extract_features", "--run", "run", "--cache", cache, "--precision", "fp32", "--out", "features")
    shutil.copy("videos/left/clip 2.avi", "copy.avi")
    nearest = call("search", "--features", "features", "--query", "copy.avi")["nearest"][0]
    assert nearest["path"] == "left/clip 2.avi" and nearest["similarity"] > 0.999
    found = call("search", "--features", "features", "--query", "videos/left/clip 2.avi")
    assert len(found["nearest"]) == 5
    # The pixels of the cache are enough for the pictures.
    shutil.rmtree("videos")
    found = call("search", "--features", "features", "--query", "1")
    assert Path(found["page"]).read_text().count("data:image/webp") == 6


def test_a_file_is_its_own_nearest_window_and_other_models_are_refused(call: Call, project: Path) -> None:
    call("extract_features", "--run", "run", "--precision", "fp32", "--out", "features")
    shutil.copy("videos/right/clip 0.mp4", "copy.mp4")
    flags = ["--features", "features"]
    nearest = call("search", *flags, "--query", "copy.mp4")["nearest"][0]
    assert nearest["path"] == "right/clip 0.mp4" and nearest["similarity"] > 0.999
    # The cache has no pixels, so the pictures are cut again from its videos.
    assert Path(call("search", *flags, "--query", "3")["page"]).read_text().count("data:image/webp") == 6
    Path("damaged.mp4").write_bytes(Path("copy.mp4").read_bytes()[:1500])
    assert "query damaged.mp4: " in call("search", *flags, "--query", "damaged.mp4")
    weights = load_file("run/model/model.safetensors")
    save_file({name: value + 1 for name, value in weights.items()}, "run/model/model.safetensors")
    assert re.search("features: are of another model than .*run", call("search", *flags, "--query", "damaged.mp4"))
    shutil.rmtree("run/model")
    assert "the model of features is gone" in call("search", *flags, "--query", "damaged.mp4")
    assert not any(
        path.name.startswith("search") and not (path / "summary.json").exists() for path in Path("runs").iterdir()
    )
