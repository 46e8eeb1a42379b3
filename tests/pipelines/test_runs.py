"""The list of runs names every run, how far it is and its results; a damaged run is a row, not an error."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipelines import runs
from pipelines.engine.run_list import list_runs


@pytest.fixture
def listed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Function that runs the command with flags and returns its exit code, stdout and stderr."""

    def run(*flags: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["runs", *flags])
        code = runs.main()
        return code, *capsys.readouterr()

    return run


def test_finished_runs_are_listed_with_their_results(
    finished_project: Path, answers: dict[str, Any], listed: Callable[..., Any]
) -> None:
    code, out, _ = listed("--runs", str(finished_project / "runs"), "--json")
    rows = {row["command"]: row for row in json.loads(out)}
    trained, probed = answers["pretrain_ar"], answers["probe"]
    assert code == 0 and {row["state"] for row in rows.values()} == {"finished"}
    row = rows["pretrain_ar"]
    assert row["what"] == "ARVideo width 24 depth 2" and row["cache"] == Path(answers["tokenize"]["cache"]).name
    for number in (f"{trained['bits_per_code']:.2f}", f"{probed['linear']['mean']:.3f}"):
        assert number in row["numbers"]
    assert rows["train_tokenizer"]["numbers"] == f"{answers['train_tokenizer']['psnr']:.1f} dB"
    assert f"{answers['tokenize']['codes']:,} codes" in rows["tokenize"]["numbers"]
    _, text, _ = listed("--runs", str(finished_project / "runs"))
    assert len(text.splitlines()) == len(rows) + 1 and Path(trained["run"]).name in text


def test_unfinished_and_damaged_runs_are_listed(copy_of: Callable[[], Path], answers: dict[str, Any]) -> None:
    folder = copy_of() / "runs"
    run = folder / Path(answers["pretrain_ar"]["run"]).name
    for name in ("begun", "damaged", "strange", "linked", "nested", "bomb"):
        shutil.copytree(run, folder / name)
    (run / "summary.json").unlink()
    (folder / "begun/summary.json").unlink()
    (folder / "begun/metrics.jsonl").unlink()
    (folder / "damaged/summary.json").write_text("{")
    (folder / "strange/summary.json").write_text('{"bits_per_code": "many"}')
    (folder / "linked/config.yaml").write_text("!!python/object/apply:os.getcwd []")
    (folder / "nested/config.yaml").write_text("a: " + "[" * 20_000)
    aliases = "".join(f"b{i}: &b{i} [{', '.join([f'*b{i - 1}'] * 10)}]\n" for i in range(1, 9))
    (folder / "bomb/config.yaml").write_text(f"b0: &b0 [x]\n{aliases}name: *b8\n")
    entries = {Path(entry.run).name: entry for entry in list_runs(folder)}
    assert entries[run.name].state == "step 6 of 6" and entries["begun"].state == "begun"
    for name in ("damaged", "strange", "linked", "nested", "bomb"):
        assert entries[name].state.startswith("cannot be read: ")
    assert [entry.changed for entry in list_runs(folder)] == sorted((e.changed for e in entries.values()), reverse=True)


def test_no_runs_and_no_folder(tmp_path: Path, listed: Callable[..., Any]) -> None:
    code, out, _ = listed("--runs", str(tmp_path))
    assert code == 0 and f"no runs in {tmp_path}" in out
    code, out, error = listed("--runs", str(tmp_path / "absent"))
    assert code == 2 and out == "" and "absent: no such folder" in error
