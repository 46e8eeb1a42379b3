"""python -m data.cache: its text, its JSON, and its errors."""

import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from data.cache import TokenCache
from data.cache.catalogue import Entry
from data.cache.reader import find_row
from data.cache.tool import _row
from data.clip_spec import ClipSpec
from data.shards import sample_id
from data.sources import Video
from tests.helpers.cache_contents import damage_clip
from tests.helpers.caches import MakeCache
from tests.helpers.commands import ENVIRONMENT, ROOT, Result


def tool(folder: Path, *flags: str) -> Result:
    """Run the command in a folder."""
    return subprocess.run(
        [sys.executable, "-m", "data.cache", *flags],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=120,
        env={**ENVIRONMENT, "PYTHONPATH": str(ROOT)},
    )


def content(result: Result) -> Any:
    """JSON content of stdout."""
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def error_line(result: Result) -> str:
    """The line on stderr after a user's mistake."""
    assert (result.returncode, result.stdout) == (2, ""), result
    (line,) = result.stderr.splitlines()
    assert line.startswith("python -m data.cache")
    return line


@pytest.fixture
def caches(tmp_path: Path, make_cache: MakeCache) -> Path:
    """A folder with a finished cache `finished` of ten videos, one of them skipped, and an unfinished cache `partial`."""
    folder = make_cache(tmp_path / "caches", name="finished", skip=["0/002.mp4"])
    (folder / "made_with.json").write_text('{"videos": "my videos", "tokenizer": "my tokenizer"}')
    make_cache(tmp_path / "caches", 9, name="partial", only_shards=[0], finish=False)
    return tmp_path


@pytest.mark.parametrize(
    "settings, text",
    [
        ({"stride": 2}, "16x64², stride 2,"),
        ({"fps": 12.5}, "16x64² at 12.5 fps, stride 1,"),
        ({"seconds": 2.0}, "16x64² in 2 s,"),
        ({"span": "video"}, "16x64² over the video,"),
    ],
)
def test_list_shows_the_times_of_the_frames_of_a_clip(settings: dict[str, Any], text: str) -> None:
    entry = Entry("cache", "complete", 1, 0.0, clip=asdict(ClipSpec(**settings)))
    assert any(text in cell for cell in _row(entry))


def test_list_shows_finished_and_unfinished_caches(caches: Path) -> None:
    lines = tool(caches, "list").stdout.splitlines()
    assert len(lines) == 3
    finished, partial = (next(line for line in lines if line.startswith(name)) for name in ("finished", "partial"))
    assert "complete" in finished
    assert "10 (1 skipped)" in finished
    assert "my videos" in finished
    assert "1 of 3 shards" in partial
    entries = {entry["name"].partition("-")[0]: entry for entry in content(tool(caches, "list", "--json"))}
    assert (entries["finished"]["videos"], entries["finished"]["clips"], entries["finished"]["codes"]) == (
        10,
        18,
        18 * 18,
    )
    assert (entries["partial"]["videos"], entries["partial"]["clips"]) == (9, None)
    assert entries["finished"]["bytes"] > 10_000


def test_list_without_caches_names_tokenize(tmp_path: Path) -> None:
    assert "pipelines/tokenize.py" in tool(tmp_path, "list").stdout
    assert content(tool(tmp_path, "list", "--json")) == []


def test_list_shows_damaged_caches(caches: Path) -> None:
    (next((caches / "caches").glob("partial-*")) / "plan.json").write_text("{")
    lines = tool(caches, "list").stdout.splitlines()
    assert len(lines) == 3
    assert any("damaged" in line for line in lines)


def test_show_names_tokenizer_videos_and_skipped_videos(caches: Path) -> None:
    text = tool(caches, "show", "finished").stdout
    for part in ("my tokenizer", "my videos", "2 x 3 x 3", "0/002.mp4: damaged for the test", "0: 4, 1: 5"):
        assert part in text
    shown = content(tool(caches, "show", "--json"))
    assert shown["videos"] == 10
    assert shown["used"] == 9
    assert shown["skipped"] == [{"path": "0/002.mp4", "reason": "damaged for the test"}]
    assert shown["label"] == {"0": 4, "1": 5}


def test_verify_passes_an_intact_cache_and_names_each_damaged_sample(caches: Path) -> None:
    result = tool(caches, "verify", "finished")
    assert result.returncode == 0
    assert "9 videos in 3 shards, no damage" in result.stdout
    folder = next((caches / "caches").glob("finished-*"))
    for video in ("1/003.mp4", "0/008.mp4"):
        damage_clip(folder, find_row(TokenCache.open(folder), video))
    result = tool(caches, "verify", "finished")
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    for video in ("1/003.mp4", "0/008.mp4"):
        assert f"sample {sample_id(video)} ({video})" in result.stdout
    assert len(result.stdout.splitlines()) == 3
    damage_of = json.loads(tool(caches, "verify", "finished", "--json").stdout)
    assert [len(lines) for lines in damage_of.values()] == [2]


def test_merge_writes_the_cache_of_all_videos(caches: Path, make_cache: MakeCache) -> None:
    videos = [Video(f"{i}.mp4", i) for i in range(7)]
    for name, part in (("odd", videos[1::2]), ("even", videos[::2])):
        folder = make_cache(caches / "caches", part, name=name)
        (folder / "made_with.json").write_text(f'{{"videos": "{name}", "tokenizer": "t"}}')
    merged = TokenCache.open(caches / content(tool(caches, "merge", "odd", "even", "--json"))["cache"])
    assert merged.name.startswith("odd+even-")
    assert [video.path for video in merged.videos] == [video.path for video in videos]
    assert merged.made_with == {"videos": "odd + even", "tokenizer": "t"}
    reference = TokenCache.open(make_cache(caches / "reference", videos))
    assert merged.manifest == reference.manifest


@pytest.mark.parametrize(
    ("flags", "part"),
    [
        ([], "required: COMMAND"),
        (["frobnicate"], "invalid choice: 'frobnicate'"),
        (["show", "nothing"], "no cache 'nothing' in caches"),
        (["show", "partial"], "no cache 'partial'"),
        (["verify", "file:///etc"], "unsupported scheme 'file'"),
        (["merge", "finished"], "at least 2 caches, got 1"),
        (["export", "finished"], "pipelines/export.py"),
        (["list", "--all"], "unrecognized arguments: --all"),
        (["list", "--js"], "unrecognized arguments: --js"),
    ],
)
def test_mistake_is_one_line(caches: Path, flags: list[str], part: str) -> None:
    assert part in error_line(tool(caches, *flags))


def test_merge_of_different_specifications_is_refused(caches: Path, make_cache: MakeCache) -> None:
    make_cache(caches / "caches", 3, name="other", vocab_size=65)
    assert "vocab_size is 64 and 65" in error_line(tool(caches, "merge", "finished", "other"))
