"""Settings files of somebody else: no module outside this project is imported, and every mistake is one line and exit code 2."""

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from pipelines.engine.config import parse, read_settings
from pipelines.settings.pretrain_ar import Pretrain
from pipelines.settings.train_tokenizer import TrainTokenizer


@dataclass
class Group:
    """Settings of a group."""

    frames: int = 16


@dataclass(kw_only=True)
class Schema:
    """Settings of a command, without classes."""

    steps: int = 5
    """Steps."""
    lr: float = 0.1
    """Rate."""
    out: Path | None = None
    """Folder."""
    group: Group = field(default_factory=Group)
    """Group."""


def refused(schema: Any, file: Path, text: str, capsys: pytest.CaptureFixture[str]) -> str:
    """Parse a settings file, check that it is refused in one short line, and return the line."""
    file.write_text(text)
    with pytest.raises(SystemExit) as caught:
        parse(schema, ["--config", str(file)], prog="x")
    out, err = capsys.readouterr()
    assert (caught.value.code, out) == (2, "")
    (line,) = err.splitlines()
    assert len(line) < 1200
    assert "\x1b" not in line
    return line


@pytest.mark.parametrize("schema, name", [(Pretrain, "objective"), (TrainTokenizer, "model")])
@pytest.mark.parametrize("path", ["this.s", "hostile.Module", "os.system", "pathlib.Path", "json.loads"])
def test_class_path_outside_the_project_is_not_imported(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    schema: Any,
    name: str,
    path: str,
) -> None:
    (tmp_path / "hostile.py").write_text(f"open({str(tmp_path / 'canary')!r}, 'w')\nclass Module: pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    before = set(sys.modules)
    for text in (f"{name}: {path}", f"{name}: {{class_path: {path}, init_args: {{a: 1}}}}"):
        line = refused(schema, tmp_path / "x.yaml", text, capsys)
        assert path in line and "class of this project" in line
    assert not (tmp_path / "canary").exists()
    assert not {"this", "hostile"} & (set(sys.modules) - before)


@pytest.mark.parametrize("path", ["ar_model.weights.json.loads", "tokenizer.convert.main", "ar_model.inputs.CodeSpec"])
def test_other_names_of_the_project_are_no_objectives(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], path: str
) -> None:
    refused(Pretrain, tmp_path / "x.yaml", f"objective: {path}", capsys)


VALUES = [
    *(
        "9" * 400,
        "9" * 5000,
        "0x" + "f" * 5000,
        "!!timestamp x",
        "!!int x",
        "!!bool x",
        "!!float x",
        "!!set {a}",
    ),
    *("null", "[]", "{a: 1}", "{a: {b: [1]}}", '"\\x1b[2J"', "[" * 5000 + "]" * 5000, "&a [*a]", "? {a: b}\n: c"),
    "!!python/object/apply:os.system [exit]",
]


@pytest.mark.parametrize("name", ["steps", "lr", "group", "group.frames"])
@pytest.mark.parametrize("value", VALUES, ids=lambda value: value[:20])
def test_value_that_is_no_setting_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, value: str
) -> None:
    refused(Schema, tmp_path / "x.yaml", f"{name}: {value}", capsys)


def test_aliases_that_multiply_are_refused_quickly(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Ten lines describe a thousand million values."""
    lines = ["a: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"b{i}: &a{i} [{', '.join(10 * [f'*a{i - 1}'])}]" for i in range(1, 9)]
    assert "values" in refused(Schema, tmp_path / "x.yaml", "\n".join([*lines, "steps: *a8"]), capsys)
    with pytest.raises(ValueError, match="values"):
        read_settings(tmp_path / "x.yaml")


@pytest.mark.parametrize("text", ["- 1", "5", "", "1: 2", "a: !!timestamp x", "a: !!bool x", "a: " + "9" * 5000, "\0"])
def test_recorded_settings_that_are_none_are_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(ValueError, match=r"config\.yaml: cannot be read") as caught:
        read_settings(tmp_path / "config.yaml")
    assert len(str(caught.value).splitlines()) == 1


def test_anchors_of_plain_values_work(tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text("steps: &n 7\ngroup: {frames: *n}\n")
    config, _ = parse(Schema, ["--config", str(tmp_path / "x.yaml")], prog="x")
    assert (config.steps, config.group.frames) == (7, 7)
