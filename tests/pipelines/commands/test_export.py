"""export writes playable videos of clips and their decoded codes, and refuses mistakes in one line."""

import json
import shutil
from pathlib import Path

import av
import pytest

from tests.helpers.cache_contents import rewritten_manifest
from tests.helpers.caches import MakeCache
from tests.helpers.commands import Call


def test_exported_videos_play(
    finished_project: Path, tmp_path: Path, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(finished_project)
    out = tmp_path / "out"
    files = call("export", "--sample", "3", "train/000007", "--out", str(out))["files"]
    assert [Path(file).name for file in files] == ["000003-test_000003.mp4", "000023-train_000007.mp4"]
    for file in files:
        with av.open(file) as container:
            frames = list(container.decode(video=0))
        assert len(frames) == 16
        assert (frames[0].width, frames[0].height) == (4 * (64 + 8 + 64), 4 * 64)
    assert sorted(path.name for path in out.iterdir()) == sorted(Path(file).name for file in files)


@pytest.mark.parametrize(
    ("flags", "part"),
    [
        (["--sample", "99"], "99"),
        (["--sample", "0/002.mp4"], "damaged for the test"),
        (["--tokenizer", "nowhere"], "nowhere"),
    ],
)
def test_a_mistake_is_one_line(tmp_path: Path, make_cache: MakeCache, call: Call, flags: list[str], part: str) -> None:
    make_cache(tmp_path, name="whole", skip=["0/002.mp4"])
    assert part in call("export", "--cache", "whole", "--caches", str(tmp_path), *flags)


@pytest.mark.parametrize("change", [{"size": 128}, {"frames": 32}, {"size": 68}])
def test_clips_that_have_other_codes_are_refused(
    finished_project: Path, tmp_path: Path, call: Call, monkeypatch: pytest.MonkeyPatch, change: dict[str, int]
) -> None:
    """Pixels and codes of somebody else's cache belong together, whatever its manifest declares."""
    monkeypatch.chdir(finished_project)
    (original,) = Path("caches").glob("*/manifest.json")
    folder = shutil.copytree(original.parent, tmp_path / "other")
    spec = json.loads(original.read_text())["spec"]
    rewritten_manifest(folder, spec={**spec, "clip": {**spec["clip"], **change}})
    message = call("export", "--cache", str(folder), "--out", str(tmp_path / "out"))
    assert "cannot decode" in message
    assert str(next(iter(change.values()))) in message
    assert not (tmp_path / "out").exists()
