"""Tiny runs of all stages, made once per test session and shared."""

import json
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pipelines.engine.signals import STOP_SIGNALS
from tests.helpers.commands import DIGITS, TINY_MODEL, TINY_TOKENIZER, Call, last_line, start


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    return Call(monkeypatch, capsys)


@pytest.fixture
def handlers_return() -> Iterator[None]:
    """Restore the handlers of signals after a test that stops a command in this process."""
    earlier = {number: signal.getsignal(number) for number in (*STOP_SIGNALS, signal.SIGINT)}
    yield
    for number, handler in earlier.items():
        signal.signal(number, handler)


@pytest.fixture(scope="session")
def finished_project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder in which all stages ran once on built-in data: runs/, caches/ and answers.json with the last line of each."""
    folder = tmp_path_factory.mktemp("finished_project")
    answers = {"train_tokenizer": last_line(start(folder, "train_tokenizer", "--videos", DIGITS, *TINY_TOKENIZER))}
    tokenizer = answers["train_tokenizer"]["run"]
    flags = ["--videos", DIGITS, "--tokenizer", tokenizer, "--shard_size", "7"]
    answers["tokenize"] = last_line(start(folder, "tokenize", *flags))
    answers["pretrain_ar"] = last_line(start(folder, "pretrain_ar", *TINY_MODEL))
    answers["probe"] = last_line(start(folder, "probe", "--seeds", "2"))
    answers["report"] = last_line(start(folder, "report"))
    (folder / "answers.json").write_text(json.dumps(answers))
    return folder


@pytest.fixture(scope="session")
def answers(finished_project: Path) -> dict[str, dict[str, Any]]:
    """Last line of each stage of the finished project, by command."""
    return json.loads((finished_project / "answers.json").read_text())


@pytest.fixture
def copy_of(finished_project: Path, tmp_path: Path) -> Callable[[], Path]:
    """Function that copies the finished project, so that a test may damage the copy."""

    def make() -> Path:
        return Path(shutil.copytree(finished_project, tmp_path / "copy"))

    return make


@pytest.fixture(autouse=True)
def finished_project_stays(request: pytest.FixtureRequest) -> Iterator[None]:
    """Assert that a test adds nothing to the finished project and removes nothing: other tests copy it."""
    if "finished_project" not in request.fixturenames:
        yield
        return
    folder: Path = request.getfixturevalue("finished_project")
    before = sorted(folder.rglob("*"))
    yield
    assert sorted(folder.rglob("*")) == before
