"""The runner of the GPU check: choice of parts, time limits, and results that are on disk at every moment."""

import json
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from pipelines.engine import run_lock
from pipelines.gpu import __main__ as gpu
from pipelines.gpu.__main__ import Part
from pipelines.gpu.results import PartResult, Results
from tests.helpers.process_ends import assert_end

Outcome = tuple[int, dict[str, Any], str]


def check(out: Path, *flags: str) -> Outcome:
    """Run the check; return its exit code, gpu.json and gpu.md."""
    code = gpu.main(["--dry", "--out", str(out), *flags])
    return code, json.loads((out / "gpu.json").read_text()), (out / "gpu.md").read_text()


@pytest.fixture
def set_parts(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Function that replaces the parts by modules of tests/helpers/gpu_parts, with a time limit of 30 s."""

    def replace(*modules: str, seconds: int = 30) -> None:
        parts = {i: Part(f"tests.helpers.gpu_parts.{name}", f"title {i}", seconds) for i, name in enumerate(modules, 1)}
        monkeypatch.setattr(gpu, "PARTS", parts)
        monkeypatch.setattr(gpu, "DRY_FACTOR", 1)

    return replace


def test_rows_are_in_both_files(set_parts: Any, tmp_path: Path) -> None:
    set_parts("good", "good")
    code, document, table = check(tmp_path)
    assert code == 0
    assert [part["status"] for part in document["parts"]] == ["ok", "ok"]
    rows = document["parts"][0]["rows"]
    assert [(row["what"], row["ours"], row["ratio"]) for row in rows] == [("speed | a", 2.5, 1.25), ("b", "text", None)]
    cells = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines() if line.startswith("|")
    ]
    assert all(len(line) == 5 for line in cells)
    assert ["b", "text", "", "", ""] in cells
    assert "some output" in (tmp_path / "gpu.log").read_text()


def test_threads_may_write_the_results_at_the_same_time(tmp_path: Path) -> None:
    results = Results(tmp_path, {"device": "CPU"}, [PartResult(1, "title")])
    with ThreadPoolExecutor(2) as pool:
        for done in [pool.submit(results.write) for _ in range(200)]:
            done.result()
    assert json.loads((tmp_path / "gpu.json").read_text())["device"] == "CPU"


def test_the_output_of_a_part_is_read_to_its_end_after_an_error() -> None:
    """Otherwise the part would wait for ever to write."""
    used = []

    def use(line: str) -> None:
        used.append(line)
        raise OSError("No space left on device")

    lines = iter(["a", "b", "c"])
    reader = gpu._Reader(lines, use)
    reader.join(10)
    assert list(lines) == [] and used == ["a"] and "No space" in str(reader.error)


def test_a_full_disk_is_one_line(
    set_parts: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    set_parts("good")
    write = Results.write

    def full(results: Results) -> None:
        if any(part.rows for part in results.parts):
            raise OSError("No space left on device")
        write(results)

    monkeypatch.setattr(Results, "write", full)
    assert gpu.main(["--dry", "--out", str(tmp_path)]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert str(tmp_path) in line and "No space" in line


def test_only_the_chosen_parts_run(set_parts: Any, tmp_path: Path) -> None:
    set_parts("failing", "good", "good")
    code, document, _ = check(tmp_path, "--parts", "3,2")
    assert code == 0 and [part["number"] for part in document["parts"]] == [3, 2]


def test_a_failing_part_keeps_its_rows_and_does_not_stop_the_others(set_parts: Any, tmp_path: Path) -> None:
    set_parts("failing", "good")
    code, document, table = check(tmp_path)
    assert code == 1
    failed, good = document["parts"]
    assert "no kernel image is available" in failed["status"] and len(failed["rows"]) == 1
    assert good["status"] == "ok" and len(good["rows"]) == 2
    assert "no kernel image is available" in table


def test_a_part_is_killed_with_its_processes_at_its_time_limit(set_parts: Any, tmp_path: Path) -> None:
    set_parts("hanging", "good", seconds=3)
    code, document, _ = check(tmp_path)
    assert code == 1
    hanging, good = document["parts"]
    assert "3 s" in hanging["status"] and hanging["seconds"] < 20
    assert_end([int(hanging["rows"][0]["ours"])])
    assert good["status"] == "ok"


def test_the_time_limit_of_all_parts_stops_the_check(set_parts: Any, tmp_path: Path) -> None:
    set_parts("hanging", "good")
    code, document, _ = check(tmp_path, "--seconds", "2")
    assert code == 1
    hanging, late = document["parts"]
    assert hanging["seconds"] < 20 and len(hanging["rows"]) == 1
    assert "no time left" in late["status"] and late["rows"] == []


def test_rows_are_on_disk_while_a_part_runs(set_parts: Any, tmp_path: Path) -> None:
    set_parts("hanging", seconds=5)
    thread = threading.Thread(target=check, args=(tmp_path,))
    thread.start()
    seen = []
    while thread.is_alive():
        if (tmp_path / "gpu.json").exists():
            parts = json.loads((tmp_path / "gpu.json").read_text())["parts"]
            seen += [part["status"] for part in parts if part["rows"]]
        time.sleep(0.02)
    assert "running" in seen


def test_a_mistake_ends_the_check_with_one_line(
    set_parts: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    set_parts("mistake", "good")
    code, document, _ = check(tmp_path)
    assert code == 2 and len(document["parts"]) == 1
    errors = [line for line in capsys.readouterr().err.splitlines() if ": error: " in line]
    assert len(errors) == 1 and "no CUDA device" in errors[0]


@pytest.mark.parametrize(
    "flags, fact",
    [
        (["--seconds", "nan"], "nan"),
        (["--parts", "1,10"], "10"),
        (["--parts", "x"], "x"),
        (["--parts", ""], "1 to 9"),
        (["--videos", "nowhere"], "nowhere"),
    ],
)
def test_a_wrong_flag_is_refused(
    flags: list[str], fact: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        gpu.main([*flags, "--out", str(tmp_path / "out")])
    assert stop.value.code == 2
    assert fact in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "out").exists()


def test_a_file_in_place_of_the_folder_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    assert gpu.main(["--dry", "--out", str(tmp_path / "file")]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if ": error: " in line]
    assert str(tmp_path / "file") in line


@pytest.mark.usefixtures("handlers_return")
def test_ctrl_c_keeps_the_rows_and_ends_the_part(
    set_parts: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    set_parts("hanging")

    def wait(process: subprocess.Popen, timeout: float | None = None) -> int:
        if timeout is None or "tests.helpers.gpu_parts.hanging" not in process.args:  # type: ignore[operator]
            return real_wait(process, timeout)
        while not any(part["rows"] for part in json.loads((tmp_path / "gpu.json").read_text())["parts"]):
            time.sleep(0.02)
        raise KeyboardInterrupt

    real_wait = subprocess.Popen.wait
    monkeypatch.setattr(subprocess.Popen, "wait", wait)
    code, document, _ = check(tmp_path)
    assert code == 130
    (part,) = document["parts"]
    assert part["status"] == "interrupted" and len(part["rows"]) == 1
    assert_end([int(part["rows"][0]["ours"])])
    assert "interrupted" in capsys.readouterr().err.splitlines()[-1]


def test_a_second_check_in_one_folder_is_refused(
    set_parts: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    set_parts("good")
    monkeypatch.setattr(run_lock, "PATIENCE", 0.1)
    with run_lock.lock(tmp_path):
        assert gpu.main(["--dry", "--out", str(tmp_path)]) == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert "in use" in error and str(tmp_path) in error
    assert not (tmp_path / "gpu.json").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_stopped_check_ends_its_part(number: int, tmp_path: Path) -> None:
    program = (
        "import sys; from pipelines.gpu import __main__ as gpu\n"
        "gpu.PARTS = {1: gpu.Part('tests.helpers.gpu_parts.watching', 'title', 60)}\n"
        "sys.exit(gpu.main(['--dry', '--out', sys.argv[1]]))\n"
    )
    command = [sys.executable, "-c", program, str(tmp_path)]
    process = subprocess.Popen(command, cwd=gpu.ROOT, stderr=subprocess.PIPE, text=True)
    pid = 0
    while not pid:
        assert process.poll() is None
        time.sleep(0.02)
        with suppress(OSError, ValueError, LookupError):
            pid = int(json.loads((tmp_path / "gpu.json").read_text())["parts"][0]["rows"][0]["ours"])
    process.send_signal(number)
    _, error = process.communicate(timeout=30)
    assert process.returncode == (143 if number == signal.SIGTERM else -number)
    assert_end([pid])
    if number == signal.SIGTERM:
        assert "SIGTERM" in error.splitlines()[-1] and str(tmp_path) in error.splitlines()[-1]
        assert json.loads((tmp_path / "gpu.json").read_text())["parts"][0]["status"] == "stopped by SIGTERM"
