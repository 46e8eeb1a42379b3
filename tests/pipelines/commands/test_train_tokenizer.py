"""train_tokenizer writes pictures and movies, refuses mistakes, and trains one tokenizer in two processes."""

import json
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image

from data.clip_spec import ClipSpec
from data.source_clips import held_out_clips
from data.sources import load_source
from pipelines.engine.config import recorded_group
from pipelines.engine.run_files import metrics_of
from tests.helpers.commands import TINIEST, TINY_TOKENIZER, Call, last_line, start_ranks
from tests.pipelines.engine.test_cpu_processes import processes
from tokenizer import VQ3D, load_tokenizer

# --- pictures and movies


@pytest.mark.parametrize(("held_out", "clips", "movie_clips"), [(2, 2, 2), (10, 8, 4)])
def test_every_validation_writes_a_picture_and_a_movie(
    call: Call, tmp_path: Path, held_out: int, clips: int, movie_clips: int
) -> None:
    videos = f"builtin:moving-digits:8:{held_out}"
    flags = ["--videos", videos, "--clip.size", "40", "--steps", "5", "--validate_every", "2"]
    call("train_tokenizer", *TINIEST, *flags, "--out", str(tmp_path / "run"))
    samples = tmp_path / "run" / "samples"
    steps = [f"step_{step:06d}" for step in (2, 4, 5)]
    assert sorted(path.name for path in samples.iterdir()) == sorted(
        f"{s}.{kind}" for s in steps for kind in ("mp4", "png")
    )
    pixels_BTHWC = held_out_clips(load_source(videos), ClipSpec(frames=4, size=40), 96, {}).numpy()
    tokenizer = load_tokenizer(str(tmp_path / "run"))
    for step in steps:
        grid = np.asarray(Image.open(samples / f"{step}.png"))
        assert grid.shape == (clips * 3 * 40, 8 * 40, 3)
        assert np.array_equal(grid[:40, :40], pixels_BTHWC[0, 0])
        assert np.array_equal(grid[:40, -40:], pixels_BTHWC[0, 3])
        with av.open(str(samples / f"{step}.mp4")) as container:
            assert container.streams.video[0].codec_context.name == "h264"
            frames = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
        assert frames.shape == (movie_clips * 4, 6 * 40, 6 * (40 + 8 + 40), 3)
        small = frames[:, 3::6, 3::6].astype(int)
        assert np.abs(small[:, :, :40] - pixels_BTHWC[:movie_clips].reshape(-1, 40, 40, 3)).mean() < 4
    codes = tokenizer.encode(held_out_clips(load_source(videos), ClipSpec(frames=4, size=40), movie_clips, {}))
    decoded = tokenizer.decode(codes).numpy().reshape(-1, 40, 40, 3)
    assert np.abs(small[:, :, 48:] - decoded).mean() < 8, "the last movie shows the saved tokenizer"


# --- refusals


REFUSED: dict[str, tuple[list[str], str]] = {
    "no name": (["--model.name", "vq3d-2x8x8"], "'vq3d-2x8x8'"),
    "no quantizer": (["--model.name", "vq3d-2x8x8-vq64"], "'vq64' fsqN emavqN lfqN simvqN"),
    "no stride": (["--model.name", "vq3d-3x8x8-fsq1000"], "stride power"),
    "no vocabulary": (["--model.name", "vq3d-2x8x8-fsq1024"], "240 1000 4375 15360 64000"),
    "no option": (["--model.options", "{decay: 0.9}"], "fsq 'decay' levels spread"),
    "wrong option": (["--model.options", "{spread: much}"], "fsq spread 'much'"),
    "width": (["--model.width", "12"], "width 12 8"),
    "key": (["--model.wide", "16"], "'wide'"),
    "codebook in parts": (
        ["--accumulate", "2", "--model.name", "vq3d-2x8x8-emavq64"],
        "accumulate 2 vq3d-2x8x8-emavq64",
    ),
    "lpips": (["--loss.lpips", "0.1"], "loss.lpips --loss.lpips_weights"),
    "lpips weights": (["--loss.lpips", "0.1", "--loss.lpips_weights", "nowhere"], "nowhere LPIPS"),
    "negative lpips": (["--loss.lpips", "-1"], "loss.lpips -1.0"),
    "discriminator": (["--loss.discriminator", "2d"], "loss.discriminator"),
    "start": (["--loss.adversarial_start", "-1"], "loss.adversarial_start -1"),
    "cap": (["--loss.adversarial_cap", "0"], "loss.adversarial_cap 0.0"),
    "average": (["--average", "1"], "average 1.0"),
    "negative average": (["--average", "-0.5"], "average -0.5"),
    "size": (["--clip.size", "60"], "60x60 vq3d-2x8x8-fsq1000 height multiple 56 64"),
    "frames": (["--clip.frames", "7"], "frames multiple 6 8"),
    "causal frames": (
        ["--model.name", "vq3d-causal-4x8x8-fsq1000", "--clip.frames", "16"],
        "frames multiple 4 13 17",
    ),
    "dense": (["--clip.views", "dense"], "clip.views dense"),
    "no training videos": (["--videos", "builtin:moving-digits:0:4"], "builtin:moving-digits:0:4 4 test"),
    "rate of built-in videos": (["--clip.fps", "8"], "clip.fps builtin:moving-digits 8"),
}
"""Case -> flags, and words that are part of the error line."""


@pytest.mark.parametrize("what", REFUSED)
def test_a_mistake_is_refused_before_anything_is_written(
    call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    monkeypatch.chdir(tmp_path)
    flags, facts = REFUSED[what]
    line = call("train_tokenizer", *flags)
    assert line.startswith("train_tokenizer: error: ")
    assert [fact for fact in facts.split() if fact not in line] == []
    assert list(tmp_path.iterdir()) == []


def test_the_model_card_has_all_settings_of_the_clips(finished_project: Path, answers: dict[str, Any]) -> None:
    run = finished_project / answers["train_tokenizer"]["run"]
    clip = recorded_group(str(run), "clip", ClipSpec)
    assert clip is not None
    card = (run / "model" / "README.md").read_text()
    (row,) = [line for line in card.splitlines() if line.startswith("| clips |")]
    assert all(f"{name} {json.dumps(value)}" in row for name, value in clip.to_json().items())


def test_a_run_of_another_tokenizer_is_not_resumed(call: Call, tmp_path: Path) -> None:
    call("train_tokenizer", *TINIEST, "--out", str(tmp_path / "run"))
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for flags in (["--model.name", "vq3d-2x8x8-fsq240"], ["--average", "0.5"], ["--loss.pixels", "l1"]):
        assert "--out" in call("train_tokenizer", *TINIEST, *flags, "--out", str(tmp_path / "run"))
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


# --- two processes


def test_two_processes_train_one_codebook(tmp_path: Path) -> None:
    name = "vq3d-2x8x8-emavq64"
    flags = ["--videos", "builtin:moving-digits:24:16", *TINY_TOKENIZER, "--validate_every", "3", "--model.name", name]
    answer = last_line(start_ranks(tmp_path, "train_tokenizer", *flags, "--out", "run"))
    assert processes(tmp_path / "run") == 2
    lines = {line["step"]: line for line in metrics_of(tmp_path / "run") if "val_psnr" in line}
    assert list(lines) == [3, 6]
    for line in lines.values():
        assert {"val_weights", "val_dead_codes", "val_perplexity", "val_code_usage"} <= set(line)
        assert line["val_dead_codes"] == round(64 * (1 - line["val_code_usage"]))
        assert 1 <= line["val_perplexity"] <= 64
    tokenizer = load_tokenizer(str(tmp_path / "run"))
    assert isinstance(tokenizer, VQ3D)
    assert lines[6]["val_weights"] == int(tokenizer.fingerprint()[:8], 16) != lines[3]["val_weights"]
    assert "weights" not in answer
    assert answer["tokenizer"] == name
    codebook = tokenizer.codebook()
    assert codebook is not None and len(codebook.unique(dim=0)) == 64
