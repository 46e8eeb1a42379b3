"""The measures of a classifier do not depend on processes, every listed video is counted, and mistakes are one line."""

import csv
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data.clip_spec import ClipSpec
from data.clips import iter_test_views
from data.sources import Video, load_source
from pipelines.inference import VideoClassifier, load_model, windows
from pipelines.settings.evaluate import Evaluate
from tests.helpers.commands import TINY_MODEL, Call, last_line, start, start_ranks
from tests.helpers.videos import MakeVideo, numbered_frames


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory, video_folder: Path) -> Path:
    """Folder with a classifier `classifier` of the videos in `videos`, and the run `pretrained` that it started from."""
    folder = tmp_path_factory.mktemp("project")
    shutil.copytree(video_folder, folder / "videos")
    clip = ["--clip.frames", "4", "--clip.size", "32", "--clip.stride", "2", "--workers", "0"]
    last_line(start(folder, "tokenize", "--videos", "videos", "--tokenizer", "linear-2x8x8-2x15", *clip))
    pretrain = ["--steps", "1", *TINY_MODEL[2:], "--validate_every", "1", "--save_every", "1", "--out", "pretrained"]
    last_line(start(folder, "pretrain_ar", *pretrain, "--objective.clusters", "[1,2,2]"))
    tune = [
        "--steps",
        "4",
        "--batch_size",
        "4",
        "--warmup",
        "0",
        "--precision",
        "fp32",
        "--attention",
        "plain",
        "--lr",
        "0.3",
    ]
    last_line(start(folder, "finetune", *tune, "--init", "pretrained", "--out", "classifier"))
    return folder


@pytest.fixture
def evaluate(call: Call, project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Function (flags) -> summary or error of evaluate with the classifier, in an empty working folder."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(project / "videos", tmp_path / "videos")
    return lambda *flags: call("evaluate", "--model", str(project / "classifier"), *flags)


def rows_of(summary: dict[str, Any]) -> list[dict[str, str]]:
    with open(summary["predictions"], newline="") as file:
        return list(csv.DictReader(file))


def test_probabilities_are_the_mean_over_views(evaluate: Callable[..., Any], project: Path) -> None:
    summary = evaluate("--videos", "videos", "--views", "2x3")
    model = load_model(project / "classifier")
    assert isinstance(model, VideoClassifier)
    source = load_source("videos")
    for row, video in zip(rows_of(summary), source.videos, strict=True):
        *clips, cuts = iter_test_views(source, video, model.clip, 2, 3)
        batch = model.batch(torch.from_numpy(np.stack(clips)), np.array([view.real for view in cuts.views]))  # type: ignore[union-attr, arg-type]
        with torch.inference_mode():
            share_C = model.classifier.logits(batch).softmax(1).mean(0)
        assert row["path"] == video.path and float(row["probability"]) == pytest.approx(share_C.max().item(), abs=1e-4)
        assert row["predicted"] == model.classes[int(share_C.argmax())]
    assert summary["n"] == 6 and summary["top1"] == sum(row["right"] == "1" for row in rows_of(summary)) / 6
    page = Path(summary["page"]).read_text()
    assert len(summary["list"]) == 64 and page.count("data:image/webp") == len(summary["confusions"]) > 0


def test_every_view_of_a_short_video_has_its_padding(make_video: MakeVideo, tmp_path: Path) -> None:
    make_video(tmp_path / "short.mp4", numbered_frames(3))
    source, seen = load_source(str(tmp_path)), []

    class Model:
        clip = ClipSpec(frames=8, size=16)

        def batch(self, pixels_BTHWC: torch.Tensor, valid_B: np.ndarray) -> dict[str, torch.Tensor]:
            seen.extend(valid_B.tolist())
            return {"pixels": pixels_BTHWC}

    def cut(video: Video) -> Any:
        return iter_test_views(source, video, Model.clip, 2, 2)

    def compute(batch: dict[str, torch.Tensor]) -> list[np.ndarray]:
        return [np.zeros(1)] * len(batch["pixels"])

    list(windows.windows_of_videos(Model(), source.videos, cut, compute, 0, dense=False))  # type: ignore[arg-type]
    assert seen == [3, 3, 3, 3]


def test_videos_that_were_trained_on_are_counted_and_warned_of(
    evaluate: Callable[..., Any], call: Call, make_video: MakeVideo
) -> None:
    assert evaluate("--videos", "videos")["seen_in_training"] == 6 and "WARNING: 6 of 6 videos were used" in call.err
    shutil.rmtree("videos/left")
    make_video(Path("videos/right/new.mp4"), numbered_frames(9))
    summary = evaluate("--videos", "videos")
    assert (summary["seen_in_training"], summary["n"]) == (3, 4)


def test_other_names_of_classes_are_another_evaluation(call: Call, evaluate: Callable[..., Any], project: Path) -> None:
    shutil.copytree(project / "classifier" / "model", "model")
    first = call("evaluate", "--model", "model", "--videos", "videos")
    config = json.loads(Path("model/config.json").read_text())
    Path("model/config.json").write_text(json.dumps({**config, "classes": config["classes"][::-1]}))
    again = call("evaluate", "--model", "model", "--videos", "videos")
    assert again["predictions"] != first["predictions"] and again["top1"] == pytest.approx(1 - first["top1"])


def test_numbers_do_not_depend_on_processes_and_batches(
    evaluate: Callable[..., Any], project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("videos/right/damaged.mp4").write_bytes(Path("videos/right/clip 0.mp4").read_bytes()[:1500])
    flags = ["--videos", "videos", "--views", "3x1"]
    alone = evaluate(*flags, "--out", "alone")
    assert (alone["n"], alone["undecodable"]) == (7, 1) and alone["undecodable_videos"][0][
        "path"
    ] == "right/damaged.mp4"
    result = last_line(
        start_ranks(Path.cwd(), "evaluate", "--model", str(project / "classifier"), *flags, "--out", "two")
    )
    monkeypatch.setattr(windows, "BATCH", 5)
    small = evaluate(*flags, "--out", "small", "--workers", "2")
    for other in (result, small):
        assert Path(other["predictions"]).read_bytes() == Path(alone["predictions"]).read_bytes()
        assert {k: v for k, v in other.items() if k not in ("predictions", "page", "seconds")} == {
            k: v for k, v in alone.items() if k not in ("predictions", "page", "seconds")
        }


def test_missing_videos_are_counted_and_named_but_not_wrong(evaluate: Callable[..., Any], call: Call) -> None:
    names = ["left/clip 0.mp4", "right/clip 0.mp4", "left/absent.mp4"]
    Path("videos/list.csv").write_text("path,label\n" + "".join(f"{name},{name.split('/')[0]}\n" for name in names))
    summary = evaluate("--videos", "videos/list.csv")
    assert (summary["n"], summary["missing"], summary["missing_videos"]) == (2, 1, ["left/absent.mp4"])
    assert "1 of 3 listed videos are missing" in call.err and "left/absent.mp4" in call.err
    assert "left/absent.mp4" in Path(summary["page"]).read_text()


def test_the_split_test_is_evaluated_by_default(evaluate: Callable[..., Any]) -> None:
    rows = [
        ("left/clip 0.mp4", "train"),
        ("left/clip 1.mkv", "test"),
        ("right/clip 0.mp4", "test"),
        ("right/clip 1.mkv", "val"),
    ]
    Path("videos/list.csv").write_text("path,label,split\n" + "".join(f"{p},{p.split('/')[0]},{s}\n" for p, s in rows))
    assert [row["path"] for row in rows_of(evaluate("--videos", "videos/list.csv"))] == [
        "left/clip 1.mkv",
        "right/clip 0.mp4",
    ]
    assert evaluate("--videos", "videos/list.csv", "--split", "val")["n"] == 1
    assert evaluate("--videos", "videos/list.csv", "--split", "all")["n"] == 4
    lines = "left/clip 0.mp4,left,test\nleft/gone.mp4,left,train\nright/gone.mp4,right,test\n"
    Path("videos/list.csv").write_text(f"path,label,split\n{lines}")
    summary = evaluate("--videos", "videos/list.csv")
    assert (summary["n"], summary["missing_videos"]) == (1, ["right/gone.mp4"])
    Path("videos/list.csv").write_text("path,label,split\nleft/clip 0.mp4,left,train\n")
    assert "has no split test or val, got train; give --split" in evaluate("--videos", "videos/list.csv")


def test_videos_of_an_unknown_class_are_errors(evaluate: Callable[..., Any]) -> None:
    shutil.move("videos/right/clip 0.mp4", "videos/up.mp4")
    Path("videos/up").mkdir()
    shutil.move("videos/up.mp4", "videos/up/clip.mp4")
    summary = evaluate("--videos", "videos")
    assert summary["per_class"]["up"] == {"accuracy": 0.0, "n": 1} and summary["n"] == 6
    shutil.rmtree("videos/left"), shutil.rmtree("videos/right")
    error = evaluate("--videos", "videos", "--out", "none")
    assert "no label is a class of the model: up; the classifier knows left, right" in error


def test_mistakes_are_one_line(call: Call, evaluate: Callable[..., Any], project: Path) -> None:
    assert "must be a classifier of finetune" in call(
        "evaluate", "--model", str(project / "pretrained"), "--videos", "videos"
    )
    assert "absent: no such folder or list file" in evaluate("--videos", "absent")
    Path("unlabelled").mkdir()
    shutil.copy("videos/left/clip 0.mp4", "unlabelled")
    assert "has no labelled videos of the split all" in evaluate("--videos", "unlabelled")
    Path("list.csv").write_text("path,label\nabsent.mp4,left\n")
    assert "all 1 listed videos are missing, such as absent.mp4" in evaluate("--videos", "list.csv")
    for views in ("5", "0x3", "5x", "11x10", "1x1x1"):
        assert f"views must be clips x crops such as 5x3, at most 100 views, got {views}" in evaluate("--views", views)


def test_views_are_clips_and_crops() -> None:
    assert Evaluate(views="5x3").clips_and_crops() == (5, 3)


def test_a_finished_evaluation_is_not_repeated(evaluate: Callable[..., Any], call: Call) -> None:
    first = evaluate("--videos", "videos")
    assert evaluate("--videos", "videos") == first and "nothing is left to do" in call.err
    assert json.loads(Path(first["page"]).with_name("summary.json").read_text()) == first
