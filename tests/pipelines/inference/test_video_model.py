"""A model computes the same features of a video file as of its codes in the cache, wherever its folder is."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ar_model.objectives import load_objective
from data.cache import TokenCache
from data.clips import clip_of_file
from data.decoding import DamagedVideo
from data.loading import evaluation_batches
from pipelines.inference import VideoModel, load_model
from tests.helpers.commands import TINY_MODEL, Call, python

STEPS = ["--steps", "1", *TINY_MODEL[2:], "--validate_every", "1", "--save_every", "1"]


@pytest.fixture
def project(call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, video_folder: Path) -> Path:
    """Folder with a run `run` on a cache `caches/*` of clips of four frames, three frames per second."""
    monkeypatch.chdir(tmp_path)
    clip = ["--clip.frames", "4", "--clip.size", "32", "--clip.fps", "3", "--clip.views", "2", "--clip.flip", "true"]
    call("tokenize", "--videos", str(video_folder), "--tokenizer", "linear-2x8x8-2x15", *clip, "--workers", "0")
    call("pretrain_ar", *STEPS, "--objective.clusters", "[1,2,2]", "--out", "run")
    return tmp_path


def cached_tokens(project: Path, path: str) -> torch.Tensor:
    """Tokens of all layers, computed from the codes of a video in the cache."""
    (folder,) = project.glob("caches/*")
    cache = TokenCache.open(folder)
    (row,) = [row for row, video in enumerate(cache.videos) if video.path == path]
    (batch,) = evaluation_batches(cache, [row], 1)
    with torch.inference_mode():
        return torch.stack(load_objective(project / "run").features(batch))[:, 0]


def test_features_of_a_file_are_those_of_its_cached_codes(project: Path, video_folder: Path) -> None:
    features = load_model(project / "run").features(video_folder / "left/clip 1.mkv")
    assert torch.equal(features.tokens, cached_tokens(project, "left/clip 1.mkv"))
    assert features.grid == (2, 4, 4) and features.tokens.shape == (2, 32, 24)
    assert torch.allclose(features.slices, features.tokens.view(2, 2, 16, 24).mean(2), atol=1e-6)
    assert torch.allclose(features.pooled, features.tokens.mean(1), atol=1e-6)


def test_frames_in_memory_have_the_features_of_their_file(project: Path, video_folder: Path) -> None:
    model, file = load_model(project / "run"), video_folder / "right/clip 0.mp4"
    pixels_THWC, _ = clip_of_file(file, model.clip)
    # At the rate and size of the clips, cutting changes nothing.
    features = model.features(pixels_THWC, rate=3.0)
    assert torch.equal(features.tokens, model.features(file).tokens)
    assert torch.equal(model.features(torch.from_numpy(pixels_THWC), rate=3.0).tokens, features.tokens)


def test_a_model_folder_works_alone_in_another_process(project: Path, video_folder: Path, tmp_path: Path) -> None:
    expected = load_model(project / "run").features(video_folder / "left/clip 0.mp4").pooled
    alone = Path(shutil.move(project / "run" / "model", tmp_path / "else where"))
    for name in ("run", "runs", "caches"):
        shutil.rmtree(project / name, ignore_errors=True)
    code = (
        "from pipelines.inference import load_model\n"
        f"print(load_model({str(alone)!r}).features({str(video_folder / 'left/clip 0.mp4')!r}).pooled.double().sum().item())"
    )
    (tmp_path / "working folder").mkdir()
    assert float(python(tmp_path / "working folder", "-c", code)) == pytest.approx(expected.double().sum().item())


def test_a_run_of_an_earlier_version_uses_its_cache(project: Path, video_folder: Path) -> None:
    (project / "run/model/preprocessing.json").unlink()
    shutil.rmtree(project / "run/model/tokenizer")
    features = load_model(project / "run").features(video_folder / "left/clip 1.mkv")
    assert torch.equal(features.tokens, cached_tokens(project, "left/clip 1.mkv"))


def test_padding_of_a_short_video_reaches_the_objective(
    call: Call, project: Path, make_video: Callable[..., Path]
) -> None:
    call("pretrain_ar", *_vimpac(), "--out", "vimpac")
    frames = [np.full((32, 32, 3), 99, np.uint8)] * 4
    file = make_video(project / "short.mp4", frames, rate=10)
    seen: list[dict[str, Any]] = []
    model = load_model(project / "vimpac")
    original = model.objective.features
    model.objective.features = lambda batch: (seen.append(batch), original(batch))[1]  # type: ignore[method-assign]
    # Four frames at ten frames per second are two frames at three: one of two time slices is valid.
    features = model.features(file)
    assert seen[0]["slices_B"].tolist() == [1]
    assert features.tokens.shape[1] == 33 and features.pooled.shape == (2, 24)
    assert torch.allclose(features.pooled, features.tokens[:, 1:].mean(1), atol=1e-6)


def _vimpac() -> list[str]:
    sizes = ["--objective.width", "24", "--objective.depth", "2", "--objective.heads", "2"]
    return ["--objective", "VIMPAC", *STEPS[: STEPS.index("--objective.width")], *sizes]


def bad_calls(model: VideoModel, folder: Path) -> list[tuple[Callable[[], Any], type[Exception], str]]:
    frames = np.zeros((4, 32, 32, 3), np.uint8)
    return [
        (lambda: model.features(folder / "absent.mp4"), FileNotFoundError, r"absent\.mp4: no such video file"),
        (lambda: model.features(folder / "note.mp4"), DamagedVideo, "."),
        (lambda: model.features(frames), ValueError, "rate of the video.*got None"),
        (lambda: model.features(frames, rate=-1.0), ValueError, r"got -1\.0"),
        (lambda: model.features(frames.astype(np.float32), rate=3.0), ValueError, "uint8.*got float32"),
        (lambda: model.features(frames[0], rate=3.0), ValueError, r"got uint8 of shape \(32, 32, 3\)"),
        (lambda: model.features(frames[:0], rate=3.0), ValueError, r"got uint8 of shape \(0, 32, 32, 3\)"),
    ]


def test_bad_videos_are_refused(project: Path) -> None:
    (project / "note.mp4").write_text("no video")
    for call_it, error, message in bad_calls(load_model(project / "run"), project):
        with pytest.raises(error, match=message):
            call_it()


def test_a_missing_or_other_tokenizer_is_refused_and_named(call: Call, project: Path, video_folder: Path) -> None:
    (own,) = project.glob("runs/fit_tokenizer-*")
    copy = shutil.move(project / "run/model/tokenizer", project / "moved")
    shutil.move(own, project / "moved run")
    with pytest.raises(ValueError, match=rf"tokenizer of run/model does not load.*--tokenizer.*{own.name}"):
        load_model("run")
    file = video_folder / "left/clip 1.mkv"
    expected = cached_tokens(project, "left/clip 1.mkv")
    assert torch.equal(load_model("run", tokenizer=str(copy)).features(file).tokens, expected)
    other = call("fit_tokenizer", "--videos", str(video_folder), "--name", "linear-2x8x8-2x8")["run"]
    with pytest.raises(ValueError, match="is not the tokenizer of run/model: its fingerprint is"):
        load_model("run", tokenizer=other)
    (project / "run/model/preprocessing.json").write_text('{"clip": {"frames": 0}}')
    with pytest.raises(ValueError, match=r"preprocessing\.json: clip\.size is missing"):
        load_model("run")


@pytest.mark.parametrize(
    "change, message",
    [
        ({"encode_batch": 10**9}, "encode_batch is 1000000000, expected a number from 1 to"),
        ({"encode_batch": 0}, "encode_batch is 0"),
        ({"clip": {"frames": 4.5}}, r"clip\.frames is 4\.5, expected a whole number"),
        ({"clip": {"flip": "x"}}, r"clip\.flip is 'x'"),
        ({"clip": {"frames": 0}}, r"clip\.frames must be at least 1, got 0"),
        ({"precision": "fp8"}, "precision is 'fp8'"),
    ],
)
def test_a_strange_preprocessing_is_refused(project: Path, change: dict[str, Any], message: str) -> None:
    file = project / "run/model/preprocessing.json"
    content = json.loads(file.read_text())
    clip = {**content["clip"], **change.get("clip", {})}
    file.write_text(json.dumps({**content, **change, "clip": clip}))
    with pytest.raises(ValueError, match=message):
        load_model("run")


def test_a_model_without_its_preprocessing_is_refused(project: Path) -> None:
    (project / "run/model/preprocessing.json").unlink()
    with pytest.raises(ValueError, match=r"has no preprocessing\.json"):
        load_model("run/model")


def test_the_cache_of_a_moved_project_is_found(call: Call, project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    moved = project / "moved"
    moved.mkdir()
    for name in ("run", "caches"):
        shutil.move(project / name, moved / name)
    monkeypatch.chdir(moved)
    assert call("extract_features", "--run", "run", "--out", "features")["videos"] == 6
    (cache,) = (moved / "caches").iterdir()
    manifest = json.loads((cache / "manifest.json").read_text())
    record = json.loads((moved / "run/model/preprocessing.json").read_text())
    assert record["key"] == manifest["key"]
    (moved / "run/model/preprocessing.json").write_text(json.dumps({**record, "key": "0" * 64}))
    assert "is not the cache of run" in call("extract_features", "--run", "run", "--out", "other")
