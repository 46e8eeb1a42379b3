"""Files shared by processes: atomic writes, first writer wins, one owner per claim, removal of files that dead processes left."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from data import files
from data.files import Claim, compact, machine, remove_left_overs, temporary_name, write_bytes, write_first, write_json
from tests.helpers.cache_contents import in_a_child

DEAD = 99_999_999
"""ID of a process that cannot exist: Linux has IDs up to 2**22."""


@pytest.fixture
def other_process() -> Iterator[psutil.Process]:
    """Process that lives as long as the test."""
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        yield psutil.Process(process.pid)
        process.kill()


def start_of(process: psutil.Process) -> str:
    """Start time of a living process in the format of its claims."""
    start = files._start_of(process.pid)
    assert start is not None
    return start


def claimed_by(path: Path, machine: str, process: int, started: object, age: float = 0) -> Claim:
    """Create a claim of another process, `age` seconds old."""
    path.symlink_to(f"{machine}:{process}:{started}")
    moment = time.time() - age
    os.utime(path, (moment, moment), follow_symlinks=False)
    return Claim(path)


# --- atomic writes


@pytest.mark.parametrize("write", [write_bytes, write_first])
def test_file_is_written_completely_and_leaves_no_other_file(
    tmp_path: Path, write: Callable[[Path, bytes], None]
) -> None:
    write(tmp_path / "a", b"content")
    assert (tmp_path / "a").read_bytes() == b"content"
    assert os.listdir(tmp_path) == ["a"]


def test_second_write_replaces_the_first(tmp_path: Path) -> None:
    write_bytes(tmp_path / "a", b"long content")
    write_bytes(tmp_path / "a", b"short")
    assert (tmp_path / "a").read_bytes() == b"short"
    assert os.listdir(tmp_path) == ["a"]


def test_json_that_cannot_be_encoded_changes_no_file(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"b": 1, "a": [2]})
    assert json.loads(path.read_text()) == {"a": [2], "b": 1}
    with pytest.raises(ValueError, match="JSON"):
        write_json(path, {"a": float("nan")})
    assert os.listdir(tmp_path) == ["a.json"]
    assert json.loads(path.read_text()) == {"a": [2], "b": 1}


def test_json_does_not_depend_on_the_order_of_keys(tmp_path: Path) -> None:
    write_json(tmp_path / "a", {"x": {"b": 1, "a": 2}, "w": "\udcff\n"})
    write_json(tmp_path / "b", {"w": "\udcff\n", "x": {"a": 2, "b": 1}})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert json.loads((tmp_path / "a").read_text()) == {"w": "\udcff\n", "x": {"a": 2, "b": 1}}
    assert compact({"b": 1, "a": [1, 2]}) == '{"a":[1,2],"b":1}'


@pytest.mark.parametrize("write", [write_bytes, write_first])
@pytest.mark.parametrize("step", ["fsync", "replace", "link"])
def test_failed_write_leaves_the_old_file_and_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: Callable[[Path, bytes], None], step: str
) -> None:
    (tmp_path / "a").write_bytes(b"old")

    class Interrupted(BaseException):
        """An interrupt such as KeyboardInterrupt."""

    def fails(*_: object) -> None:
        raise Interrupted

    monkeypatch.setattr(files.os, step, fails)
    if step in ("fsync", "replace" if write is write_bytes else "link"):
        with pytest.raises(Interrupted):
            write(tmp_path / "a", b"new")
        assert (tmp_path / "a").read_bytes() == b"old"
    else:
        write(tmp_path / "a", b"new")
    assert os.listdir(tmp_path) == ["a"]


def test_reader_never_sees_a_partial_file(tmp_path: Path) -> None:
    contents = {bytes([letter]) * 300_000 for letter in b"abc"}
    path = tmp_path / "a"
    write_bytes(path, b"a" * 300_000)
    stopped = threading.Event()

    def write_repeatedly() -> None:
        while not stopped.is_set():
            for content in contents:
                write_bytes(path, content)

    writer = threading.Thread(target=write_repeatedly)
    writer.start()
    try:
        read = {path.read_bytes() for _ in range(200)}
    finally:
        stopped.set()
        writer.join()
    assert read <= contents


# --- the first writer wins


def test_write_first_keeps_the_first_content(tmp_path: Path) -> None:
    write_first(tmp_path / "a", b"first")
    write_first(tmp_path / "a", b"second")
    assert (tmp_path / "a").read_bytes() == b"first"
    assert os.listdir(tmp_path) == ["a"]


def test_one_of_many_processes_wins_and_all_read_its_content(tmp_path: Path) -> None:
    path = tmp_path / "a"

    def write_and_read() -> None:
        while not (tmp_path / "go").exists():
            time.sleep(0.001)
        write_first(path, str(os.getpid()).encode() * 1000)
        (tmp_path / f"read by {os.getpid()}").write_bytes(path.read_bytes())

    children = [in_a_child(write_and_read) for _ in range(6)]
    (tmp_path / "go").touch()
    assert [child.wait() for child in children] == [0] * 6
    read = {file.read_bytes() for file in tmp_path.glob("read by *")}
    assert read == {path.read_bytes()}
    assert path.read_bytes() in [str(child.pid).encode() * 1000 for child in children]
    assert not list(tmp_path.glob("*.tmp-*"))


def test_first_writer_wins_on_a_file_system_without_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_links(*_: object) -> None:
        raise PermissionError("no links here")

    monkeypatch.setattr(files.os, "link", no_links)
    write_first(tmp_path / "a", b"first")
    write_first(tmp_path / "a", b"second")
    assert (tmp_path / "a").read_bytes() == b"first"
    assert os.listdir(tmp_path) == ["a"]


# --- claims


def test_claim_is_held_until_it_is_released(tmp_path: Path) -> None:
    claim, same = Claim(tmp_path / "0.claim"), Claim(tmp_path / "0.claim")
    assert claim.take()
    assert not same.take(), "not even its owner can take it twice"
    claim.release()
    assert os.listdir(tmp_path) == []
    assert same.take()


def test_missing_claim_can_be_kept_and_released(tmp_path: Path) -> None:
    claim = Claim(tmp_path / "0.claim")
    claim.keep()
    claim.release()
    assert os.listdir(tmp_path) == []


def test_one_of_many_processes_gets_the_claim(tmp_path: Path) -> None:
    def take() -> None:
        while not (tmp_path / "go").exists():
            time.sleep(0.001)
        taken = Claim(tmp_path / "0.claim").take()
        (tmp_path / f"{os.getpid()} {taken}").touch()
        while not (tmp_path / "end").exists():  # an owner must live until all have tried
            time.sleep(0.001)

    children = [in_a_child(take) for _ in range(6)]
    (tmp_path / "go").touch()
    while len(list(tmp_path.glob("* *"))) < 6:
        time.sleep(0.001)
    (tmp_path / "end").touch()
    assert [child.wait() for child in children] == [0] * 6
    assert len(list(tmp_path.glob("* True"))) == 1


def test_claim_of_a_living_process_is_respected_at_any_age(tmp_path: Path, other_process: psutil.Process) -> None:
    claim = claimed_by(tmp_path / "0.claim", machine(), other_process.pid, start_of(other_process), age=1e6)
    assert not claim.take()
    remove_left_overs(tmp_path)
    assert (tmp_path / "0.claim").is_symlink()


def test_claim_of_a_killed_process_is_taken_over(tmp_path: Path) -> None:
    def take_and_die() -> None:
        assert Claim(tmp_path / "0.claim").take()
        os.kill(os.getpid(), signal.SIGKILL)

    assert in_a_child(take_and_die).wait() == -signal.SIGKILL
    assert (tmp_path / "0.claim").is_symlink()
    assert Claim(tmp_path / "0.claim").take()
    assert os.readlink(tmp_path / "0.claim").split(":")[1] == str(os.getpid())


def test_claim_of_a_zombie_process_is_taken_over(tmp_path: Path) -> None:
    """A dead process stays in the process table if its parent does not wait for it, as in a container without an init."""

    def take_and_die() -> None:
        assert Claim(tmp_path / "0.claim").take()
        os.kill(os.getpid(), signal.SIGKILL)

    child = in_a_child(take_and_die)
    try:
        while psutil.Process(child.pid).status() != psutil.STATUS_ZOMBIE:
            time.sleep(0.001)
        assert Claim(tmp_path / "0.claim").take()
    finally:
        child.wait()


def test_claim_of_a_dead_process_is_taken_over_if_its_number_is_reused(
    tmp_path: Path, other_process: psutil.Process
) -> None:
    assert claimed_by(tmp_path / "0.claim", machine(), other_process.pid, f"{start_of(other_process)}5").take()


@pytest.mark.parametrize(("age", "taken"), [(0, False), (120, False), (300, True)])
def test_claim_of_another_machine_is_respected_until_it_is_stale(tmp_path: Path, age: float, taken: bool) -> None:
    claim = claimed_by(tmp_path / "0.claim", "another machine:80", DEAD, 1.0, age)
    assert claim.take() == taken


def test_keep_prevents_a_claim_from_becoming_stale(tmp_path: Path) -> None:
    claim = claimed_by(tmp_path / "0.claim", "another machine", DEAD, 1.0, age=1000)
    claim.keep()
    assert not claim.take()


@pytest.mark.parametrize("target", ["nonsense", "a:b:c", f"{machine()}:x:1.00"])
def test_malformed_claim_is_taken_over_only_when_it_is_stale(tmp_path: Path, target: str) -> None:
    (tmp_path / "0.claim").symlink_to(target)
    assert not Claim(tmp_path / "0.claim").take()
    os.utime(tmp_path / "0.claim", (1e9, 1e9), follow_symlinks=False)
    assert Claim(tmp_path / "0.claim").take()


def test_without_symbolic_links_every_claim_succeeds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_links(*_: object) -> None:
        raise OSError("not supported")

    monkeypatch.setattr(files.os, "symlink", no_links)
    claim = Claim(tmp_path / "0.claim")
    assert claim.take()
    claim.keep()
    claim.release()
    assert os.listdir(tmp_path) == []


# --- files of dead processes


def test_files_of_dead_processes_are_removed_and_those_of_living_processes_stay(
    tmp_path: Path, other_process: psutil.Process
) -> None:
    node = machine()
    stale = [f"0.tar.tmp-{node}-{DEAD}", f"0.json.tmp-{node}-{DEAD}", "old.tar.tmp-far-away-3"]
    stay = [f"1.tar.tmp-{node}-{other_process.pid}", "2.tar.tmp-far-away-3", "3.tar", "3.json", "a.tmp", "b.tmp-"]
    stay.append(temporary_name(tmp_path / "own").name)
    for name in (*stale, *stay):
        (tmp_path / name).touch()
    os.utime(tmp_path / "old.tar.tmp-far-away-3", (1e9, 1e9))
    claimed_by(tmp_path / "0.claim", node, DEAD, 1.0)
    claimed_by(tmp_path / "1.claim", node, other_process.pid, start_of(other_process), age=1e6)
    claimed_by(tmp_path / "2.claim", "far-away", 3, 1.0)
    claimed_by(tmp_path / "3.claim", "far-away", 3, 1.0, age=1e6)
    remove_left_overs(tmp_path)
    assert sorted(os.listdir(tmp_path)) == sorted([*stay, "1.claim", "2.claim"])


def test_target_of_a_stale_claim_is_not_removed(tmp_path: Path) -> None:
    """The target of the link names the owner, but a file of that name may exist."""
    file = tmp_path / f"{machine()}:{DEAD}:1.00"
    file.write_text("precious")
    claimed_by(tmp_path / "0.claim", machine(), DEAD, 1.0)
    remove_left_overs(tmp_path)
    assert os.listdir(tmp_path) == [file.name]
    assert file.read_text() == "precious"


def test_a_wrong_clock_of_this_machine_deletes_nothing_of_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ages are differences of times of the file system, so the clock of the machine does not matter."""
    (tmp_path / "0.tar.tmp-far-away-3").touch()
    claim = claimed_by(tmp_path / "0.claim", "far-away", 3, 1.0)
    for days in (-400, 2, 400):
        monkeypatch.setattr(time, "time", lambda skew=86_400 * days, now=time.time: now() + skew)
        remove_left_overs(tmp_path)
        assert not claim.take()
    assert sorted(os.listdir(tmp_path)) == ["0.claim", "0.tar.tmp-far-away-3"]
