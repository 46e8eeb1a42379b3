"""A mistake in a pre-training ends with exit code 2 and one line that names it; what was written stays."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pipelines.engine import checkpoints, training
from tests.helpers.caches import MakeCache
from tests.helpers.commands import TINY_MODEL, Call

SMALL = [*TINY_MODEL, "--objective.clusters", "[1,3,3]"]
"""For caches of 2 x 3 x 3 codes."""


@pytest.fixture(scope="module")
def caches(tmp_path_factory: pytest.TempPathFactory, make_cache: MakeCache) -> dict[str, str]:
    """Addresses of caches of 10 videos, which differ in one thing."""
    folder = tmp_path_factory.mktemp("caches")
    changes: dict[str, dict[str, Any]] = {
        "toy": {},
        "larger vocabulary": {"vocab_size": 65},
        "other grid": {"codes_shape": (4, 3, 3)},
        "pixels": {"keep_pixels": "raw"},
    }
    return {name: str(make_cache(folder / name, **change)) for name, change in changes.items()}


@pytest.fixture
def pretrain(call: Call, caches: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """pretrain(*flags, cache=..., **) -> as `call`; the run is in `run`."""
    monkeypatch.chdir(tmp_path)

    def start(*flags: str, cache: str = "toy", **more: Any) -> Any:
        return call("pretrain_ar", *SMALL, "--cache", caches[cache], "--out", "run", *flags, **more)

    return start


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


MISTAKES = [
    ("--objective.clusters [1,2,3]", "clusters of 1x2x3 tokens do not divide the grid of 2x3x3 tokens"),
    ("--objective.clusters [0,3,3]", "clusters of 0x3x3 tokens do not divide"),
    ("--objective.clusters [2,3,3]", "objective.clusters: one cluster covers the whole clip"),
    ("--objective.clusters [1,3]", "clusters: Expected a tuple with 3 elements"),
    *(
        (
            f"--objective.{share} {value}",
            f"objective.{share} must be in (0, 1], got {float(value.lstrip('.'))}",
        )
        for share in ("keep", "targets", "ranks")
        for value in ("0", "2", ".nan", "-0.5")
    ),
    *((f"--objective.{share} nan", f"{share}: must be a number, got nan") for share in ("keep", "targets", "ranks")),
    ("--objective.causal false --objective.keep 1", "objective.keep 1.0 drops none"),
    ("--objective.causal perhaps", "causal"),
    ("--objective.target pixels", "--keep_pixels jpeg or raw"),
    ("--objective.input pixels", "--keep_pixels jpeg or raw"),
    ("--objective.target colours", "target"),
    ("--objective.order sideways", "order"),
    ("--objective.likelihood digits", "likelihood digits needs codes made of digits"),
    ("--objective.code_patch [1,2,3]", "objective.code_patch"),
    ("--objective.width 0", "objective.width"),
    ("--objective.depth 0", "depth"),
    ("--objective.heads 5", "width 24 does not split into 5 heads"),
    ("--objective.decoder_heads 0", "width 24 does not split into 0 heads"),
    ("--attention flash9", "attention"),
    ("--precision fp16", "precision"),
    *((f"--{name} 0", f"{name} must be ") for name in ("steps", "batch_size", "accumulate", "save_every", "lr")),
    ("--accumulate 3", "batch_size 4 must be a multiple of accumulate, got 3"),
    ("--warmup -1", "warmup must be finite and at least 0, got -1"),
    ("--seed -1", "seed must be from 0 to 2147483647, got -1"),
    ("--lr nan", "lr: must be a number, got nan"),
    *((f"--{name} {value}", f", got {value[1:]}") for name in ("lr", "weight_decay") for value in (".nan", ".inf")),
]


@pytest.mark.parametrize("flags, words", MISTAKES, ids=[flags for flags, _ in MISTAKES])
def test_a_mistake_is_one_line_before_anything_is_written(
    pretrain: Callable[..., Any], tmp_path: Path, flags: str, words: str
) -> None:
    line = pretrain(*flags.split())
    assert line.startswith("pretrain_ar: error: ") and words in line
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["xformers", "flex"])
@pytest.mark.skipif(torch.cuda.is_available(), reason="they run here")
def test_attention_that_does_not_run_here(pretrain: Callable[..., Any], name: str) -> None:
    line = pretrain("--attention", name)
    assert f"--attention {name} does not run here: attention {name} needs a CUDA device" in line
    assert f'"attention": "{name}"' not in Path("run/choices.json").read_text()
    pretrain("--out", "other")


def test_compilation_where_there_is_no_compiler(
    pretrain: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch._inductor import config

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))  # holds nothing that was compiled before
    monkeypatch.setenv("PATH", str(tmp_path))
    torch.compiler.reset()
    with config.patch({"cpp.cxx": (None, "no-such-compiler")}):  # monkeypatch does not give it back
        line = pretrain("--compile")
    assert "--compile does not work here: " in line and "ompiler" in line
    torch.compiler.reset()


def test_a_compiler_that_fails_on_the_model_only(pretrain: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._dynamo.exc import BackendCompilerFailed

    def fail(*_: object) -> None:
        raise BackendCompilerFailed("inductor", RuntimeError("C++ compile error\nkernel.cpp: no"), None)

    monkeypatch.setattr("pipelines.commands.pretrain_ar.fit", fail)
    line = pretrain("--compile", "false")
    assert line.startswith("pretrain_ar: error: --compile: ")
    assert line.endswith("RuntimeError: C++ compile error; leave it out")


@pytest.mark.parametrize("other", ["larger vocabulary", "other grid"])
def test_the_folder_of_a_run_on_another_cache(pretrain: Callable[..., Any], other: str) -> None:
    pretrain()
    before = files(Path("run"))
    line = pretrain(cache=other)
    assert "--out run: contains a run " in line and "choose another --out" in line
    (Path("run") / "summary.json").unlink()
    assert pretrain(cache=other) == line
    assert files(Path("run")) == {name: content for name, content in before.items() if name != "summary.json"}


def test_the_newest_cache_is_another_one_when_a_run_is_continued(
    call: Call, caches: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The settings are the same, for they name none."""
    monkeypatch.chdir(tmp_path)
    flags = [*SMALL, "--caches", "caches", "--out", "run"]
    shutil.copytree(caches["toy"], tmp_path / "caches" / Path(caches["toy"]).name)
    call("pretrain_ar", *flags)
    shutil.rmtree("caches")
    shutil.copytree(caches["other grid"], tmp_path / "caches" / Path(caches["other grid"]).name)
    line = call("pretrain_ar", *flags)
    assert "--out run: contains a run on other videos, another cache or other entries; choose another --out" in line


def test_checkpoints_of_another_model(pretrain: Callable[..., Any]) -> None:
    """Where nothing else is there that tells."""
    pretrain(cache="larger vocabulary")
    shutil.copytree("run/checkpoints", "other/checkpoints")
    line = pretrain("--out", "other")
    assert "other/checkpoints/step_000006: belongs to another model (" in line and "size mismatch" in line
    assert len(line) < 400


def test_a_folder_that_cannot_be_one(pretrain: Callable[..., Any]) -> None:
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
    """As if it had been killed after its last step."""
    (folder / "summary.json").unlink()
    shutil.rmtree(folder / "model")


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json"])
def test_a_checkpoint_that_was_cut_is_passed_over_and_named(
    call: Call, pretrain: Callable[..., Any], name: str
) -> None:
    pretrain()
    before = files(Path("run"))
    unfinished(Path("run"))
    file = Path("run/checkpoints/step_000006") / name
    file.write_bytes(file.read_bytes()[:-20])
    pretrain()
    (line,) = [line for line in call.err.splitlines() if ": skipped, " in line]
    assert line.startswith("run/checkpoints/step_000006: skipped, it cannot be read (")
    assert "continuing run from step 4" in call.err
    after = files(Path("run"))
    assert [name for name in before if name.endswith("tensors") and after[name] != before[name]] == []


def test_when_no_checkpoint_can_be_read_the_run_is_not_begun_anew(pretrain: Callable[..., Any]) -> None:
    pretrain()
    unfinished(Path("run"))
    for file in Path("run").glob("checkpoints/*/model.safetensors"):
        file.write_bytes(b"")
    before = files(Path("run"))
    assert "run/checkpoints: none of its 2 checkpoints can be read" in pretrain()
    after = files(Path("run"))
    assert {**after, "environment.json": b""} == {**before, "environment.json": b""}


def test_a_disk_that_gets_full_leaves_the_checkpoint_before(
    call: Call, pretrain: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    resource = pytest.importorskip("resource")
    straight = pretrain("--out", "straight")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    save = checkpoints.save

    def save_at_last(folder: Path, *args: Any, **more: Any) -> None:
        if list(folder.glob("step_*")):
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
        save(folder, *args, **more)

    monkeypatch.setattr(training.checkpoints, "save", save_at_last)
    try:
        assert "File too large" in pretrain()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    monkeypatch.setattr(training.checkpoints, "save", save)
    assert [path.name for path in Path("run/checkpoints").glob("step_*")] == ["step_000002"]
    assert pretrain()["loss"] == straight["loss"]
    assert "continuing run from step 2" in call.err
    assert Path("run/model/model.safetensors").read_bytes() == Path("straight/model/model.safetensors").read_bytes()
    assert sorted(path.name for path in Path("run/checkpoints").iterdir()) == ["step_000004", "step_000006"]
