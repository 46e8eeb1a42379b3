"""A user's mistake ends with exit code 2 and one line that names the flag or file; nothing already written is lost."""

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
    """An empty folder with the session's runs at hand."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write_video(path: Path, frames: int = 20, value: int = 0) -> None:
    """A small H.264 video of moving stripes."""
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
    line = refused(start(tmp_path, "tokenize", "--videos", "nowhere"))
    assert line == "tokenize: error: nowhere: no such folder or list file"


def test_videos_that_are_not_there(call: Call, here: Path) -> None:
    (here / "empty").mkdir()
    (here / "list.txt").write_text("# videos\nmissing.mp4 walk\n")
    assert "nowhere: no such folder" in call("tokenize", "--videos", "nowhere")
    assert "empty: contains no video files" in call("tokenize", "--videos", "empty")
    assert "list.txt, line 2: no such video: missing.mp4" in call("train_tokenizer", "--videos", "list.txt")


def test_unknown_keys_in_flags_and_files(call: Call, here: Path) -> None:
    (here / "typo.yaml").write_text("stepps: 3\n")
    assert "stepps" in call("pretrain_ar", "--config", "typo.yaml")
    assert "stepps" in call("pretrain_ar", "--stepps", "3")
    assert "absent.yaml" in call("pretrain_ar", "--config", "absent.yaml")
    assert "keeep" in call("pretrain_ar", "--objective.keeep", "0.5")
    assert "Nonsense" in call("pretrain_ar", "--objective", "Nonsense")
    assert "clip.frames must be at least 1, got 0" in call("tokenize", "--clip.frames", "0")
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
    made = call("tokenize", "--videos", "videos", "--tokenizer", tokenizer, "--clip.stride", "3")
    assert (made["videos"], made["skipped"], made["padded"]) == (10, 3, 7)
    cache = TokenCache.open(here / made["cache"])
    frames, slices = cache.clip.frames, cache.codes_shape[0]
    wanted = [-(-cache.views(row)[0].real * slices // frames) for row in range(7)]
    assert cache.clips.slices(np.arange(7), np.zeros(7, int)).tolist() == wanted and min(wanted) < max(wanted) < slices
    assert {entry["path"] for entry in cache.manifest["skipped"]} == {"a/zero.mp4", "a/text.mp4", "b/cut.mkv"}
    assert all(entry["reason"] and "\n" not in entry["reason"] for entry in cache.manifest["skipped"])
    assert sorted(video.label for video in cache.videos) == ["a"] * 3 + ["b"] * 4


def test_nothing_but_damaged_videos(call: Call, here: Path, finished_project: Path, answers: dict[str, Any]) -> None:
    (here / "videos").mkdir()
    (here / "videos" / "only.mp4").touch()
    tokenizer = str(finished_project / answers["train_tokenizer"]["run"])
    assert "none of the 1 videos can be used" in call("tokenize", "--videos", "videos", "--tokenizer", tokenizer)
    assert "only.mp4: empty file" in call("train_tokenizer", "--videos", "videos")


def test_a_full_disk_is_one_line_and_the_next_run_completes(
    call: Call, here: Path, finished_project: Path, answers: dict[str, Any]
) -> None:
    resource = pytest.importorskip("resource")
    flags = [
        "--videos",
        DIGITS,
        "--tokenizer",
        str(finished_project / answers["train_tokenizer"]["run"]),
        "--keep_pixels",
        "raw",
    ]
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, before[1]))  # no file grows past 1 MiB
    try:
        assert "File too large" in call("tokenize", *flags, "--shard_size", "7")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    (cache,) = (here / "caches").iterdir()
    assert [path.name for path in (cache / "shards").iterdir()] == []
    made = call("tokenize", *flags, "--shard_size", "7")
    assert (made["videos"], made["reused"]) == (40, False)
    TokenCache.open(here / made["cache"]).verify()


def test_tokenizers_that_do_not_fit(call: Call, here: Path, finished_project: Path, answers: dict[str, Any]) -> None:
    tokenizer = str(finished_project / answers["train_tokenizer"]["run"])
    (here / "foreign").mkdir()
    assert "foreign: not a tokenizer" in call("tokenize", "--tokenizer", "foreign")
    line = call("tokenize", "--tokenizer", tokenizer, "--clip.size", "60")
    for part in ("60x60 does not fit vq3d-2x8x8-fsq1000", "height must be a multiple of 8 (56 or 64 would do)"):
        assert part in line


def test_clusters_that_do_not_divide_the_grid(call: Call, here: Path, finished_project: Path) -> None:
    line = call("pretrain_ar", "--caches", str(finished_project / "caches"), "--objective.clusters", "[3,4,4]")
    assert "clusters of 3x4x4 tokens do not divide the grid of 8x8x8 tokens" in line


def test_caches_that_are_not_there_or_unfinished(
    call: Call, copy_of: Callable[[], Path], answers: dict[str, Any]
) -> None:
    copy = copy_of()
    caches = str(copy / "caches")
    assert "no finished cache" in call("pretrain_ar", "--caches", str(copy / "none"))
    assert "no cache 'zzz'" in call("pretrain_ar", "--caches", caches, "--cache", "zzz")
    (copy / answers["tokenize"]["cache"] / "manifest.json").unlink()
    assert "no finished cache" in call("pretrain_ar", "--caches", caches)


def test_an_edited_manifest_is_refused(call: Call, copy_of: Callable[[], Path], answers: dict[str, Any]) -> None:
    manifest = copy_of() / answers["tokenize"]["cache"] / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"samples": 40', '"samples": 41'))
    line = call("pretrain_ar", "--cache", str(manifest.parent))
    assert "manifest.json: was changed after it was written" in line


def test_a_run_folder_of_another_configuration(
    call: Call, copy_of: Callable[[], Path], answers: dict[str, Any]
) -> None:
    copy = copy_of()
    folder = copy / answers["pretrain_ar"]["run"]
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    flags = [*TINY_MODEL, "--caches", str(copy / "caches"), "--out", str(folder), "--lr", "0.5"]
    line = call("pretrain_ar", *flags)
    assert "contains a run with other settings" in line
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_probe_and_report_without_a_run(call: Call, here: Path) -> None:
    assert "no finished run of pretrain_ar" in call("probe")
    assert "no finished run of pretrain_ar" in call("report")
    assert "--run nowhere: not a run folder" in call("probe", "--run", "nowhere")


def test_a_cache_of_another_tokenizer_is_refused_by_the_probe(
    call: Call, copy_of: Callable[[], Path], answers: dict[str, Any]
) -> None:
    copy = copy_of()
    other = call("train_tokenizer", "--videos", DIGITS, *TINY_TOKENIZER, "--seed", "1", "--out", str(copy / "other"))
    flags = [
        "--videos",
        DIGITS,
        "--tokenizer",
        other["run"],
        "--caches",
        str(copy / "caches2"),
        "--out",
        str(copy / "t2"),
    ]
    made = call("tokenize", *flags)
    line = call("probe", "--run", str(copy / answers["pretrain_ar"]["run"]), "--cache", made["cache"])
    assert "was made by another tokenizer" in line
