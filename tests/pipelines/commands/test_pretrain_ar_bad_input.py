"""A mistake in a pre-training run ends with exit code 2 and one line that names it. Existing files are kept."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from data.sources import Video
from pipelines.engine import checkpoints, training
from tests.helpers.caches import MakeCache
from tests.helpers.commands import TINY_MODEL, Call

SMALL = [*TINY_MODEL, "--objective.clusters", "[1,3,3]"]
"""Flags for caches of 2x3x3 codes."""


@pytest.fixture(scope="module")
def caches(tmp_path_factory: pytest.TempPathFactory, make_cache: MakeCache) -> dict[str, str]:
    """Addresses of caches of 10 videos, each of which differs from `toy` in one way."""
    folder = tmp_path_factory.mktemp("caches")
    changes: dict[str, dict[str, Any]] = {
        "toy": {},
        "larger vocabulary": {"vocab_size": 65},
        "other grid": {"codes_shape": (4, 3, 3)},
        "pixels": {"keep_pixels": "raw"},
        "only test": {"videos": [Video(f"{i}.mp4", 5, split="test") for i in range(3)]},
    }
    return {name: str(make_cache(folder / name, **change)) for name, change in changes.items()}


@pytest.fixture
def pretrain(call: Call, caches: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Function like `call` for pretrain_ar with small settings, one of the caches, and the run folder `run`."""
    monkeypatch.chdir(tmp_path)

    def start(*flags: str, cache: str = "toy", **more: Any) -> Any:
        return call("pretrain_ar", *SMALL, "--cache", caches[cache], "--out", "run", *flags, **more)

    return start


def files(folder: Path) -> dict[str, bytes]:
    """Contents of all files in a folder, by relative path."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


MISTAKES = [
    ("--objective.clusters [1,2,3]", "clusters 1x2x3 2x3x3"),
    ("--objective.clusters [0,3,3]", "clusters 0x3x3"),
    ("--objective.clusters [2,3,3]", "objective.clusters"),
    ("--objective.clusters [1,3]", "clusters 3"),
    *(
        (f"--objective.{share} {value}", f"objective.{share} {float(value.lstrip('.'))}")
        for share in ("keep", "targets", "ranks")
        for value in ("0", "2", ".nan", "-0.5")
    ),
    *((f"--objective.{share} nan", f"{share}: nan") for share in ("keep", "targets", "ranks")),
    ("--objective.causal false --objective.keep 1", "keep"),
    ("--objective.causal perhaps", "causal"),
    ("--objective.target pixels", "pixels --keep_pixels jpeg raw"),
    ("--objective.input pixels", "pixels --keep_pixels"),
    ("--objective.target colours", "target"),
    ("--objective.order sideways", "order"),
    ("--objective.likelihood digits", "likelihood digits codes"),
    ("--objective.code_patch [1,2,3]", "objective.code_patch"),
    ("--objective.width 0", "objective.width"),
    ("--objective.depth 0", "depth"),
    ("--objective.heads 5", "width 24 5 heads"),
    ("--objective.decoder_heads 0", "width 24 0 heads"),
    ("--attention flash9", "attention"),
    ("--precision fp16", "precision"),
    *((f"--{name} 0", f"{name} 0") for name in ("steps", "batch_size", "accumulate", "save_every", "lr")),
    ("--accumulate 3", "batch_size 4 accumulate 3"),
    ("--warmup -1", "warmup -1"),
    ("--seed -1", "seed -1"),
    ("--lr nan", "lr: nan"),
    *((f"--{name} {value}", f"{name} {value[1:]}") for name in ("lr", "weight_decay") for value in (".nan", ".inf")),
]
"""Flags, and words that are part of the error line."""


@pytest.mark.parametrize("flags, words", MISTAKES, ids=[flags for flags, _ in MISTAKES])
def test_a_mistake_is_one_line_before_anything_is_written(
    pretrain: Callable[..., Any], tmp_path: Path, flags: str, words: str
) -> None:
    line = pretrain(*flags.split())
    assert line.startswith("pretrain_ar: error: ")
    assert [word for word in words.split() if word not in line] == []
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("flags", [[], ["--plan"]])
def test_a_cache_without_training_videos_is_named(
    pretrain: Callable[..., Any], caches: dict[str, str], flags: list[str]
) -> None:
    line = pretrain(*flags, cache="only test")
    assert [fact for fact in (caches["only test"], "no training videos", "3 in test") if fact not in line] == []
    assert list(Path().iterdir()) == []


@pytest.mark.parametrize("name", ["xformers", "flex"])
@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine runs them")
def test_an_attention_kernel_that_this_machine_cannot_run(pretrain: Callable[..., Any], name: str) -> None:
    line = pretrain("--attention", name)
    assert f"--attention {name}" in line and "CUDA" in line and "cpu" in line
    assert f'"attention": "{name}"' not in Path("run/choices.json").read_text()
    pretrain("--out", "other")


def test_compilation_without_a_compiler(
    pretrain: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch._inductor import config

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))  # an empty cache
    monkeypatch.setenv("PATH", str(tmp_path))
    torch.compiler.reset()
    with config.patch({"cpp.cxx": (None, "no-such-compiler")}):  # monkeypatch cannot restore this setting
        line = pretrain("--compile")
    assert "--compile" in line and "ompiler" in line
    torch.compiler.reset()


def test_a_compiler_that_fails_on_the_model(pretrain: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._dynamo.exc import BackendCompilerFailed

    def fail(*_: object) -> None:
        raise BackendCompilerFailed("inductor", RuntimeError("C++ compile error\nkernel.cpp: no"), None)

    monkeypatch.setattr("pipelines.commands.pretrain_ar.fit", fail)
    line = pretrain("--compile", "false")
    assert line.startswith("pretrain_ar: error: --compile")
    assert "RuntimeError: C++ compile error" in line and "kernel.cpp" not in line


@pytest.mark.parametrize("other", ["larger vocabulary", "other grid"])
def test_the_folder_of_a_run_on_another_cache(pretrain: Callable[..., Any], other: str) -> None:
    pretrain()
    before = files(Path("run"))
    line = pretrain(cache=other)
    assert "--out run" in line
    (Path("run") / "summary.json").unlink()
    assert pretrain(cache=other) == line
    assert files(Path("run")) == {name: content for name, content in before.items() if name != "summary.json"}


def test_a_run_is_not_resumed_if_the_newest_cache_has_changed(
    call: Call, caches: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The settings name no cache, so they are the same for both caches."""
    monkeypatch.chdir(tmp_path)
    flags = [*SMALL, "--caches", "caches", "--out", "run"]
    shutil.copytree(caches["toy"], tmp_path / "caches" / Path(caches["toy"]).name)
    call("pretrain_ar", *flags)
    shutil.rmtree("caches")
    shutil.copytree(caches["other grid"], tmp_path / "caches" / Path(caches["other grid"]).name)
    line = call("pretrain_ar", *flags)
    assert "--out run" in line and "another cache" in line


def test_checkpoints_of_another_model(pretrain: Callable[..., Any]) -> None:
    """The folder holds nothing but the checkpoints."""
    pretrain(cache="larger vocabulary")
    shutil.copytree("run/checkpoints", "other/checkpoints")
    line = pretrain("--out", "other")
    assert "other/checkpoints/step_000006" in line and "size mismatch" in line
    assert len(line) < 400


def test_a_run_folder_that_is_a_file(pretrain: Callable[..., Any]) -> None:
    Path("file").write_text("mine")
    assert "file" in pretrain("--out", "file")
    assert "file" in pretrain("--out", "file/run")
    assert Path("file").read_text() == "mine"


def test_a_finished_run_has_nothing_left_to_do(call: Call, pretrain: Callable[..., Any]) -> None:
    first = pretrain()
    before = files(Path("run"))
    assert pretrain() == first
    assert "run is finished: nothing is left to do" in call.err
    assert files(Path("run")) == before


def unfinished(folder: Path) -> None:
    """Make a finished run look as if it was killed after its last step."""
    (folder / "summary.json").unlink()
    shutil.rmtree(folder / "model")


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json"])
def test_a_truncated_checkpoint_is_named_and_the_one_before_is_used(
    call: Call, pretrain: Callable[..., Any], name: str
) -> None:
    pretrain()
    before = files(Path("run"))
    unfinished(Path("run"))
    file = Path("run/checkpoints/step_000006") / name
    file.write_bytes(file.read_bytes()[:-20])
    pretrain()
    (line,) = [line for line in call.err.splitlines() if line.startswith("run/checkpoints/step_000006")]
    assert "cannot be read" in line
    assert "from step 4" in call.err
    after = files(Path("run"))
    assert [name for name in before if name.endswith("tensors") and after[name] != before[name]] == []


def test_a_run_without_a_readable_checkpoint_does_not_start_again(pretrain: Callable[..., Any]) -> None:
    pretrain()
    unfinished(Path("run"))
    for file in Path("run").glob("checkpoints/*/model.safetensors"):
        file.write_bytes(b"")
    before = files(Path("run"))
    line = pretrain()
    assert "run/checkpoints" in line and "2 checkpoints" in line
    after = files(Path("run"))
    assert {**after, "environment.json": b""} == {**before, "environment.json": b""}


def test_a_full_disk_keeps_the_checkpoint_before(
    call: Call, pretrain: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    resource = pytest.importorskip("resource")
    straight = pretrain("--out", "straight")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    save = checkpoints.save

    def save_on_a_full_disk(folder: Path, *args: Any, **more: Any) -> None:
        if list(folder.glob("step_*")):
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
        save(folder, *args, **more)

    monkeypatch.setattr(training.checkpoints, "save", save_on_a_full_disk)
    try:
        assert "File too large" in pretrain()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    monkeypatch.setattr(training.checkpoints, "save", save)
    assert [path.name for path in Path("run/checkpoints").glob("step_*")] == ["step_000002"]
    assert pretrain()["loss"] == straight["loss"]
    assert "from step 2" in call.err
    assert Path("run/model/model.safetensors").read_bytes() == Path("straight/model/model.safetensors").read_bytes()
    assert sorted(path.name for path in Path("run/checkpoints").iterdir()) == ["step_000004", "step_000006"]
