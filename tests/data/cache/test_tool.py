"""python -m data.cache: what a person reads, what a script reads, and what a mistake ends with."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from data.cache import TokenCache
from data.shards import sample_id
from data.sources import Video
from tests.helpers.caches import MakeCache
from tests.helpers.commands import ENVIRONMENT, ROOT, Result


def tool(folder: Path, *flags: str) -> Result:
    return subprocess.run(
        [sys.executable, "-m", "data.cache", *flags],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=120,
        env={**ENVIRONMENT, "PYTHONPATH": str(ROOT)},
    )


def answer(result: Result) -> Any:
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def mistake(result: Result) -> str:
    """The one line that a user's mistake ends with."""
    assert (result.returncode, result.stdout) == (2, ""), result
    (line,) = result.stderr.splitlines()
    assert line.startswith("python -m data.cache")
    return line


@pytest.fixture
def caches(tmp_path: Path, make_cache: MakeCache) -> Path:
    """A folder with a finished cache `whole` of ten videos, one of them skipped, and an unfinished one."""
    folder = make_cache(tmp_path / "caches", name="whole", skip=["0/002.mp4"])
    (folder / "made_with.json").write_text('{"videos": "my videos", "tokenizer": "my tokenizer"}')
    make_cache(tmp_path / "caches", 9, name="torn", only_shards=[0], finish=False)
    return tmp_path


def damage(folder: Path, video: str) -> None:
    """Change one byte of the codes of a video."""
    cache = TokenCache.open(folder)
    row = [v.path for v in cache.videos].index(video)
    tar = Path(folder, cache.shards[cache.clips.shard_N[row]].file)
    content = bytearray(tar.read_bytes())
    place = content.index(cache.codes(row).tobytes())
    content[place] ^= 1
    tar.write_bytes(content)


def test_list_shows_finished_and_unfinished_caches(caches: Path) -> None:
    lines = tool(caches, "list").stdout.splitlines()
    assert len(lines) == 3
    whole, torn = (next(line for line in lines if line.startswith(name)) for name in ("whole", "torn"))
    assert "complete" in whole
    assert "10 (1 skipped)" in whole
    assert "my videos" in whole
    assert "1 of 3 shards" in torn
    entries = {entry["name"].partition("-")[0]: entry for entry in answer(tool(caches, "list", "--json"))}
    assert (entries["whole"]["videos"], entries["whole"]["clips"], entries["whole"]["codes"]) == (10, 18, 18 * 18)
    assert (entries["torn"]["videos"], entries["torn"]["clips"]) == (9, None)
    assert entries["whole"]["bytes"] > 10_000


def test_list_of_nothing_says_how_to_make_one(tmp_path: Path) -> None:
    assert "no caches in caches; make one with pipelines/tokenize.py" in tool(tmp_path, "list").stdout
    assert answer(tool(tmp_path, "list", "--json")) == []


def test_list_goes_on_after_a_damaged_cache(caches: Path) -> None:
    (next((caches / "caches").glob("torn-*")) / "plan.json").write_text("{")
    lines = tool(caches, "list").stdout.splitlines()
    assert len(lines) == 3
    assert any("damaged" in line for line in lines)


def test_show_tells_what_made_it_and_what_was_skipped(caches: Path) -> None:
    text = tool(caches, "show", "whole").stdout
    for part in ("my tokenizer", "my videos", "2 x 3 x 3", "0/002.mp4: damaged for the test", "0: 4, 1: 5"):
        assert part in text
    shown = answer(tool(caches, "show", "--json"))
    assert shown["videos"] == 10
    assert shown["used"] == 9
    assert shown["skipped"] == [{"path": "0/002.mp4", "reason": "damaged for the test"}]
    assert shown["label"] == {"0": 4, "1": 5}


def test_verify_passes_a_whole_cache_and_names_each_damaged_sample(caches: Path) -> None:
    result = tool(caches, "verify", "whole")
    assert result.returncode == 0
    assert "9 videos in 3 shards, all as they were written" in result.stdout
    folder = next((caches / "caches").glob("whole-*"))
    for video in ("1/003.mp4", "0/008.mp4"):
        damage(folder, video)
    result = tool(caches, "verify", "whole")
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    for video in ("1/003.mp4", "0/008.mp4"):
        assert f"sample {sample_id(video)} ({video})" in result.stdout
    assert len(result.stdout.splitlines()) == 3
    found = json.loads(tool(caches, "verify", "whole", "--json").stdout)
    assert [len(lines) for lines in found.values()] == [2]


def test_merge_joins_what_was_made_apart(caches: Path, make_cache: MakeCache) -> None:
    videos = [Video(f"{i}.mp4", i) for i in range(7)]
    for name, part in (("odd", videos[1::2]), ("even", videos[::2])):
        folder = make_cache(caches / "caches", part, name=name)
        (folder / "made_with.json").write_text(f'{{"videos": "{name}", "tokenizer": "t"}}')
    made = answer(tool(caches, "merge", "odd", "even", "--json"))
    joined = TokenCache.open(caches / made["cache"])
    assert joined.name.startswith("odd+even-")
    assert [video.path for video in joined.videos] == [video.path for video in videos]
    assert joined.made_with == {"videos": "odd + even", "tokenizer": "t"}
    straight = TokenCache.open(make_cache(caches / "straight", videos))
    assert joined.manifest == straight.manifest


@pytest.mark.parametrize(
    ("flags", "part"),
    [
        ([], "required: COMMAND"),
        (["frobnicate"], "invalid choice: 'frobnicate'"),
        (["show", "nothing"], "no cache 'nothing' in caches"),
        (["show", "torn"], "no cache 'torn'"),
        (["verify", "file:///etc"], "file: is no scheme that caches are read from"),
        (["merge", "whole"], "two caches or more"),
        (["export", "whole"], "pipelines/export.py"),
        (["list", "--all"], "unrecognized arguments: --all"),
    ],
)
def test_a_mistake_is_one_line(caches: Path, flags: list[str], part: str) -> None:
    assert part in mistake(tool(caches, *flags))


def test_merge_of_unlike_caches_is_refused(caches: Path, make_cache: MakeCache) -> None:
    make_cache(caches / "caches", 3, name="other", vocab_size=65)
    assert "they differ in vocab_size of 64 and 65" in mistake(tool(caches, "merge", "whole", "other"))
