"""fit_tokenizer fits a linear tokenizer once, with any number of processes, and refuses mistakes in one line."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data.cache import TokenCache
from data.clip_spec import ClipSpec
from data.source_clips import held_out_clips
from data.sources import load_source
from pipelines.engine.config import recorded_group
from tests.helpers.commands import Call, last_line, start_ranks
from tests.helpers.videos import MakeVideo, moving_square
from tokenizer import Linear, load_tokenizer
from tokenizer.measures import psnr_of

VIDEOS = "builtin:moving-digits:12:4"
CLIP = ["--videos", VIDEOS, "--clip.frames", "4", "--clip.size", "32"]


@pytest.fixture
def fit(call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Call:
    """`call` in an empty folder."""
    monkeypatch.chdir(tmp_path)
    return call


def test_a_fitted_tokenizer_is_loaded_from_its_run_folder(fit: Call) -> None:
    answer = fit("fit_tokenizer", *CLIP, "--name", "linear-2x8x8-2x240")
    tokenizer = load_tokenizer(answer["run"])
    assert isinstance(tokenizer, Linear) and tokenizer.name == answer["tokenizer"] == "linear-2x8x8-2x240"
    assert [list(levels) for levels in tokenizer.levels] == answer["levels"]
    assert all(size <= 240 for size in tokenizer.vocabularies)
    pixels_BTHWC = held_out_clips(load_source(VIDEOS), ClipSpec(frames=4, size=32), 96, {})
    decoded = tokenizer.decode(tokenizer.encode(pixels_BTHWC))
    assert answer["psnr"] == pytest.approx(psnr_of(pixels_BTHWC, decoded).mean().item(), abs=1e-3)
    assert (answer["clips"], answer["held_out"], answer["skipped"]) == (12, 4, 0)
    card = Path(answer["run"], "model", "README.md").read_text()
    assert f"{answer['psnr']:.2f} dB" in card and "12 clips" in card
    assert sorted(path.suffix for path in Path(answer["run"], "samples").iterdir()) == [".mp4", ".png"]


def test_a_finished_run_is_not_fitted_again(fit: Call) -> None:
    first = fit("fit_tokenizer", *CLIP)
    weights = Path(first["run"], "model", "model.safetensors")
    before = weights.stat().st_mtime_ns
    assert fit("fit_tokenizer", *CLIP) == first
    assert weights.stat().st_mtime_ns == before


@pytest.mark.parametrize("cut", [["--clip.span", "video", "--clip.views", "2"], ["--clip.views", "dense"]])
def test_tokenize_fits_its_tokenizer_to_its_own_clips(fit: Call, video_folder: Path, cut: list[str]) -> None:
    flags = ["--clip.frames", "4", "--clip.size", "32", *cut]
    answer: Any = fit("tokenize", "--videos", str(video_folder), "--tokenizer", "linear", *flags, "--workers", "0")
    cache = TokenCache.open(answer["cache"])
    assert cache.layout.shape == (2, 4, 4, 4) and cache.layout.levels is not None
    tokenizer = load_tokenizer(cache.made_with["tokenizer"])
    assert tokenizer.levels == cache.layout.levels
    clip = recorded_group(cache.made_with["tokenizer"], "clip", ClipSpec)
    assert clip == cache.clip
    again = fit("tokenize", "--videos", str(video_folder), "--tokenizer", "linear", *flags, "--workers", "0")
    assert again["reused"] and again["key"] == answer["key"]


def test_two_processes_fit_one_tokenizer(fit: Call, tmp_path: Path) -> None:
    alone = fit("fit_tokenizer", *CLIP, "--out", "alone")
    together = last_line(start_ranks(tmp_path, "fit_tokenizer", *CLIP, "--out", "together"))
    assert together["psnr"] == alone["psnr"]
    names = [Path(run, "model") for run in ("alone", "together")]
    assert load_tokenizer(str(names[0])).fingerprint() == load_tokenizer(str(names[1])).fingerprint()


def test_damaged_videos_are_skipped_and_counted(fit: Call, video_folder: Path, tmp_path: Path) -> None:
    videos = Path(shutil.copytree(video_folder, tmp_path / "videos"))
    next(videos.rglob("clip 0.mp4")).write_bytes(b"not a video")
    answer = fit("fit_tokenizer", "--videos", "videos", "--clip.frames", "4", "--clip.size", "32")
    assert answer["skipped"] == 1


REFUSED: dict[str, tuple[list[str], str]] = {
    "no stride": (["--name", "linear-4x1000"], "'linear-4x1000' linear-TxHxW"),
    "another kind": (["--name", "vq3d-2x8x8-fsq1000"], "'vq3d-2x8x8-fsq1000' linear-TxHxW"),
    "vocabulary": (["--name", "linear-2x8x8-4x65537"], "linear-2x8x8-4x65537 65536"),
    "codes": (["--name", "linear-2x8x8-65x1000"], "linear-2x8x8-65x1000 64"),
    "fewer values than codes": (["--name", "linear-1x2x2-32x1000"], "linear-1x2x2-32x1000 12 32"),
    "size": (["--clip.size", "60"], "60x60 linear-2x8x8-4x1000 height multiple 56 64"),
    "frames": (["--clip.frames", "5"], "frames 5 multiple 4 6"),
    "no clips": (["--clips", "0"], "clips 1 0"),
    "no training videos": (["--videos", "builtin:moving-digits:0:4"], "builtin:moving-digits:0:4 4 test"),
    "no videos": (["--videos", "nowhere"], "nowhere"),
}
"""Case -> flags, and words that are part of the error line."""


@pytest.mark.parametrize("what", REFUSED)
def test_a_mistake_is_one_line_before_anything_is_written(fit: Call, tmp_path: Path, what: str) -> None:
    flags, facts = REFUSED[what]
    line: Any = fit("fit_tokenizer", *CLIP, *flags)
    assert isinstance(line, str) and line.startswith("fit_tokenizer: error: ")
    assert [fact for fact in facts.split() if fact not in line] == []
    assert list(tmp_path.iterdir()) == []


def test_videos_that_do_not_vary_are_refused_with_the_number_of_directions(
    fit: Call, tmp_path: Path, make_video: MakeVideo
) -> None:
    (tmp_path / "black").mkdir()
    make_video(tmp_path / "black" / "one.mp4", np.zeros((20, 48, 64, 3), np.uint8))
    flags = ["--clip.frames", "4", "--clip.size", "32"]
    line: Any = fit("fit_tokenizer", "--videos", "black", *flags)
    assert isinstance(line, str) and "0 directions" in line and "4 codes" in line
    for number in range(4):
        make_video(tmp_path / "black" / f"moving {number}.mp4", moving_square(1, 3 * number))
    assert fit("fit_tokenizer", "--videos", "black", *flags)["skipped"] == 0


def test_one_video_is_enough(fit: Call, tmp_path: Path, make_video: MakeVideo) -> None:
    (tmp_path / "single").mkdir()
    make_video(tmp_path / "single" / "one.mp4", moving_square(1, 3))
    answer = fit("fit_tokenizer", "--videos", "single", "--clip.frames", "4", "--clip.size", "32")
    assert (answer["clips"], answer["held_out"]) == (1, 0)
    tokenizer = load_tokenizer(answer["run"])
    codes = tokenizer.encode(torch.zeros(1, 4, 64, 64, 3, dtype=torch.uint8))
    assert codes.shape == (1, 2, 8, 8, 4)


def test_tokenize_refuses_wrong_names_and_prefers_folders_to_names_but_not_to_linear(fit: Call, tmp_path: Path) -> None:
    line: Any = fit("tokenize", *CLIP, "--tokenizer", "linear-2x8x8-0x5")
    assert isinstance(line, str) and "'linear-2x8x8-0x5'" in line and "linear-TxHxW-[Gx]V" in line
    for name in ("linear", "linear-2x8x8-2x64"):
        (tmp_path / name).mkdir()
    assert "2x64: not a tokenizer" in fit("tokenize", *CLIP, "--tokenizer", "linear-2x8x8-2x64")
    assert "runs" in fit("tokenize", *CLIP, "--workers", "0")["tokenizer"]
