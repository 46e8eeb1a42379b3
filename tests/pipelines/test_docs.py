"""README and docs: every command parses, every Python snippet runs, and the main path of the README runs as written."""

import os
import re
import shlex
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from accelerate.commands.launch import launch_command_parser

from data.cache.tool import main as cache_tool
from pipelines.engine.config import parse
from tests.helpers.commands import ROOT, SCHEMAS, TINY_MODEL, Call, last_line, python, start

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
RUNNABLE = {"python", "accelerate", "make", "pip", "source", ".venv/bin/pre-commit"}


def _blocks(page: Path, *languages: str) -> list[str]:
    return [text for language, text in FENCE.findall(page.read_text()) if language in languages]


def _commands(page: Path) -> list[str]:
    """Command lines of the blocks without a language: comments cut, continued lines joined, variables set."""
    found = []
    for block in _blocks(page, "", "sh", "bash"):
        variables: dict[str, str] = {}
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            for name, value in variables.items():
                words = [word.replace(f"${name}", value) for word in words]
            if len(words) == 1 and re.fullmatch(r"[A-Z]+=.*", words[0]):
                name, _, value = words[0].partition("=")
                variables[name] = value
            elif words and words[0] in RUNNABLE:
                found.append(shlex.join(words))
    return found


ALL = [pytest.param(command, id=f"{page.stem}: {command[:60]}") for page in PAGES for command in _commands(page)]


@pytest.mark.parametrize("command", ALL)
def test_every_command_parses(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    for part in command.split("'&&'"):
        _check(shlex.split(part))


def _check(words: list[str]) -> None:
    program, arguments = words[0], words[1:]
    if program == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert [word for word in arguments if "=" not in word][0] in targets
    elif program == "accelerate":
        flags, script = launch_command_parser().parse_known_args(arguments[1:])
        assert flags.config_file is None or Path(flags.config_file).is_file()
        _check_pipeline(flags.training_script, flags.training_script_args)
        assert not script
    elif program == "python" and arguments[:2] == ["-m", "data.cache"]:
        flags = [word.strip("[]") for word in arguments[2:] if word not in ("…", "…]")]
        with pytest.raises(SystemExit) as stop:
            cache_tool([*flags[:1], "--help"])
        assert stop.value.code == 0
    elif program == "python" and arguments[0] == "-m":
        assert (ROOT / arguments[1].replace(".", "/")).with_suffix(".py").is_file()
    elif program == "python":
        assert (ROOT / arguments[0]).is_file()
        if arguments[0].startswith("pipelines/"):
            _check_pipeline(arguments[0], arguments[1:])


def _check_pipeline(script: str, flags: list[str]) -> None:
    assert (ROOT / script).is_file()
    name = Path(script).stem
    schema = getattr(import_module(f"pipelines.settings.{name}"), SCHEMAS[name])
    expanded = [str(file) for flag in flags for file in (sorted(ROOT.glob(flag)) if "*" in flag else [flag])]
    if any(flag.endswith(".help") for flag in flags):
        with pytest.raises(SystemExit) as stop:
            parse(schema, flags)
        assert stop.value.code == 0
    else:
        parse(schema, expanded)


@pytest.fixture(scope="module")
def classifier(finished_project: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Classifier that was fine-tuned for a step from the run of the finished project."""
    folder = tmp_path_factory.mktemp("classifier") / "run"
    (run,) = finished_project.glob("runs/pretrain_ar-*")
    small = ["--steps", "1", "--attention", "plain", "--precision", "fp32"]
    last_line(start(finished_project, "finetune", "--init", str(run), *small, "--out", str(folder)))
    return folder


@pytest.fixture
def names(answers: dict[str, Any], video_folder: Path, classifier: Path) -> dict[str, str]:
    """Placeholders in the docs, and the values that replace them here."""
    return {
        "TOKENIZER_RUN": answers["train_tokenizer"]["run"],
        "RUN": answers["pretrain_ar"]["run"],
        "CACHE": answers["tokenize"]["cache"],
        "VIDEOS": "builtin:moving-digits:24:16",
        "VIDEO": str(video_folder / "left" / "clip 0.mp4"),
        "CLASSIFIER": str(classifier),
    }


SNIPPETS = [
    pytest.param(text, id=f"{page.stem}: {text.strip().splitlines()[-1][:60]}")
    for page in PAGES
    for text in _blocks(page, "python")
]


@pytest.mark.parametrize("snippet", SNIPPETS)
def test_every_python_snippet_runs(snippet: str, finished_project: Path, names: dict[str, str]) -> None:
    code = re.sub(r"\b(TOKENIZER_RUN|RUN|CACHE|VIDEOS|VIDEO|CLASSIFIER)\b", lambda match: names[match[0]], snippet)
    python(finished_project, "-c", code)


def test_webdataset_reads_a_cache_in_six_lines() -> None:
    (code,) = [text for text in _blocks(ROOT / "docs" / "cache.md", "python") if "webdataset.WebDataset(" in text]
    assert len([line for line in code.splitlines() if line.strip()]) <= 6
    assert "from data" not in code


def test_the_main_path_of_the_readme_runs(
    finished_project: Path, names: dict[str, str], video_folder: Path, tmp_path: Path, call: Call, monkeypatch: Any
) -> None:
    """The four commands of "Your own videos", on real files, made small by flags at their ends."""
    (block,) = [
        text for text in _blocks(ROOT / "README.md", "") if "pipelines/probe.py" in text and "make setup" in text
    ]
    tokenizer = os.path.abspath(finished_project / names["TOKENIZER_RUN"])
    small = {
        "tokenize": ["--tokenizer", tokenizer],
        "pretrain_ar": TINY_MODEL,
        "probe": ["--seeds", "1"],
        "report": [],
    }
    monkeypatch.chdir(tmp_path)
    for line in block.splitlines()[1:]:
        script, *flags = shlex.split(line.replace("VIDEOS", str(video_folder)))[1:]
        name = Path(script).stem
        last = call(name, *flags, *small.pop(name))
    assert small == {}
    assert Path(last["page"]).is_file()


def test_the_way_to_a_classifier_runs(
    video_folder: Path, tmp_path: Path, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The commands of docs/classifier.md on real files, made small by flags at their ends."""
    monkeypatch.chdir(tmp_path)
    for split, copies in (("train", 3), ("test", 1)):
        for file in sorted(video_folder.glob("*/*"))[:: 2 if split == "test" else 1]:
            for copy in range(copies):
                target = Path("videos", split, file.parent.name, f"{split} {copy} {file.name}")
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(file.read_bytes() + bytes(copy))
    small = {
        "tokenize": ["--clip.frames", "4", "--clip.size", "32", "--workers", "0"],
        "pretrain_ar": [*TINY_MODEL, "--objective.clusters", "[1,2,2]"],
        "probe": ["--seeds", "1"],
        "finetune": ["--steps", "2", "--batch_size", "4", "--attention", "plain", "--precision", "fp32"],
        "evaluate": ["--workers", "0"],
    }
    commands = [shlex.split(line) for line in _commands(ROOT / "docs" / "classifier.md")]
    assert {Path(words[1]).stem for words in commands} == small.keys()
    last = {}
    for words in commands:
        name, flags = Path(words[1]).stem, ["videos" if word == "VIDEOS" else word for word in words[2:]]
        last[name] = call(name, *flags, *small[name])
    assert last["evaluate"]["model"] == "scratch" and last["evaluate"]["seen_in_training"] == 0
    assert last["evaluate"]["n"] == 3 and last["evaluate"]["split"] == "test" and last["evaluate"]["views"] == "5x3"
