"""The page of a run says which clips its numbers are of."""

from pathlib import Path

import pytest

from data.sources import Video
from tests.helpers.caches import MakeCache
from tests.helpers.commands import Call

SMALL = [
    *("--objective.clusters", "[1,2,2]", "--objective.width", "24", "--objective.depth", "1", "--objective.heads", "2"),
    *("--objective.decoder_width", "24", "--objective.decoder_depth", "1", "--objective.decoder_heads", "2"),
    *("--precision", "fp32", "--attention", "plain", "--batch_size", "4", "--steps", "2", "--warmup", "1"),
]
PIXELS = ["--objective.input", "pixels", "--objective.target", "pixels"]


@pytest.mark.parametrize("flags", [[], PIXELS], ids=["codes", "pixels"])
@pytest.mark.parametrize("groups", [1, 4])
def test_numbers_of_training_clips_are_not_called_held_out(
    call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make_cache: MakeCache, flags: list[str], groups: int
) -> None:
    monkeypatch.chdir(tmp_path)
    videos = [Video(f"{i:03}.mp4", 1, group=f"g{i % groups}") for i in range(8)]
    make_cache(tmp_path / "caches", videos, codes_shape=(2, 4, 4), keep_pixels="raw")
    summary = call("pretrain_ar", *SMALL, *flags)
    warned = "nothing is held out" in call.err
    text = Path(call("report")["page"]).read_text()
    assert (summary["held_out"], warned, "held out" in text) == ((0, True, False) if groups == 1 else (2, False, True))
    assert ("training clips" in text) == (groups == 1)
