"""Code in place of any file of a run folder is never executed. The file is refused by name, skipped, or not read."""

import io
import json
import os
import pickle
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import xxhash
import yaml

from data.files import sha256_of, write_json
from pipelines.reporting import run_page
from tests.helpers.commands import TINY_MODEL, Call

CANARY = "canary"
"""Folder that the payloads would create."""


class Payload:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (CANARY,)


def _zipped() -> bytes:
    file = io.BytesIO()
    torch.save({"step": 6, "model": Payload()}, file)
    return file.getvalue()


TAG = f"!!python/object/apply:os.mkdir [{CANARY}]\n"
YAML = {
    "a tag": TAG,
    "a tagged step": f"steps: {TAG}",
    "a new object": f"!!python/object/new:os.mkdir [{CANARY}]\n",
    "a module": "steps: !!python/module:this\n",
    "a name": "!!python/name:os.system\n",
    "a list": "- 1\n",
    "nothing": "",
    "no end": "[" * 5000,
}
PAYLOADS = {
    "pickle": pickle.dumps(Payload()),
    "text pickle": pickle.dumps(Payload(), protocol=0),
    "checkpoint of torch": _zipped(),
    **{f"YAML with {name}": text.encode() for name, text in YAML.items()},
}
PICKLES = list(PAYLOADS)[:3]

FORBIDDEN = {"pickle.find_class", "os.system", "os.mkdir", "subprocess.Popen", "os.exec", "os.posix_spawn"}
events: list[str] = []


def record(event: str, args: tuple[Any, ...]) -> None:
    if event in FORBIDDEN and (event != "os.mkdir" or str(args[0]).endswith(CANARY)):
        events.append(f"{event} {args!r:.100}")


@pytest.fixture(scope="module", autouse=True)
def listening() -> None:
    # An audit hook cannot be removed.
    sys.addaudithook(record)


@pytest.fixture
def copy(copy_of: Callable[[], Path], monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Copy of the finished project in which the commands run. At the end, asserts that no payload was executed."""
    folder = copy_of()
    monkeypatch.chdir(folder)
    events.clear()
    yield folder
    assert not (folder / CANARY).exists()
    assert events == []


@pytest.fixture
def finished(copy: Path, answers: dict[str, Any]) -> Path:
    return copy / answers["pretrain_ar"]["run"]


@pytest.fixture
def unfinished(finished: Path) -> Path:
    """Run as if it had been killed after its last step."""
    (finished / "summary.json").unlink()
    shutil.rmtree(finished / "model")
    return finished


def outcomes(names: list[str], folder: Path, payload: bytes, run: Callable[[], Any]) -> dict[str, str | None]:
    """Replace each file (or all files of a folder) by the payload and run; return the error lines by name, or None."""
    original = folder.parents[1] / "original"
    shutil.copytree(folder, original)
    errors: dict[str, str | None] = {}
    for name in names:
        place = folder / name
        place.parent.mkdir(exist_ok=True)
        files = [path for path in place.rglob("*") if path.is_file()] if place.is_dir() else [place]
        for file in files:
            # An incomplete last line of metrics.jsonl would be ignored.
            file.write_bytes(payload + b"\n" if name == "metrics.jsonl" else payload)
        result = run()
        errors[name] = result if isinstance(result, str) else None
        shutil.rmtree(folder)
        shutil.copytree(original, folder)
    shutil.rmtree(original)
    return errors


def assert_refused(errors: dict[str, str | None], refused: set[str]) -> None:
    """Exactly these files are errors, and the errors name them."""
    assert {name for name, line in errors.items() if line} == refused, errors
    for name in refused:
        assert (name if not name.startswith("model/") else "model: ") in str(errors[name]), errors[name]


def test_unsafe_loaders_execute_the_payloads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaders: dict[str, Callable[[bytes], Any]] = {
        "pickle": pickle.loads,
        "text pickle": pickle.loads,
        "checkpoint of torch": lambda payload: torch.load(io.BytesIO(payload), weights_only=False),
        "YAML with a tag": yaml.unsafe_load,
        "YAML with a tagged step": yaml.unsafe_load,
    }
    monkeypatch.chdir(tmp_path)
    for name, load in loaders.items():
        events.clear()
        load(PAYLOADS[name])
        assert any(line.startswith("os.mkdir") for line in events), name
        (tmp_path / CANARY).rmdir()


TOP = ["config.yaml", "environment.json", "choices.json", "metrics.jsonl", "summary.json"]
MODEL = ["model/config.json", "model/model.safetensors", "model/README.md"]


@pytest.mark.parametrize("kind", PICKLES)
def test_payloads_in_a_finished_run_that_is_started_again(call: Call, finished: Path, kind: str) -> None:
    names = [*TOP, *MODEL, "checkpoints"]
    errors = outcomes(names, finished, PAYLOADS[kind], lambda: call("pretrain_ar", *TINY_MODEL))
    assert_refused(errors, {"config.yaml", "choices.json", "summary.json"})


@pytest.mark.parametrize("kind", PICKLES)
def test_payloads_in_an_unfinished_run_that_is_resumed(
    call: Call, unfinished: Path, answers: dict[str, Any], kind: str
) -> None:
    names = [*TOP]
    if kind == "pickle":
        names += [*MODEL, *(str(file.relative_to(unfinished)) for file in sorted(unfinished.rglob("checkpoints/*/*")))]
        assert len(names) == 5 + 3 + 6
    started: dict[str, str] = {}
    weights: dict[bool, set[bytes]] = {True: set(), False: set()}

    def run() -> Any:
        result = call("pretrain_ar", *TINY_MODEL)
        if isinstance(result, dict):
            assert result["loss"] == answers["pretrain_ar"]["loss"]
            # Repeated steps run in one thread, unlike those of the finished project, so the last bits may differ.
            again = "from step 4" in call.err
            weights[again].add((unfinished / "model" / "model.safetensors").read_bytes())
        started[names[len(started)]] = call.err
        return result

    assert_refused(
        outcomes(names, unfinished, PAYLOADS[kind], run),
        {"config.yaml", "choices.json", "metrics.jsonl", "summary.json"},
    )
    assert [len(weights[again]) for again in (False, True)] == [1, int(len(names) > 5)]
    for name in names[5:]:
        assert ("step_000006: skipped" in started[name]) == ("step_000006/" in name), started[name]


@pytest.mark.parametrize("kind", PICKLES)
@pytest.mark.parametrize("name", ["model", "optimizer"])
def test_payloads_in_a_checkpoint_with_forged_hashes(call: Call, unfinished: Path, name: str, kind: str) -> None:
    step = unfinished / "checkpoints" / "step_000006"
    (step / f"{name}.safetensors").write_bytes(PAYLOADS[kind])
    state = json.loads((step / "state.json").read_text())
    del state["checksum"]
    state["xxh3"][f"{name}.safetensors"] = xxhash.xxh3_128(PAYLOADS[kind]).hexdigest()
    write_json(step / "state.json", {**state, "checksum": sha256_of(state)})
    call("pretrain_ar", *TINY_MODEL)
    assert "step_000006: skipped" in call.err
    assert "changed" not in call.err


@pytest.mark.parametrize("kind", PICKLES)
def test_payloads_in_a_run_that_is_probed(call: Call, finished: Path, answers: dict[str, Any], kind: str) -> None:
    """A finished probe reads its own files again, and a new probe reads the model."""
    (own,) = (path.name for path in finished.glob("probe-*"))
    names = [*TOP, *MODEL[2:], "checkpoints", *(f"{own}/{name}" for name in TOP if name != "metrics.jsonl")]
    errors = outcomes(names, finished, PAYLOADS[kind], lambda: call("probe", "--seeds", "2"))
    refused = {f"{own}/{name}" for name in ("config.yaml", "choices.json", "summary.json")}
    assert_refused(errors, refused | {"environment.json", "summary.json"})
    errors = outcomes(MODEL[:2], finished, PAYLOADS[kind], lambda: call("probe", "--seeds", "1"))
    assert_refused(errors, set(MODEL[:2]))


@pytest.mark.parametrize("kind", PICKLES)
def test_payloads_in_a_run_that_is_reported(
    call: Call, finished: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_page, "_tokenizer", lambda cache, trust: {"problem": "not loaded"})
    (own,) = (path.name for path in finished.glob("probe-*"))
    probed = [f"{own}/{name}" for name in ("environment.json", "summary.json")]
    names = [*TOP, *MODEL, *probed, "checkpoints"] if kind == "pickle" else [*TOP, *probed]
    errors = outcomes(names, finished, PAYLOADS[kind], lambda: call("report"))
    assert_refused(errors, {*TOP[1:], *probed, *(name for name in MODEL[:2] if name in names)})


@pytest.mark.parametrize("kind", [kind for kind in PAYLOADS if kind.startswith("YAML")])
def test_yaml_with_code_or_without_settings(call: Call, unfinished: Path, kind: str) -> None:
    errors = outcomes(["config.yaml"], unfinished, PAYLOADS[kind], lambda: call("pretrain_ar", *TINY_MODEL))
    assert_refused(errors, {"config.yaml"})
    assert "this" not in sys.modules
    (unfinished / "mine.yaml").write_bytes(PAYLOADS[kind])
    if kind != "YAML with nothing":
        call("pretrain_ar", "--config", str(unfinished / "mine.yaml"))


@pytest.mark.parametrize("content", [b"[]", b"3", b"null", b'"step"', b"{", b"[" * 100_000, b"\xff", b"{}\n[1]\n"])
@pytest.mark.parametrize("name", TOP[1:])
def test_json_with_unexpected_content(call: Call, finished: Path, name: str, content: bytes) -> None:
    """The command that reads the file reports it by name."""
    if name == "metrics.jsonl":
        (finished / "summary.json").unlink()
        content += b"\n"
    (finished / name).write_bytes(content)
    line = call("probe", "--seeds", "2") if name == "environment.json" else call("pretrain_ar", *TINY_MODEL)
    assert f"{finished.relative_to(finished.parent.parent) / name}: " in line
