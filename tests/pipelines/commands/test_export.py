"""export writes playable videos of clips and their decoded codes, and refuses mistakes in one line."""

from pathlib import Path

import av
import pytest

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
