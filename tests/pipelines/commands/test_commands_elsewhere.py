"""Runs and caches work from any working folder, also old ones and moved ones, and no recorded folder is taken for a hub id."""

import json
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from data.cache import TokenCache
from tests.helpers.commands import TINY_MODEL, Call


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder, in which every connection of this process fails the test."""

    def connect(*_: object) -> None:
        pytest.fail("a command used the network")

    (tmp_path / "else where").mkdir()
    monkeypatch.chdir(tmp_path / "else where")
    monkeypatch.setattr(socket.socket, "connect", connect)
    monkeypatch.setattr(socket, "getaddrinfo", connect)
    return tmp_path / "else where"


def age(project: Path, tokenizer: str) -> None:
    """Make the records of a project look like those of earlier versions: relative paths, no working folder."""
    for file in project.glob("caches/*/made_with.json"):
        file.write_text(json.dumps({**json.loads(file.read_text()), "tokenizer": tokenizer}))
    for file in project.glob("runs/**/environment.json"):
        environment = json.loads(file.read_text())
        del environment["folder"]
        file.write_text(json.dumps(environment))


@pytest.mark.parametrize("records", ["new", "old", "moved"])
def test_commands_find_what_a_run_has_recorded(
    call: Call, copy_of: Callable[[], Path], answers: dict[str, Any], elsewhere: Path, records: str
) -> None:
    project = copy_of()
    if records == "old":
        age(project, answers["train_tokenizer"]["run"])
    if records == "moved":
        for file in project.glob("caches/*/made_with.json"):
            file.write_text(
                file.read_text().replace(str(Path(answers["tokenize"]["tokenizer"]).parts[0]), "/gone/runs", 1)
            )
    run, cache = str(project / answers["pretrain_ar"]["run"]), str(project / answers["tokenize"]["cache"])
    exported = call("export", "--cache", cache, "--sample", "3")
    assert [Path(file).exists() for file in exported["files"]] == [True]
    page = Path(call("report", "--run", run, "--out", "page")["page"]).read_text()
    assert "There are no reconstructions" not in page
    for command in ("train_tokenizer", "tokenize", "pretrain_ar", "probe"):
        assert f"{command}.py</span>" in page
    if records == "old":
        assert call("probe", "--run", run, "--seeds", "1")["cache"] == cache
    if records == "new":
        assert call("pretrain_ar", "--cache", cache, *TINY_MODEL)["cache"] == cache


def test_a_recorded_folder_that_has_gone_is_no_hub_id(
    call: Call, copy_of: Callable[[], Path], answers: dict[str, Any], elsewhere: Path
) -> None:
    project = copy_of()
    shutil.rmtree(project / answers["train_tokenizer"]["run"])
    age(project, answers["train_tokenizer"]["run"])
    cache = str(project / answers["tokenize"]["cache"])
    assert answers["train_tokenizer"]["run"] in call("export", "--cache", cache)
    page = call("report", "--run", str(project / answers["pretrain_ar"]["run"]))["page"]
    assert "There are no reconstructions" in Path(page).read_text()


def test_videos_are_found_from_another_folder(
    call: Call,
    finished_project: Path,
    answers: dict[str, Any],
    tmp_path: Path,
    video_folder: Path,
    elsewhere: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shutil.copytree(video_folder, tmp_path / "project" / "my videos")
    monkeypatch.chdir(tmp_path / "project")
    tokenizer = str(finished_project / answers["train_tokenizer"]["run"])
    cache = tmp_path / "project" / call("tokenize", "--videos", "my videos", "--tokenizer", tokenizer)["cache"]
    assert TokenCache.open(cache).made_with["videos"] == str(tmp_path / "project" / "my videos")
    monkeypatch.chdir(elsewhere)
    assert call("export", "--cache", str(cache), "--sample", "0")["files"]
    made_with = json.loads((cache / "made_with.json").read_text())
    (cache / "made_with.json").write_text(json.dumps({**made_with, "videos": "my videos"}))
    assert call("export", "--cache", str(cache), "--sample", "1")["files"]


def test_the_newest_cache_and_run_are_named(
    call: Call, copy_of: Callable[[], Path], answers: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(copy_of())
    taken = {"report": "pretrain_ar", "export": "tokenize"}
    for command, source in taken.items():
        call(command)
        flag = "run" if source == "pretrain_ar" else "cache"
        (line,) = [line for line in call.err.splitlines() if "newest" in line]
        assert f"--{flag} " in line and answers[source][flag] in line
    call("report", "--run", answers["pretrain_ar"]["run"])
    assert "newest" not in call.err
