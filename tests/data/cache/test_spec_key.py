"""The key of a cache changes with everything that determines its content, and with nothing else."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

import data.cache.spec
from data.cache import CacheSpec, CacheWriter, TokenCache, key_of
from data.cache.layout import CodeLayout
from data.cache.spec import cutting
from data.clip_spec import ClipSpec
from data.sources import load_source
from tests.helpers.cache_contents import SPEC, VIDEOS, files_of, filled, in_a_child
from tests.helpers.caches import MakeCache

CHANGES: dict[str, dict[str, Any]] = {
    "tokenizer": {"tokenizer": "other"},
    "grid": {"codes": replace(SPEC.codes, grid=(2, 3, 4))},
    "vocabulary": {"codes": CodeLayout((2, 3, 3), 65)},
    "levels": {"codes": replace(SPEC.codes, levels=((4, 16),))},
    "no levels": {"codes": replace(SPEC.codes, levels=None)},
    "two codes per place": {"codes": CodeLayout((2, 3, 3), 64, 2)},
    "levels of two codes": {"codes": CodeLayout((2, 3, 3), 64, 2, ((8, 8), (8, 8)))},
    "other levels of two codes": {"codes": CodeLayout((2, 3, 3), 64, 2, ((8, 8), (8, 7)))},
    "frames": {"clip": replace(SPEC.clip, frames=5)},
    "size": {"clip": replace(SPEC.clip, size=9)},
    "stride": {"clip": replace(SPEC.clip, stride=2)},
    "views": {"clip": replace(SPEC.clip, views=3)},
    "dense": {"clip": replace(SPEC.clip, views="dense")},
    "flip": {"clip": replace(SPEC.clip, flip=True)},
    "rate": {"clip": replace(SPEC.clip, fps=10)},
    "scales": {"clip": replace(SPEC.clip, scales=(1, 0.75))},
    "seconds": {"clip": replace(SPEC.clip, seconds=2)},
    "spread over the video": {"clip": replace(SPEC.clip, span="video")},
    "precision": {"precision": "bf16"},
    "batch": {"encode_batch": 3},
    "pixels": {"keep_pixels": "raw"},
    "jpeg": {"keep_pixels": "jpeg"},
    "decoder": {"decoder": "pyav-0"},
    "cutting": {"cutting": "clips-0 digits-1 jpeg-92"},
    "path": {"videos": (replace(VIDEOS[0], path="c.mp4"), VIDEOS[1])},
    "bytes": {"videos": (replace(VIDEOS[0], size=7), VIDEOS[1])},
    "label": {"videos": (replace(VIDEOS[0], label="jump"), VIDEOS[1])},
    "no label": {"videos": (replace(VIDEOS[0], label=None), VIDEOS[1])},
    "group": {"videos": (replace(VIDEOS[0], group="h"), VIDEOS[1])},
    "split": {"videos": (replace(VIDEOS[0], split="val"), VIDEOS[1])},
    "label for group": {"videos": (replace(VIDEOS[0], label="g", group="run"), VIDEOS[1])},
    "fewer videos": {"videos": VIDEOS[:1]},
    "more videos": {"videos": (*VIDEOS, replace(VIDEOS[1], path="c.mp4"))},
    "order": {"videos": VIDEOS[::-1]},
}


@pytest.mark.parametrize("change", CHANGES)
def test_key_changes_with_every_part_of_the_content(change: str) -> None:
    assert key_of(replace(SPEC, **CHANGES[change]).preimage()) != key_of(SPEC.preimage())


def test_keys_of_all_changes_differ_from_each_other() -> None:
    assert len({key_of(replace(SPEC, **change).preimage()) for change in CHANGES.values()}) == len(CHANGES)


def test_every_field_of_the_specification_is_in_the_preimage() -> None:
    preimage = SPEC.preimage()
    assert set(preimage) - {"codes_shape", "vocab_size", "levels"} == {"format", *vars(SPEC)} - {"codes"}
    several = replace(SPEC, codes=CodeLayout((2, 3, 3), 64, 2)).preimage()
    assert set(several) - set(preimage) == {"codes_per_place"}, "a single code per place is left out"
    assert set(preimage["clip"]) == set(vars(SPEC.clip)) - {"fps", "scales", "seconds", "span"}, "later settings"
    resampled = replace(SPEC, clip=replace(SPEC.clip, fps=10, scales=(1, 0.75))).preimage()
    assert set(resampled["clip"]) == set(vars(SPEC.clip)) - {"seconds", "span"}
    assert ClipSpec(**json.loads(json.dumps(resampled["clip"]))) == replace(SPEC.clip, fps=10, scales=(1, 0.75))


def test_key_changes_with_the_format(monkeypatch: pytest.MonkeyPatch) -> None:
    before = key_of(SPEC.preimage())
    monkeypatch.setattr(data.cache.spec, "FORMAT", "arvideo-cache-0")
    assert key_of(SPEC.preimage()) != before


def test_key_contains_the_version_of_the_decoder() -> None:
    assert av.__version__ in SPEC.preimage()["decoder"]


def test_key_of_a_specification_never_changes() -> None:
    """A different key makes all existing caches useless. If the key must change, FORMAT must change too."""
    fixed = replace(SPEC, decoder="pyav-14.0.0", cutting="clips-1 digits-1 jpeg-92").preimage()
    golden = "4d46455ae620c856621e9a0bc4f3df4703a2d3b6c45adc45f6cf62d0576d66f9"
    assert (fixed["format"], key_of(fixed)) == ("arvideo-cache-2", golden)


def test_only_keys_of_built_in_videos_have_their_version() -> None:
    assert SPEC.cutting == cutting("") == "clips-1 digits-1 jpeg-92"
    assert key_of(replace(SPEC, cutting=cutting("digits-2")).preimage()) != key_of(SPEC.preimage())


# --- what does not change the key


def key_from(videos: str | Path) -> str:
    """Key of a cache of the videos that a `--videos` argument names."""
    return key_of(replace(SPEC, videos=load_source(str(videos)).videos).preimage())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three videos of two classes, and a list file with the same videos and classes."""
    for path in ("run/a.mp4", "run/b c.mp4", "jump/d.mp4"):
        (tmp_path / "set" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "set" / path).write_bytes(path.encode())
    (tmp_path / "set" / "list.txt").write_text("run/a.mp4 run\n'run/b c.mp4' run\njump/d.mp4 jump\n")
    return tmp_path / "set"


def _moved(folder: Path) -> Path:
    return Path(shutil.move(folder, folder.parent / "some where else" / "other name"))


def _touched(folder: Path) -> Path:
    for path in folder.rglob("*"):
        os.utime(path, (1, 1))
    return folder


def _copied(folder: Path) -> Path:
    """Copy in reverse, so that the new folder lists its files in another order."""
    other = folder.parent / "copy"
    for path in sorted(folder.rglob("*.mp4"), reverse=True):
        target = other / path.relative_to(folder)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
    return other


def _behind_a_link(folder: Path) -> Path:
    (folder.parent / "link").symlink_to(folder, target_is_directory=True)
    return folder.parent / "link"


def _relative(folder: Path) -> Path:
    os.chdir(folder.parent)
    return Path("set")


def _with_dots_in_the_path(folder: Path) -> Path:
    return folder.parent / "." / "set" / ".." / "set"


def _next_to_other_files(folder: Path) -> Path:
    (folder / "notes.md").write_text("no video")
    (folder / "run" / "thumbnail.jpg").write_bytes(b"no video")
    return folder


def _read_only(folder: Path) -> Path:
    for path in folder.rglob("*.mp4"):
        path.chmod(0o400)
    return folder


def _as_a_list(folder: Path) -> Path:
    return folder / "list.txt"


def _as_another_list(folder: Path) -> Path:
    (folder / "b.txt").write_text("# again\njump/d.mp4 jump\n\n./run/a.mp4   run # x\n'run/b c.mp4' 'run'\n")
    return folder / "b.txt"


def _as_csv(folder: Path) -> Path:
    (folder / "c.csv").write_text("label,note,path\nrun,x,run/b c.mp4\njump,,jump/d.mp4\nrun,,run/a.mp4\n")
    return folder / "c.csv"


def _as_a_list_of_absolute_paths(folder: Path) -> Path:
    lines = [f"'{folder / path}' {path.split('/')[0]}\n" for path in ("jump/d.mp4", "run/b c.mp4", "run/a.mp4")]
    (folder / "d.txt").write_text("".join(lines))
    return folder / "d.txt"


SAME_VIDEOS: list[Callable[[Path], Path]] = [
    _moved,
    _touched,
    _copied,
    _behind_a_link,
    _relative,
    _with_dots_in_the_path,
    _next_to_other_files,
    _read_only,
    _as_a_list,
    _as_another_list,
    _as_csv,
    _as_a_list_of_absolute_paths,
]


@pytest.mark.parametrize("change", SAME_VIDEOS, ids=lambda change: change.__name__.strip("_"))
def test_key_is_the_same_for_the_same_videos(
    folder: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[Path], Path]
) -> None:
    # _relative changes the working folder; monkeypatch restores it after the test.
    monkeypatch.chdir(folder)
    before = key_from(folder)
    assert key_from(change(folder)) == before


def test_key_does_not_depend_on_environment_variables(folder: Path) -> None:
    variables = {"LOGLEVEL": "DEBUG", "TZ": "Asia/Tokyo", "LC_ALL": "C", "PYTHONHASHSEED": "7", "OMP_NUM_THREADS": "3"}
    code = "import sys; from tests.data.cache.test_spec_key import key_from; print(key_from(sys.argv[1]))"
    output = subprocess.run(
        [sys.executable, "-c", code, str(folder)],
        cwd=Path(__file__).parents[3],
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    ).stdout
    assert output.strip() == key_from(folder)


def test_key_does_not_depend_on_folder_name_or_shard_size(tmp_path: Path) -> None:
    one = CacheWriter(tmp_path / "a", "x", SPEC, 1)
    two = CacheWriter(tmp_path / "b" / "c", "y", SPEC, 100)
    assert one.key == two.key
    assert one.folder == tmp_path / "a" / f"x-{one.key[:12]}"


def test_same_content_under_another_name_is_the_same_cache(tmp_path: Path, make_cache: MakeCache) -> None:
    folder = make_cache(tmp_path, name="first")
    assert make_cache(tmp_path, name="second", shard_size=7) == folder
    assert os.listdir(tmp_path) == [folder.name]


def test_files_do_not_depend_on_the_order_of_shards(tmp_path: Path, make_cache: MakeCache) -> None:
    reference = make_cache(tmp_path / "reference")
    for shards in ([2], [0], [1]):
        reordered = make_cache(tmp_path / "reordered", only_shards=shards, finish=shards == [1])
    assert files_of(reordered) == files_of(reference)


def test_files_do_not_depend_on_the_number_of_processes(tmp_path: Path) -> None:
    spec = replace(SPEC, videos=tuple(replace(VIDEOS[0], path=f"{i:02d}.mp4") for i in range(12)))
    codes = [np.full((2, 2, 3, 3), i) for i in range(12)]
    reference = files_of(filled(tmp_path / "one", spec, codes))
    children = [in_a_child(lambda: filled(tmp_path / "many", spec, codes)) for _ in range(4)]
    assert [child.wait() for child in children] == [0] * 4
    (folder,) = (tmp_path / "many").iterdir()
    assert files_of(folder) == reference


def test_moved_cache_keeps_its_key(tmp_path: Path, make_cache: MakeCache) -> None:
    folder = make_cache(tmp_path)
    key = TokenCache.open(folder).key
    moved = folder.rename(tmp_path / "renamed")
    assert TokenCache.open(moved).key == key
    assert not CacheSpec.__dataclass_fields__.keys() & {"folder", "workers", "shard_size", "processes", "out"}
