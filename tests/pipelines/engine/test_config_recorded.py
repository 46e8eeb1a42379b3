"""Clip settings that are not given are those that the tokenizer was trained on."""

from pathlib import Path

import pytest

from data.clip_spec import ClipSpec
from pipelines.engine.config import load_yaml, parse
from pipelines.settings.evaluate_tokenizer import EvaluateTokenizer
from pipelines.settings.tokenize import Tokenize

CLIP = "{frames: 17, size: 32, stride: 2, views: 4, flip: true}"
TRAINED = ClipSpec(frames=17, size=32, stride=2, views=4, flip=True)


def run_folder(folder: Path, clip: str = CLIP) -> str:
    (folder / "model").mkdir(parents=True)
    (folder / "config.yaml").write_text(f"videos: v\nclip: {clip}\n")
    return str(folder)


def tokenize(*flags: str) -> ClipSpec:
    return parse(Tokenize, flags, prog="tokenize")[0].clip


def test_tokenize_cuts_clips_as_the_tokenizer_was_trained(tmp_path: Path) -> None:
    run = run_folder(tmp_path / "run")
    assert tokenize("--tokenizer", run) == tokenize("--tokenizer", f"{run}/model") == TRAINED
    config, text = parse(Tokenize, ["--tokenizer", run], prog="tokenize")
    (tmp_path / "again.yaml").write_text(text)
    assert parse(Tokenize, ["--config", str(tmp_path / "again.yaml")], prog="tokenize")[0] == config


def test_flags_and_files_override_what_the_tokenizer_was_trained_on(tmp_path: Path) -> None:
    run = run_folder(tmp_path / "run")
    (tmp_path / "clip.yaml").write_text("clip: {frames: 9, size: 48}\n")
    flags = ["--tokenizer", run, "--clip.views", "dense", "--clip.size=24", "--config", str(tmp_path / "clip.yaml")]
    assert tokenize(*flags) == ClipSpec(frames=9, size=24, stride=2, views="dense", flip=True)
    explicit = ["--clip.frames=16", "--clip.size=64", "--clip.stride=1", "--clip.views=1", "--clip.flip=false"]
    assert tokenize("--tokenizer", run, *explicit) == ClipSpec()


@pytest.mark.parametrize("tokenizer", ["someone/tokenizer", "taming:folder", "nowhere", "runs/model"])
def test_a_tokenizer_that_is_no_run_leaves_the_defaults(tokenizer: str) -> None:
    assert tokenize("--tokenizer", tokenizer) == tokenize() == ClipSpec()


def test_settings_of_other_versions_are_left_out(tmp_path: Path) -> None:
    assert tokenize("--tokenizer", run_folder(tmp_path / "run", "{stride: 2, speed: 9}")) == ClipSpec(stride=2)


def test_evaluate_tokenizer_takes_what_all_tokenizers_agree_on(tmp_path: Path) -> None:
    runs = [run_folder(tmp_path / "a"), run_folder(tmp_path / "b", CLIP.replace("17", "16")), "taming:folder"]
    config, _ = parse(EvaluateTokenizer, ["--tokenizers", *runs], prog="evaluate_tokenizer")
    assert config.clip == ClipSpec(size=32, stride=2, views=4, flip=True)


def test_scales_and_rates_are_taken_over_unless_a_run_is_from_before_them(tmp_path: Path) -> None:
    new = run_folder(tmp_path / "new", "{stride: 2, fps: 12.5, scales: [1, 0.75]}")
    old = run_folder(tmp_path / "old", "{stride: 2}")
    assert tokenize("--tokenizer", new, "--videos", "v") == ClipSpec(stride=2, fps=12.5, scales=(1, 0.75))
    for runs in ([new, old], [old, new]):
        config, _ = parse(EvaluateTokenizer, ["--tokenizers", *runs], prog="evaluate_tokenizer")
        assert config.clip == ClipSpec(stride=2)


@pytest.mark.parametrize("clip", ["{seconds: 2.5}", "{span: video, views: 2}", "{views: dense}"])
def test_lengths_in_time_and_dense_views_are_taken_over(tmp_path: Path, clip: str) -> None:
    assert tokenize("--tokenizer", run_folder(tmp_path / "run", clip), "--videos", "v") == ClipSpec(**load_yaml(clip))


@pytest.mark.parametrize(
    "clip",
    [
        "{scales: [a]}",
        "{fps: 8 fps}",
        "{frames: [1]}",
        "{flip: [1]}",
        "{flip: 2020-01-01}",
        "{stride: -1}",
        "{stride: fast}",
        "[",
        "{frames: !!python/object/apply:os.getcwd []}",
    ],
)
def test_broken_settings_of_a_tokenizer_are_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], clip: str
) -> None:
    with pytest.raises(SystemExit) as stop:
        tokenize("--tokenizer", run_folder(tmp_path / "run", clip))
    assert stop.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1
