"""Malicious caches are read or refused. None of their code runs, no file is written, and nothing hangs."""

import copy
import json
import os
import pickle
import random
import resource
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from data.cache import DamagedCache, TokenCache, find_cache
from data.cache.catalogue import list_caches
from data.cache.manifest import Manifest, Specification
from data.cache.spec import FORMAT
from data.sources import Video
from tests.helpers.audited_process import OPERATIONS, audited, run_all
from tests.helpers.caches import MakeCache
from tests.helpers.forged_caches import CASES, Forgery, Payload, seal

MEMORY = 2**29


def snapshot(folder: Path) -> dict[str, tuple[int, int]]:
    return {str(path): (path.lstat().st_size, path.lstat().st_mtime_ns) for path in folder.rglob("*")}


# --- shards


@pytest.mark.parametrize("name", CASES)
def test_forged_cache_is_read_or_refused_without_side_effects(folder: Path, tmp_path: Path, name: str) -> None:
    make, refused_at = CASES[name]
    forgery = Forgery(folder, tmp_path / "canary")
    make(forgery)
    forgery.seal()
    before = snapshot(tmp_path)
    outcome = audited(folder, Path(f"{tmp_path}.notes"))
    assert outcome.events == []
    assert outcome.undocumented == []
    assert outcome.refused_at == refused_at
    assert outcome.codes_match or refused_at in ("open", "codes")
    assert outcome.memory < MEMORY
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("file", ["manifest.json", "shards/000000.json", "shards/000000.tar", "codebook.safetensors"])
def test_named_pipe_instead_of_a_file_does_not_hang(folder: Path, tmp_path: Path, file: str) -> None:
    forgery = Forgery(folder, tmp_path / "canary")
    if file.endswith("tar"):
        # The size of a pipe is 0 bytes.
        forgery.empty(0)
    forgery.manifest["codebook"] = "0" * 64
    forgery.seal()
    (folder / file).unlink(missing_ok=True)
    os.mkfifo(folder / file)
    outcome = audited(folder, Path(f"{tmp_path}.notes"), timeout=3)
    assert outcome.undocumented == []
    assert outcome.refused_at is not None


def test_audited_process_reports_forbidden_actions(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:

    def careless(cache: TokenCache) -> None:
        pickle.loads(pickle.dumps(Payload(tmp_path / "canary")))
        exec("x = 1")
        (tmp_path / "written").touch()
        raise AttributeError

    monkeypatch.setitem(OPERATIONS, "careless", careless)
    outcome = audited(folder, Path(f"{tmp_path}.notes"))
    assert (tmp_path / "canary").exists()
    assert {event.split()[0] for event in outcome.events} >= {"pickle.find_class", "os.system", "exec", "open"}
    assert outcome.undocumented == ["AttributeError of careless: "]
    monkeypatch.setitem(OPERATIONS, "careless", lambda cache: time.sleep(60))
    with pytest.raises(TimeoutError):
        audited(folder, Path(f"{tmp_path}.notes"), timeout=0.5)


# --- hostile texts instead of paths

TEXTS = [
    "pipe:touch {canary}",
    "pipe: touch {canary} |",
    "; touch {canary};",
    "$(touch {canary})",
    "`touch {canary}`",
    "| touch {canary}",
    "a && touch {canary}",
    "file://{canary}",
    "file:{canary}",
    "s3://bucket/$(touch {canary})",
    "gs://bucket/`touch {canary}`",
    "ftp://host/{canary}",
    "../../{canary}",
    "..",
    "{canary}",
    "shards/../../x",
    "-exec touch {canary}",
    "a\0b",
    "a\nb",
]


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("suffix", ["", ".tar"])
def test_hostile_shard_name_is_refused(folder: Path, tmp_path: Path, text: str, suffix: str) -> None:
    forgery = Forgery(folder, tmp_path / "canary")
    forgery.manifest["shards"][0]["file"] = text.format(canary=tmp_path / "canary") + suffix
    before = snapshot(tmp_path)
    seal(folder, forgery.manifest)
    with pytest.raises(DamagedCache, match="invalid shard name"):
        TokenCache.open(folder)
    outcome = audited(folder, Path(f"{tmp_path}.notes"))
    assert (outcome.events, outcome.refused_at) == ([], "open")
    assert before.keys() == snapshot(tmp_path).keys()


@pytest.mark.parametrize("text", TEXTS)
def test_hostile_address_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    # If installed, these packages would try to connect.
    for package in ("s3fs", "gcsfs"):
        monkeypatch.setitem(sys.modules, package, None)
    address = text.format(canary=tmp_path / "canary")
    with pytest.raises(ValueError):
        TokenCache.open(address)
    with pytest.raises(ValueError):
        TokenCache.open(find_cache(tmp_path, address))
    outcome = audited(address, Path(f"{tmp_path}.notes"))
    assert (outcome.events, outcome.refused_at) == ([], "open")
    assert list(tmp_path.iterdir()) == []


def test_hostile_video_names_are_only_text(tmp_path: Path, make_cache: MakeCache) -> None:
    names = sorted(text.format(canary=tmp_path / "canary") for text in TEXTS)
    folder = make_cache(tmp_path / "caches", [Video(name, 1, label=name, group=name) for name in names])
    before = snapshot(tmp_path)
    outcome = audited(folder, Path(f"{tmp_path}.notes"))
    assert (outcome.events, outcome.errors, outcome.codes_match) == ([], {}, True)
    assert snapshot(tmp_path) == before
    cache = TokenCache.open(folder)
    assert [video.path for video in cache.videos] == [cache.facts(i)["label"] for i in range(len(cache))] == names


# --- random changes


VALUES: list[Any] = [
    *(None, True, False, 0, 1, -1, 2, 7, 255, 65536, 2**31, 2**32, 2**53, 2**63 - 1, 2**63, 2**64, -(2**63), 10**400),
    *(0.5, -0.0, 1e308, float("nan"), float("inf"), "", "x", "0", "../x", "\0", "\ud800", "dense", "raw", "jpeg", "=="),
    *([], [[]], [None], [-1], [0] * 1000, {}, {"a": None}, [[[[[[[[1]]]]]]]], json.loads("[" * 500 + "]" * 500)),
]


def changed_value(content: Any, draw: random.Random) -> Any:
    """Return JSON content in which one value is replaced, deleted, duplicated, or overwritten with another of its values."""
    content = copy.deepcopy(content)
    places = [(content, key) for key in content]
    for container, key in places:
        value = container[key]
        if isinstance(value, (dict, list)):
            places += [(value, k) for k in (value if isinstance(value, dict) else range(len(value)))]
    container, key = draw.choice(places)
    kind = draw.randrange(8)
    if kind == 0:
        del container[key]
    elif kind == 1 and isinstance(container, list):
        container.insert(key, container[key])
    elif kind == 2:
        other, name = draw.choice(places)
        container[key] = copy.deepcopy(other[name])
    elif kind == 3 and isinstance(container[key], int):
        container[key] += draw.choice([-1, 1, 2**16, -(2**16)])
    else:
        container[key] = draw.choice(VALUES)
    return content


def changed_bytes(content: Any, draw: random.Random) -> Any:
    """Return JSON content after a change of its text, or None if the text is no longer JSON."""
    text = bytearray(json.dumps(content).encode())
    for _ in range(draw.choice([1, 1, 2, 4])):
        first = draw.randrange(len(text))
        end = first + draw.choice([0, 1, 1, 1, 3, 20])
        text[first:end] = draw.choice(
            [b"", b"9", b"-", b"e9", b"0", b'"', b"[", b",", draw.randbytes(1), text[first:end] * 2]
        )
    try:
        return json.loads(text)
    except ValueError:
        return None


CHANGES: dict[str, Callable[[Any, random.Random], Any]] = {"value": changed_value, "bytes": changed_bytes}


@pytest.mark.parametrize("file", ["manifest", "record"])
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("count", [100, pytest.param(5000, marks=pytest.mark.soak)])
def test_random_change_with_valid_checksums_is_harmless_or_refused(
    folder: Path, tmp_path: Path, file: str, change: str, count: int
) -> None:
    draw, original = random.Random(f"{file} {change}"), Forgery(folder, tmp_path)
    slowest, before = 0.0, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    undocumented: dict[str, str] = {}
    while count:
        forgery = copy.deepcopy(original)
        content = CHANGES[change](getattr(forgery, file), draw)
        try:
            if file == "record":
                forgery.record = content
                forgery.seal()
            else:
                seal(folder, content)
        except (TypeError, AttributeError, KeyError, ValueError, IndexError):
            # No valid checksums exist for this content.
            continue
        count -= 1
        began = time.perf_counter()
        for operation, error in run_all(folder):
            if error is not None and not isinstance(error, (DamagedCache, ValueError, OSError)):
                undocumented[f"{type(error).__name__} of {operation}: {error}"] = json.dumps(content)
        try:
            list_caches(folder.parent)
        except Exception as error:
            undocumented[f"{type(error).__name__} of list_caches: {error}"] = json.dumps(content)
        slowest = max(slowest, time.perf_counter() - began)
    assert undocumented == {}
    assert slowest < 1
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < MEMORY // 1024


@pytest.mark.parametrize("file", ["manifest.json", "shards/000000.json"])
@pytest.mark.parametrize("content", [b"[" * 10**5, b'{"a":' * 10**5, b"9" * 10**5, b"\xff\xfe", b"", b"nul"])
def test_text_that_is_not_reasonable_json_is_refused(folder: Path, file: str, content: bytes) -> None:
    (folder / file).write_bytes(content)
    with pytest.raises(DamagedCache, match=file):
        TokenCache.open(folder)


@pytest.mark.parametrize("depth", [900, 980, 985, 990, 2000])
@pytest.mark.parametrize("name", ["format", "key", "spec", "x"])
def test_deep_nesting_is_refused(folder: Path, name: str, depth: int) -> None:
    fields = {"format": f'"{FORMAT}"', "key": '"k"', "spec": "{}", name: "[" * depth + "]" * depth}
    (folder / "manifest.json").write_text("{" + ", ".join(f'"{k}": {v}' for k, v in fields.items()) + "}")
    with pytest.raises(DamagedCache, match=r"manifest\.json"):
        TokenCache.open(folder)
    assert len(list_caches(folder.parent)) == 1
    with pytest.raises(ValueError, match="no cache"):
        find_cache(folder.parent, "another")


FALSE: list[Any] = ["<script>", None, True, -1, 10**30, 1.5, [1], {"a": 1}, [[[]]]]
NULLABLE = {"codebook", "bf16", "spec.levels"}


@pytest.mark.parametrize(
    "name", sorted({*Manifest.__required_keys__, *(f"spec.{key}" for key in Specification.__required_keys__)})
)
def test_missing_field_or_false_type_of_a_manifest_is_refused(folder: Path, name: str) -> None:
    """A valid checksum says nothing about the content, which commands and pages use."""
    original = json.loads((folder / "manifest.json").read_text())
    part, _, key = name.rpartition(".")
    kinds = {type((original[part] if part else original)[key]), *({str, type(None)} if name in NULLABLE else {})}
    if name == "unigram_bits":
        kinds = {int, float}
    for value in ["missing", *(value for value in FALSE if type(value) not in kinds)]:
        manifest = copy.deepcopy(original)
        fields = manifest[part] if part else manifest
        fields[key] = value
        if value == "missing":
            del fields[key]
        seal(folder, manifest)
        if name == "key" and value != "missing":
            # `seal` writes the valid key.
            (folder / "manifest.json").write_text(json.dumps({**manifest, "key": value}))
        elif name == "key":
            continue
        with pytest.raises(DamagedCache, match=r"manifest\.json"):
            TokenCache.open(folder)
        list_caches(folder.parent)


# --- damaged caches in the same folder


DAMAGED_FILES: dict[str, Any] = {
    "empty": b"",
    "a list": b"[]",
    "empty object": {},
    "spec is null": {"format": FORMAT, "spec": None},
    "videos is a number": {"format": FORMAT, "spec": {"videos": 5}},
    "skipped is a number": {"format": FORMAT, "spec": {}, "skipped": 5},
    "key is a list": {"format": FORMAT, "spec": {}, "key": []},
    "folder instead of a file": None,
}


@pytest.mark.parametrize("name", ["manifest.json", "plan.json", "made_with.json"])
@pytest.mark.parametrize("kind", DAMAGED_FILES)
def test_damaged_cache_does_not_hide_others(folder: Path, name: str, kind: str) -> None:
    key = TokenCache.open(folder).key
    damaged = shutil.copytree(folder, folder.parent / "damaged")
    (damaged / "manifest.json").rename(damaged / "manifest.json" if name == "made_with.json" else damaged / "gone")
    content = DAMAGED_FILES[kind]
    if content is None:
        (damaged / name).unlink(missing_ok=True)
        (damaged / name).mkdir()
    else:
        (damaged / name).write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    entries = {entry.name: entry for entry in list_caches(folder.parent)}
    assert entries.keys() == {folder.name, "damaged"}
    assert (entries[folder.name].state, entries[folder.name].videos) == ("complete", 4)
    assert find_cache(folder.parent, folder.name[:8]) == str(folder)
    # With a damaged made_with.json both caches have this key.
    if name != "made_with.json":
        assert find_cache(folder.parent, key[:6]) == str(folder)


def test_plan_with_shards_of_zero_videos_is_listed(folder: Path) -> None:
    (folder / "manifest.json").unlink()
    (folder / "plan.json").write_text('{"spec": {"videos": []}, "shard_size": 0}')
    assert len(list_caches(folder.parent)) == 1
