"""The newest finished run of a command is found among folders of other things."""

import json
from pathlib import Path

import pytest

from pipelines.engine.run_files import find_run


@pytest.fixture(autouse=True)
def working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def make(name: str, environment: str | None) -> Path:
    folder = Path("runs", name)
    folder.mkdir(parents=True)
    (folder / "summary.json").write_text("{}")
    if environment is not None:
        (folder / "environment.json").write_text(environment)
    return folder


def test_folders_that_are_no_runs_are_passed_over() -> None:
    run = make("run", json.dumps({"pipeline": "pretrain_ar"}))
    make("of another command", json.dumps({"pipeline": "probe"}))
    make("junk", None)
    for number, damaged in enumerate(("", "[]", "{", '{"pipeline": ["pretrain_ar"]}')):
        make(f"damaged{number}", damaged)
    (make("folder", None) / "environment.json").mkdir()
    (make("link", None) / "environment.json").symlink_to("nowhere")
    Path("runs", "note.txt").touch()
    assert find_run(None, "pretrain_ar") == run


def test_a_damaged_run_is_named_if_there_is_no_other_one() -> None:
    make("junk", None)
    with pytest.raises(ValueError, match="no finished run of pretrain_ar") as error:
        find_run(None, "pretrain_ar")
    assert "junk" not in str(error.value)
    damaged = make("damaged", "{")
    with pytest.raises(ValueError, match="no finished run of pretrain_ar") as error:
        find_run(None, "pretrain_ar")
    assert str(damaged / "environment.json") in str(error.value)
