"""Fine-tuning learns labels, chooses its weights on training videos only, resumes bit for bit, and is used on videos."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ar_model.classifier import load_classifier
from ar_model.objectives import load_objective
from data.cache import TokenCache
from data.sources import Video
from pipelines.inference import VideoClassifier, load_model
from tests.helpers.caches import MakeCache
from tests.helpers.commands import TINY_MODEL, Call

PRETRAIN = [
    "--steps",
    "1",
    *TINY_MODEL[2:],
    "--validate_every",
    "1",
    "--save_every",
    "1",
    "--objective.clusters",
    "[1,3,3]",
]
TUNE = ["--batch_size", "4", "--warmup", "2", "--precision", "fp32", "--attention", "plain", "--average", "0.5"]
Tune = Callable[..., Any]


def labelled(count: int, split: str | None = None, group: bool = False) -> list[Video]:
    """Videos of two classes. In a cache of random codes, each video has codes of its own."""
    place = f"{split or 'train'}"
    return [
        Video(f"{place}/{i:03d}.mp4", 50, "ab"[i % 2], group=f"g{i // 4}" if group else None, split=split)
        for i in range(count)
    ]


@pytest.fixture
def tune(call: Call, make_cache: MakeCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Tune:
    """Function (videos, flags) -> summary of finetune on a cache of random codes. The run `pretrained` is on another cache."""
    monkeypatch.chdir(tmp_path)
    call("pretrain_ar", *PRETRAIN, "--cache", str(make_cache(tmp_path / "own", 10)), "--out", "pretrained")

    def run(videos: list[Video], *flags: str, **cache: Any) -> Any:
        folder = make_cache(tmp_path / "caches", videos, **cache)
        return call("finetune", *TUNE, "--init", "pretrained", "--cache", str(folder), *flags)

    return run


def test_labels_of_training_videos_are_learned(tune: Tune) -> None:
    flags = ["--steps", "60", "--lr", "0.6", "--validate_every", "60", "--save_every", "60", "--layer_decay", "1"]
    summary = tune(labelled(20), *flags, "--drop_path", "0", views=1)
    assert summary["classes"] == ["a", "b"] and summary["held_out"] == 2
    # Random codes can be learned by heart only.
    assert summary["train_accuracy"] == 1.0
    assert load_classifier(summary["run"]).classes == ("a", "b")
    scratch = tune(labelled(20), *flags, "--from_scratch", "true", views=1)
    assert scratch["run"] != summary["run"] and scratch["init"] is None


def test_the_start_is_the_pre_trained_encoder_or_random(tune: Tune) -> None:
    short = ["--steps", "1", "--lr", "1e-30", "--average", "0"]
    pretrained = load_objective("pretrained").encoder.blocks[0].attention.q.weight
    tuned = load_classifier(tune(labelled(12), *short)["run"]).trunk.encoder.blocks[0].attention.q.weight
    random = load_classifier(tune(labelled(12), *short, "--from_scratch", "true", "--seed", "7")["run"])
    assert torch.allclose(tuned, pretrained, atol=1e-9)
    assert not torch.allclose(random.trunk.encoder.blocks[0].attention.q.weight, pretrained, atol=1e-2)


def test_the_best_weights_are_chosen_on_held_out_training_videos(tune: Tune, tmp_path: Path) -> None:
    flags = ["--steps", "12", "--validate_every", "3", "--save_every", "12", "--lr", "0.3"]
    summary = tune([*labelled(24, group=True), *labelled(6, "test")], *flags)
    run = Path(summary["run"])
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    found = [(line["val_accuracy"], -line["val_loss"], line["step"]) for line in lines if "val_accuracy" in line]
    assert [step for _, _, step in found] == [3, 6, 9, 12]
    best = max(found, key=lambda one: one[:2])
    assert (summary["validation_accuracy"], summary["step"]) == (best[0], best[2])
    # A whole group of four is held out, and no video of the split test.
    assert summary["held_out"] == 4


def test_a_stopped_run_continues_bit_for_bit(tune: Tune, call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    flags = [
        "--steps",
        "8",
        "--validate_every",
        "2",
        "--save_every",
        "3",
        "--lr",
        "0.3",
        "--mixup",
        "0.4",
        "--keep_tokens",
        "0.5",
    ]
    whole = tune(labelled(16), *flags, "--out", "whole")
    shutil.copytree("whole", "stopped")
    # The best weights so far are those of the last validation before the stop.
    for name in ("summary.json", "model", "checkpoints/step_000008", "best.json", "best.safetensors"):
        path = Path("stopped", name)
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    again = tune(labelled(16), *flags, "--out", "stopped")
    states = [Path(run, "checkpoints/step_000008/model.safetensors").read_bytes() for run in ("whole", "stopped")]
    assert states[0] == states[1]
    lines = [
        [
            {k: v for k, v in json.loads(line).items() if k != "seconds"}
            for line in Path(run, "metrics.jsonl").read_text().splitlines()
        ]
        for run in ("whole", "stopped")
    ]
    assert lines[0] == lines[1]
    assert (Path("whole/model/model.safetensors")).read_bytes() == Path("stopped/model/model.safetensors").read_bytes()
    for key in ("step", "train_accuracy", "validation_accuracy"):
        assert again[key] == whole[key]


def test_layers_have_decaying_learning_rates(tune: Tune) -> None:
    # AdamW changes every weight by about the learning rate in its first step.
    flags = [
        "--steps",
        "1",
        "--warmup",
        "0",
        "--lr",
        "0.064",
        "--layer_decay",
        "0.5",
        "--average",
        "0",
        "--weight_decay",
        "0",
    ]
    before, after = (
        load_objective("pretrained"),
        load_classifier(tune(labelled(12), *flags, "--drop_path", "0")["run"]),
    )
    changes = [
        (after.trunk.encoder.blocks[i].mlp[0].weight - before.encoder.blocks[i].mlp[0].weight).abs().median().item()
        for i in range(2)
    ]
    # lr 0.064 for 256 clips is 0.001 for 4 clips; the head has depth 0, the last block 1, the first block 2.
    assert changes == pytest.approx([0.001 / 4, 0.001 / 2], rel=0.1)


def test_videos_are_cached_and_classified(
    call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, video_folder: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    clip = ["--clip.frames", "4", "--clip.size", "32", "--clip.stride", "2"]
    call("tokenize", "--videos", str(video_folder), "--tokenizer", "linear-2x8x8-2x15", *clip, "--workers", "0")
    call("pretrain_ar", *PRETRAIN[:-1], "[1,2,2]", "--out", "pretrained")
    flags = [
        *TUNE,
        "--init",
        "pretrained",
        "--videos",
        str(video_folder),
        "--views",
        "2",
        "--lr",
        "0.3",
        "--layer_decay",
        "1",
    ]
    summary = call(
        "finetune", *flags, "--steps", "30", "--validate_every", "30", "--save_every", "30", "--drop_path", "0"
    )
    cache = TokenCache.open(summary["cache"])
    assert cache.clip.views == 2 and cache.clip.stride == 2 and summary["classes"] == ["left", "right"]
    model = load_model(summary["run"])
    assert isinstance(model, VideoClassifier)
    printed = call.err[call.err.index("from pipelines.inference import") :].splitlines()
    assert repr(str(Path(summary["run"]).resolve())) in printed[1] and 'predict("video.mp4")' in printed[1]
    predicted = model.predict(video_folder / "left/clip 1.mkv")
    assert list(predicted.values()) == sorted(predicted.values(), reverse=True)
    assert set(predicted) == {"left", "right"} and sum(predicted.values()) == pytest.approx(1)
    logits = model.classifier.logits(model.batch_of(video_folder / "left/clip 1.mkv"))[0]
    assert max(predicted, key=lambda name: predicted[name]) == model.classes[int(logits.argmax())]
    assert model.features(video_folder / "left/clip 1.mkv").pooled.shape == (2, 24)
    mirrored = call(
        "tokenize",
        "--videos",
        str(video_folder),
        "--tokenizer",
        cache.made_with["tokenizer"],
        *clip,
        "--clip.views",
        "2",
        "--clip.flip",
        "true",
        "--workers",
        "0",
    )
    error = call("finetune", *TUNE, "--init", "pretrained", "--cache", mirrored["cache"])
    assert "mirrored" in error and "'left'" in error


def test_one_class_is_refused_before_anything_is_encoded(call: Call, tune: Tune, video_folder: Path) -> None:
    shutil.copytree(video_folder / "left", "one/left")
    error = call("finetune", *TUNE, "--init", "pretrained", "--videos", "one")
    assert "one: needs training videos of at least 2 classes, got 1" in error


def test_mistakes_are_one_line(tune: Tune, call: Call, make_cache: MakeCache, tmp_path: Path) -> None:
    assert "needs training videos of at least 2 classes, got 1" in tune([Video(f"{i}.mp4", 5, "a") for i in range(4)])
    assert "was made by another tokenizer" in tune(labelled(8), tokenizer="another")
    assert "--init absent: not a run folder" in call("finetune", *TUNE, "--init", "absent")
    assert "layer_decay must be from 0 to 1, got 1.5" in tune(labelled(8), "--layer_decay", "1.5")
    assert "keep_tokens must be above 0" in tune(labelled(8), "--keep_tokens", "0")
    assert "flip false for a model that reads codes" in tune(labelled(8), "--flip", "true")
    error = call("finetune", *TUNE, "--init", "pretrained", "--videos", "x", "--cache", "y")
    assert "videos x and cache y exclude each other" in error
