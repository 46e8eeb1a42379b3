"""`--help` of every command and one-line errors for mistyped flags, both without importing torch."""

import dataclasses
import resource
import subprocess
import sys
from importlib import import_module
from typing import get_type_hints

import pytest

from pipelines.engine.config import parse
from pipelines.settings.export import Export
from pipelines.settings.pretrain_ar import Pretrain
from pipelines.settings.train_tokenizer import TrainTokenizer
from tests.helpers.commands import ENVIRONMENT, ROOT, SCHEMAS, Call


def names_of(schema: type) -> list[str]:
    """Names of all fields of a schema, and of its nested dataclasses as `clip.frames`."""
    names, types = [], get_type_hints(schema)
    for field in dataclasses.fields(schema):
        names.append(field.name)
        if dataclasses.is_dataclass(types[field.name]):
            names += [f"{field.name}.{part.name}" for part in dataclasses.fields(types[field.name])]
    return names


@pytest.mark.parametrize("script", SCHEMAS)
def test_help_shows_every_setting_and_imports_no_torch(script: str) -> None:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    result = subprocess.run(
        [sys.executable, "-X", "importtime", f"pipelines/{script}.py", "--help"],
        cwd=ROOT,
        env=ENVIRONMENT | {"COLUMNS": "200"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert result.returncode == 0, result.stderr
    imported = {line.split("|")[-1].strip().split(".")[0] for line in result.stderr.splitlines()}
    assert "jsonargparse" in imported and not imported & {"torch", "accelerate", "transformers"}
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1.5, "CPU seconds"

    schema = getattr(import_module(f"pipelines.settings.{script}"), SCHEMAS[script])
    required = "what"  # the one positional flag, shown by its choices
    for name in names_of(schema):
        assert name == required or f"\n  --{name} " in result.stdout, f"--{name} is missing"
    for noise in ("<class", "Union", "Optional", "typing.", "%%", "NoneType", "CONFIG"):
        assert noise not in result.stdout
    lines = result.stdout.splitlines()
    assert max(map(len, lines)) <= 120, "the layout is at most 120 columns wide"
    for line, following in zip(lines, [*lines[1:], ""], strict=True):
        if line.startswith("  --"):
            described = line[34:].strip() if line[32:34] == "  " else following.strip()
            assert described and not described.startswith("--"), f"no description: {line}"


@pytest.mark.parametrize("schema, flag, name", [(Pretrain, "objective", "ARVideo"), (TrainTokenizer, "model", "VQ3D")])
def test_help_of_a_chosen_class_has_no_python_types(
    capsys: pytest.CaptureFixture[str], schema: type, flag: str, name: str
) -> None:
    with pytest.raises(SystemExit) as stop:
        parse(schema, [f"--{flag}.help", name])
    assert not stop.value.code
    text = capsys.readouterr().out
    assert f"--{flag}.width N" in text
    for noise in ("<class", "type:", "tuple[", "Literal[", "Optional["):
        assert noise not in text


MISTAKES: dict[str, tuple[str, ...]] = {
    "pretrain_ar --stepps 3": ("--stepps", "did you mean --steps?"),
    "pretrain_ar --batch 3": ("--batch", "did you mean --batch_size?"),
    "pretrain_ar --clip.frames 3": ("--clip.frames",),
    "tokenize --clip.frams 3": ("--clip.frams", "did you mean --clip.frames?"),
    "train_tokenizer --clip.views many": ("clip.views", "many"),
    "pretrain_ar --steps 2.5": ("steps", "whole number", "2.5"),
    "pretrain_ar --lr fast": ("lr", "number", "fast"),
    "pretrain_ar --compile maybe": ("compile", "true or false", "maybe"),
    "pretrain_ar --precision fp16": ("precision", "'auto', 'fp32', 'bf16'", "fp16"),
    "pretrain_ar --objective Nonsense": ("objective", "unknown class", "Nonsense"),
    "pretrain_ar --objective.keeep 0.5": ("unknown setting", "keeep"),
    "benchmark speed": ("what", "'cache', 'tokenizer', 'pretrain'", "speed"),
    "evaluate_tokenizer": ("tokenizers",),
}


@pytest.mark.parametrize("command", MISTAKES)
def test_a_mistyped_flag_is_one_line_that_names_it(call: Call, command: str) -> None:
    script, *flags = command.split()
    line = call(script, *flags)
    assert line.startswith(f"{script}: error: ")
    for part in MISTAKES[command]:
        assert part in line
    for noise in ("<class", "typing.", "Union"):
        assert noise not in line


def test_an_unknown_flag_is_reported_without_importing_torch() -> None:
    result = subprocess.run(
        [sys.executable, "-X", "importtime", "pipelines/pretrain_ar.py", "--stepps", "3"],
        cwd=ROOT,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert result.returncode == 2 and "did you mean --steps?" in result.stderr
    assert not any(line.split("|")[-1].strip() == "torch" for line in result.stderr.splitlines())


def test_the_last_value_of_a_flag_wins_and_a_bare_boolean_flag_means_true() -> None:
    config, _ = parse(Export, ["--trust", "--cache", "a", "--cache", "b"])
    assert (config.trust, config.cache) == (True, "b")
