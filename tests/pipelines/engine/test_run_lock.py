"""A run folder has one writer at a time; a writer that was killed blocks nobody."""

import os
import platform
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from accelerate import Accelerator

from pipelines.engine import run_lock
from pipelines.engine.run import Run
from pipelines.engine.run_lock import lock
from tests.helpers.commands import DIGITS, ROOT, TINIEST, Call


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_lock, "PATIENCE", 0.2)


def hold(folder: Path) -> subprocess.Popen[str]:
    """Start a process that holds the lock of a folder."""
    program = "import sys, time; from pathlib import Path; from pipelines.engine.run_lock import lock\n"
    program += "file = lock(Path(sys.argv[1])); print('held', flush=True); time.sleep(60)"
    process = subprocess.Popen(
        [sys.executable, "-c", program, str(folder)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    return process


def test_the_owner_is_named_and_its_death_releases_the_lock(tmp_path: Path) -> None:
    owner = hold(tmp_path)
    with pytest.raises(ValueError, match="in use by") as error:
        lock(tmp_path)
    for fact in (str(tmp_path), f"process {owner.pid} ", platform.node()):
        assert fact in str(error.value)
    owner.kill()
    owner.wait()
    with lock(tmp_path):
        assert (tmp_path / "lock").read_text().startswith(f"process {os.getpid()} on ")


def test_a_start_waits_for_an_owner_that_is_about_to_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_lock, "PATIENCE", 20)
    owner = hold(tmp_path)
    monkeypatch.setattr("pipelines.engine.run_lock.time.sleep", lambda _: owner.kill())
    lock(tmp_path).close()


def test_a_link_in_place_of_the_lock_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("content")
    (tmp_path / "lock").symlink_to(tmp_path / "precious")
    with pytest.raises(OSError, match="lock"):
        lock(tmp_path)
    assert (tmp_path / "precious").read_text() == "content"


def test_a_file_of_the_user_named_lock_is_not_changed(tmp_path: Path) -> None:
    (tmp_path / "lock").write_text("combination 1234\n")
    with pytest.raises(ValueError, match="lock") as error:
        lock(tmp_path)
    assert str(tmp_path) in str(error.value)
    assert (tmp_path / "lock").read_text() == "combination 1234\n"


def test_a_start_that_may_wait_is_told_the_owner_once(tmp_path: Path) -> None:
    owner = hold(tmp_path)
    said = []

    def waiting(text: str) -> None:
        said.append(text)
        owner.kill()

    with lock(tmp_path, waiting):
        assert said == [f"process {owner.pid} on {platform.node()}"]
        assert (tmp_path / "lock").read_text() == f"process {os.getpid()} on {platform.node()}\n"
    owner.wait()


def test_a_run_that_waits_is_finished_by_its_owner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    owner = hold(tmp_path)

    def finish(_: object, text: str) -> None:
        if "waiting" in text:
            (tmp_path / "summary.json").write_text("{}")
            owner.kill()

    monkeypatch.setattr("pipelines.engine.run.say", finish)
    run = Run("train_tokenizer", SimpleNamespace(out=tmp_path), "{}", wait=True)
    assert not run.begin_unless_finished(Accelerator(cpu=True))
    owner.wait()
    # The next one that waits is not kept waiting.
    lock(tmp_path).close()


def test_a_file_system_without_locks_is_used_without_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr("pipelines.engine.run_lock.fcntl.flock", refuse)
    with lock(tmp_path), lock(tmp_path):
        pass


def test_a_second_start_with_one_out_is_refused_and_a_finished_run_needs_no_lock(call: Call, tmp_path: Path) -> None:
    flags = [*TINIEST, "--out", str(tmp_path / "run")]
    (tmp_path / "run").mkdir()
    with lock(tmp_path / "run"):
        line = call("train_tokenizer", *flags)
        assert str(tmp_path / "run") in line and f"process {os.getpid()} on {platform.node()}" in line
        assert [path.name for path in (tmp_path / "run").iterdir()] == ["lock"]
    done = call("train_tokenizer", *flags)
    with lock(tmp_path / "run"):
        assert call("train_tokenizer", *flags) == done


def test_several_starts_of_tokenize_fill_one_cache(
    call: Call, finished_project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(finished_project)
    (tokenizer,) = Path("runs").glob("train_tokenizer-*")
    (tmp_path / "run").mkdir()
    with lock(tmp_path / "run"):
        flags = ["--tokenizer", str(tokenizer), "--caches", str(finished_project / "caches"), "--shard_size", "7"]
        assert call("tokenize", "--videos", DIGITS, *flags, "--out", str(tmp_path / "run"))["reused"]
