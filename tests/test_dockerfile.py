"""The Dockerfile, which is not built here, uses the steps of the Makefile and starts a module that exists."""

import json
import re

from tests.helpers.commands import ROOT

LINES = (ROOT / "Dockerfile").read_text().replace("\\\n", " ").splitlines()
STEPS = [line.split(maxsplit=1) for line in LINES if line.strip() and not line.startswith("#")]


def arguments(instruction: str) -> list[str]:
    return [text for name, text in STEPS if name == instruction]


def test_it_starts_from_a_cuda_image() -> None:
    assert STEPS[0][0] == "FROM" and STEPS[0][1].startswith("nvidia/cuda:")
    assert {name for name, _ in STEPS} == {"FROM", "RUN", "WORKDIR", "COPY", "ENV", "CMD"}


def test_its_steps_are_targets_of_the_makefile_with_its_variables() -> None:
    makefile, extras = (ROOT / "Makefile").read_text(), (ROOT / "pyproject.toml").read_text()
    (step,) = [text.split() for text in arguments("RUN") if text.startswith("make")]
    assert re.search(rf"^{step[1]}:", makefile, re.MULTILINE)
    variables = dict(word.split("=") for word in step[2:])
    assert variables.keys() == {"EXTRAS"} and "EXTRAS ?=" in makefile
    for name in variables["EXTRAS"].split(","):
        assert re.search(rf"^{name} = \[", extras, re.MULTILINE), f"no extra {name}"


def test_it_has_what_setup_and_the_compiler_need() -> None:
    (packages,) = [text for text in arguments("RUN") if "apt-get install" in text]
    assert {"make", "python3-venv", "python3-dev", "g++"} <= set(packages.split())


def test_it_starts_the_doctor_in_the_environment_of_setup() -> None:
    python, flag, module = json.loads(arguments("CMD")[0])
    assert (python, flag) == ("python", "-m") and (ROOT / module.replace(".", "/")).with_suffix(".py").is_file()
    (folder,) = arguments("WORKDIR")
    assert arguments("ENV") == [f"PATH={folder}/.venv/bin:$PATH"]
    assert "BIN := .venv/bin" in (ROOT / "Makefile").read_text()


def test_local_environments_and_results_are_not_copied_into_it() -> None:
    assert {".git", ".venv", "caches", "runs"} <= set((ROOT / ".dockerignore").read_text().split())
