"""A user's mistake ends with exit code 2 and one line that names the flag or file. Existing files are kept."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from data.cache import TokenCache
from tests.helpers.commands import DIGITS, TINY_MODEL, TINY_TOKENIZER, Call, refused, start


@pytest.fixture
def here(finished_project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder. The runs of the session are in another folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write_video(path: Path, frames: int = 20, value: int = 0) -> None:
    """Write a small H.264 video of moving stripes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=10)
        stream.width, stream.height, stream.pix_fmt = 80, 64, "yuv420p"
        for t in range(frames):
            image = np.zeros((64, 80, 3), np.uint8)
            image[:, (4 * t + value) % 80 :: 16] = 200
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image)))
        container.mux(stream.encode())


def test_a_real_process_exits_with_code_2_and_one_line(tmp_path: Path) -> None:
    line = refused(start(tmp_path, "tokenize", "--videos", "nowhere", launch=[sys.executable]))
    assert line.startswith("tokenize: error: ") and "nowhere" in line


def test_missing_videos(call: Call, here: Path) -> None:
    (here / "empty").mkdir()
    (here / "list.txt").write_text("# videos\nmissing.mp4 walk\n")
    assert "nowhere" in call("tokenize", "--videos", "nowhere")
    assert "empty" in call("tokenize", "--videos", "empty")
    line = call("train_tokenizer", "--videos", "list.txt")
    assert "list.txt, line 2" in line and "missing.mp4" in line


def test_unknown_keys_in_flags_and_files(call: Call, here: Path) -> None:
    (here / "typo.yaml").write_text("stepps: 3\n")
    assert "stepps" in call("pretrain_ar", "--config", "typo.yaml")
    assert "stepps" in call("pretrain_ar", "--stepps", "3")
    assert "absent.yaml" in call("pretrain_ar", "--config", "absent.yaml")
    assert "did you mean keep?" in call("pretrain_ar", "--objective.keeep", "0.5")
    for flag, meant in (("--clip.frame", "--clip.frames"), ("--video", "--videos"), ("--v", "--videos")):
        assert f"{flag}, did you mean {meant}?" in call("tokenize", flag, "8")
    assert "Nonsense" in call("pretrain_ar", "--objective", "Nonsense")
    assert "clip.frames" in call("tokenize", "--clip.frames", "0")
    assert "clip.fps" in call("tokenize", "--clip.fps", "8") and not (here / "runs").exists()
    assert "steps" in call("train_tokenizer", "--steps", "many")


def test_damaged_videos_are_skipped_named_and_counted(
    call: Call, here: Path, finished_project: Path, answers: dict[str, Any]
) -> None:
    for i in range(3):
        write_video(here / "videos" / "a" / f"{i}.mp4", value=i)
        write_video(here / "videos" / "b" / f"{i}.mkv", value=5 * i)
    (here / "videos" / "a" / "zero.mp4").touch()
    (here / "videos" / "a" / "text.mp4").write_text("this is not a video\n" * 50)
    content = (here / "videos" / "b" / "0.mkv").read_bytes()
    (here / "videos" / "b" / "cut.mkv").write_bytes(content[: len(content) // 2])
    write_video(here / "videos" / "b" / "short.mp4", frames=2)
    tokenizer = str(finished_project / answers["train_tokenizer"]["run"])
    summary = call("tokenize", "--videos", "videos", "--tokenizer", tokenizer, "--clip.stride", "3")
    assert (summary["videos"], summary["skipped"], summary["padded"]) == (10, 3, 7)
    (line,) = [line for line in call.err.splitlines() if "padded" in line]
    assert "7 of 7" in line and "46 frames" in line and "--clip.stride 3" in line
    (line,) = [line for line in call.err.splitlines() if "was trained on" in line]
    assert tokenizer in line and "stride 3 (in training 1)" in line
    cache = TokenCache.open(here / summary["cache"])
    frames, slices = cache.clip.frames, cache.layout.grid[0]
    expected = [-(-cache.views(row)[0].real * slices // frames) for row in range(7)]
    assert cache.clips.slices(np.arange(7), np.zeros(7, int)).tolist() == expected
    assert min(expected) < max(expected) < slices
    assert {entry["path"] for entry in cache.manifest["skipped"]} == {"a/zero.mp4", "a/text.mp4", "b/cut.mkv"}
    assert all(entry["reason"] and "\n" not in entry["reason"] for entry in cache.manifest["skipped"])
    assert sorted(video.label for video in cache.videos) == ["a"] * 3 + ["b"] * 4


def test_videos_shorter_than_a_clip_are_counted_for_dense_views_and_other_rates(
    call: Call, here: Path, finished_project: Path, answers: dict[str, Any]
) -> None:
    for name, frames in (("a", 20), ("b", 33), ("c", 30)):
        write_video(here / "videos" / f"{name}.mp4", frames)
    flags = ["--videos", "videos", "--tokenizer", str(finished_project / answers["train_tokenizer"]["run"])]
    assert call("tokenize", *flags, "--clip.views", "dense")["padded"] == 3
    assert "padded" not in call.err, "only the last of several dense views is padded"
    call("tokenize", *flags, "--clip.views", "dense", "--clip.fps", "5")
    (line,) = [line for line in call.err.splitlines() if "padded" in line]
    assert "2 of 3" in line and "16 resampled frames" in line and "--clip.fps 5" in line
    call("tokenize", *flags, "--clip.seconds", "3.2")
    (line,) = [line for line in call.err.splitlines() if "padded" in line]
    assert "2 of 3" in line and "--clip.seconds 3.2" in line


def test_only_damaged_videos(call: Call, here: Path, finished_project: Path, answers: dict[str, Any]) -> None:
    (here / "videos").mkdir()
    (here / "videos" / "only.mp4").touch()
    tokenizer = str(finished_project / answers["train_tokenizer"]["run"])
    assert "only.mp4" in call("tokenize", "--videos", "videos", "--tokenizer", tokenizer)
    assert "only.mp4" in call("train_tokenizer", "--videos", "videos")


def test_a_full_disk_is_one_line_and_the_next_run_completes_the_cache(
    call: Call, here: Path, finished_project: Path, answers: dict[str, Any]
) -> None:
    resource = pytest.importorskip("resource")
    tokenizer = str(finished_project / answers["train_tokenizer"]["run"])
    flags = ["--videos", DIGITS, "--tokenizer", tokenizer, "--keep_pixels", "raw"]
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, before[1]))  # no file grows past 1 MiB
    try:
        assert "File too large" in call("tokenize", *flags, "--shard_size", "7")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    (cache,) = (here / "caches").iterdir()
    assert [path.name for path in (cache / "shards").iterdir()] == []
    summary = call("tokenize", *flags, "--shard_size", "7")
    assert (summary["videos"], summary["reused"]) == (40, False)
    TokenCache.open(here / summary["cache"]).verify()


def test_tokenizers_that_do_not_fit(call: Call, here: Path, finished_project: Path, answers: dict[str, Any]) -> None:
    tokenizer = str(finished_project / answers["train_tokenizer"]["run"])
    (here / "foreign").mkdir()
    assert "foreign" in call("tokenize", "--tokenizer", "foreign")
    line = call("tokenize", "--tokenizer", tokenizer, "--clip.size", "60")
    for part in ("60x60", "vq3d-2x8x8-fsq1000", "height", "multiple of 8", "56 or 64"):
        assert part in line


def test_clusters_that_do_not_divide_the_grid(call: Call, here: Path, finished_project: Path) -> None:
    line = call("pretrain_ar", "--caches", str(finished_project / "caches"), "--objective.clusters", "[3,4,4]")
    assert "3x4x4" in line and "8x8x8" in line


def test_missing_and_unfinished_caches(call: Call, copy_of: Callable[[], Path], answers: dict[str, Any]) -> None:
    copy = copy_of()
    caches = str(copy / "caches")
    assert str(copy / "none") in call("pretrain_ar", "--caches", str(copy / "none"))
    assert "zzz" in call("pretrain_ar", "--caches", caches, "--cache", "zzz")
    (copy / answers["tokenize"]["cache"] / "manifest.json").unlink()
    assert "finished" in call("pretrain_ar", "--caches", caches)


def test_an_edited_manifest_is_refused(call: Call, copy_of: Callable[[], Path], answers: dict[str, Any]) -> None:
    manifest = copy_of() / answers["tokenize"]["cache"] / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"samples": 40', '"samples": 41'))
    line = call("pretrain_ar", "--cache", str(manifest.parent))
    assert "manifest.json" in line


def test_a_run_folder_of_another_configuration(
    call: Call, copy_of: Callable[[], Path], answers: dict[str, Any]
) -> None:
    copy = copy_of()
    folder = copy / answers["pretrain_ar"]["run"]
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    flags = [*TINY_MODEL, "--caches", str(copy / "caches"), "--out", str(folder), "--lr", "0.5"]
    line = call("pretrain_ar", *flags)
    assert f"--out {folder}" in line
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_probe_and_report_without_a_run(call: Call, here: Path) -> None:
    assert "pretrain_ar" in call("probe")
    assert "pretrain_ar" in call("report")
    assert "--run nowhere" in call("probe", "--run", "nowhere")


def test_a_cache_of_another_tokenizer_is_refused_by_the_probe(
    call: Call, copy_of: Callable[[], Path], answers: dict[str, Any]
) -> None:
    copy = copy_of()
    other = call("train_tokenizer", "--videos", DIGITS, *TINY_TOKENIZER, "--seed", "1", "--out", str(copy / "other"))
    flags = ["--videos", DIGITS, "--tokenizer", other["run"], "--caches", str(copy / "caches2")]
    cache = call("tokenize", *flags, "--out", str(copy / "t2"))["cache"]
    line = call("probe", "--run", str(copy / answers["pretrain_ar"]["run"]), "--cache", cache)
    assert f"--cache {cache}" in line and "another tokenizer" in line
