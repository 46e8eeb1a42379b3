"""If a checkpoint is interrupted, damaged or incomplete, the previous one is used."""

import errno
import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from torch import nn

from pipelines.engine import checkpoints
from pipelines.engine.training import make_optimizer
from pipelines.settings.training import Training

Change = Callable[[bytes], bytes]


class Trained:
    """A small model, an average of its weights and its optimizer. Each step changes all of them."""

    def __init__(self, seed: int = 0) -> None:
        torch.manual_seed(seed)
        self.module = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
        self.average = nn.Linear(3, 4)
        self.optimizer = make_optimizer(self.module, Training())
        self.step = 0

    def train(self) -> None:
        self.module(torch.randn(5, 3)).square().mean().backward()
        self.optimizer.step()
        self.average.weight.data.lerp_(self.module[0].weight, 0.5)
        self.step += 1

    def save(self, folder: Path, keep: int = 1) -> None:
        state = {"step": self.step, "seconds": 1.5 * self.step}
        checkpoints.save(
            folder, self.module, self.optimizer, state, extra_modules={"average": self.average}, keep=keep, write=True
        )

    def load(self, folder: Path) -> tuple[dict[str, Any] | None, list[str]]:
        """Return the state, and the warnings about skipped checkpoints."""
        warnings: list[str] = []
        extra_modules = {"average": self.average}
        state = checkpoints.load(folder, self.module, self.optimizer, extra_modules=extra_modules, warn=warnings.append)
        return state, warnings

    def snapshot(self) -> list[torch.Tensor]:
        """Return copies of weights and moments."""
        moments = [v for p in self.module.parameters() for _, v in sorted(self.optimizer.state[p].items())]
        return [x.detach().clone() for x in (*self.module.parameters(), *self.average.parameters(), *moments)]


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return len(a) == len(b) > 12 and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def two_steps(folder: Path, keep: int) -> tuple[Trained, dict[int, list[torch.Tensor]]]:
    """Train and save two steps; return the model and its snapshots by step."""
    trained, snapshots = Trained(), {}
    for step in (1, 2):
        trained.train()
        trained.save(folder, keep)
        snapshots[step] = trained.snapshot()
    return trained, snapshots


def loaded(folder: Path, snapshots: dict[int, list[torch.Tensor]]) -> tuple[int, list[str]]:
    """Load as another process would and compare with the snapshot; return the step and the warnings."""
    other = Trained(seed=9)
    state, warnings = other.load(folder)
    assert state is not None and state == {"step": state["step"], "seconds": 1.5 * state["step"]}
    assert same(other.snapshot(), snapshots[state["step"]])
    return state["step"], warnings


# --- interrupted while saving


class Crash(BaseException):
    """Raised in place of killing the process."""


class Fault:
    """Raise an error before, during or after the n-th disk operation of a save. With -1, only count them."""

    WATCHED = (
        *((checkpoints, name) for name in ("save_file", "write_json", "sync_folder")),
        *((os, name) for name in ("fsync", "replace", "unlink", "rmdir")),
        *((Path, name) for name in ("mkdir", "rename", "unlink")),
        (shutil, "rmtree"),
    )

    def __init__(self, monkeypatch: pytest.MonkeyPatch, at: int, error: BaseException) -> None:
        self.at, self.error = at, error
        self.names: list[str] = []
        self.dead = False
        for owner, name in self.WATCHED:
            monkeypatch.setattr(owner, name, self._wrapped(getattr(owner, name), name))

    def _wrapped(self, function: Callable[..., Any], name: str) -> Callable[..., Any]:
        def call(*args: Any, **more: Any) -> Any:
            self._point(f"before {name}")
            result = function(*args, **more)
            if name in ("save_file", "write_json"):
                self._half(args[1] if name == "save_file" else args[0], name)
            self._point(f"after {name}")
            return result

        return call

    def _half(self, file: Path, name: str) -> None:
        content = file.read_bytes()
        for share in (0.0, 0.5, 0.99):
            if len(self.names) == self.at:
                file.write_bytes(content[: int(share * len(content))])
            self._point(f"{share} of {name}")

    def _point(self, name: str) -> None:
        if self.dead and isinstance(self.error, Crash):
            # A killed process does not clean up.
            raise self.error
        self.names.append(name)
        if len(self.names) == self.at + 1:
            self.dead = True
            raise self.error


def save_with_fault(trained: Trained, folder: Path, at: int, error: BaseException) -> list[str]:
    """Save with keep=1; return the points that were passed."""
    with pytest.MonkeyPatch.context() as patch:
        fault = Fault(patch, at, error)
        try:
            trained.save(folder)
        except (Crash, OSError) as stopped:
            assert stopped is error
    return fault.names


@pytest.mark.parametrize("error", [Crash(), OSError(errno.ENOSPC, "No space left on device")], ids=["killed", "full"])
def test_an_interrupted_save_leaves_a_complete_checkpoint(tmp_path: Path, error: BaseException) -> None:
    """Only one checkpoint is kept, which the interrupted save was about to replace."""
    folder = tmp_path / "checkpoints"
    trained = Trained()
    trained.train()
    trained.save(folder)
    snapshots = {1: trained.snapshot()}
    shutil.copytree(folder, tmp_path / "first")
    trained.train()
    snapshots[2] = trained.snapshot()
    points = save_with_fault(trained, folder, -1, error)
    assert len(points) >= 50
    assert {f"{when} {name}" for when in ("before", "after") for _, name in Fault.WATCHED} <= set(points)
    steps = []
    for at in range(len(points)):
        shutil.rmtree(folder)
        shutil.copytree(tmp_path / "first", folder)
        save_with_fault(trained, folder, at, error)
        step, warnings = loaded(folder, snapshots)
        assert warnings == [], f"{points[at]}: an incomplete checkpoint has its final name"
        steps.append(step)
        for path in folder.glob("step_*"):
            assert len(list(path.iterdir())) == 4, f"{points[at]}: {path.name} is incomplete"
        trained.save(folder)
        assert sorted(os.listdir(folder)) == ["step_000002"], f"{points[at]}: something is left over"
        assert loaded(folder, snapshots) == (2, [])
    renamed = points.index("after rename")
    assert steps[renamed:] == [2] * (len(points) - renamed)
    # OSError of sync_folder is ignored, so the save may succeed.
    if isinstance(error, Crash):
        assert steps[:renamed] == [1] * renamed


def test_temporary_folders_of_killed_saves_are_removed(tmp_path: Path) -> None:
    trained, _ = two_steps(tmp_path, keep=2)
    (tmp_path / "step_000002").rename(tmp_path / ".step_000007.tmp")
    trained.save(tmp_path, keep=2)
    assert sorted(os.listdir(tmp_path)) == ["step_000001", "step_000002"]


@pytest.mark.parametrize("limit", [0, 50, 300, 600, 900])
def test_a_full_disk_leaves_the_previous_checkpoint(tmp_path: Path, limit: int) -> None:
    resource = pytest.importorskip("resource")
    trained = Trained()
    trained.train()
    trained.save(tmp_path)
    snapshots = {1: trained.snapshot()}
    largest = max(file.stat().st_size for file in (tmp_path / "step_000001").iterdir())
    assert largest > 900
    trained.train()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        with pytest.raises((OSError, SafetensorError), match="File too large"):
            trained.save(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert loaded(tmp_path, snapshots) == (1, [])
    snapshots[2] = trained.snapshot()
    trained.save(tmp_path)
    assert loaded(tmp_path, snapshots) == (2, [])


def test_a_damaged_later_checkpoint_does_not_count_as_kept(tmp_path: Path) -> None:
    """The run was resumed from an earlier checkpoint and interrupted before the step of the damaged one."""
    trained, snapshots = two_steps(tmp_path, keep=2)
    (tmp_path / "step_000002").rename(tmp_path / "step_000009")
    trained.save(tmp_path, keep=1)
    assert sorted(os.listdir(tmp_path)) == ["step_000002", "step_000009"]
    step, (line,) = loaded(tmp_path, snapshots)
    assert step == 2 and "step_000009: skipped" in line


# --- damaged after saving


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[int, list[torch.Tensor]]]:
    """Folder with two checkpoints, and their snapshots. Tests restore what they change."""
    folder = tmp_path_factory.mktemp("checkpoints")
    return folder, two_steps(folder, keep=2)[1]


FILES = ["state.json", "model.safetensors", "average.safetensors", "optimizer.safetensors"]


def assert_skipped(saved: tuple[Path, dict[int, list[torch.Tensor]]], name: str, change: Change, what: str) -> None:
    """Change a file of the newest checkpoint; assert that the previous checkpoint is used, with one warning."""
    folder, snapshots = saved
    file = folder / "step_000002" / name
    content = file.read_bytes()
    file.write_bytes(change(content))
    try:
        step, warnings = loaded(folder, snapshots)
    finally:
        file.write_bytes(content)
    assert step == 1, f"{name}, {what}: unnoticed"
    (line,) = warnings
    assert line.startswith(f"{folder / 'step_000002'}: skipped, it cannot be read (")
    assert "\n" not in line and len(line) < len(str(folder)) + 300


def flipped(bit: int) -> Change:
    return lambda content: b"".join(
        (content[: bit // 8], bytes([content[bit // 8] ^ 1 << bit % 8]), content[bit // 8 + 1 :])
    )


@pytest.mark.parametrize("flips", [40, pytest.param(4000, marks=pytest.mark.soak)], ids=["some", "many"])
@pytest.mark.parametrize("name", FILES)
def test_a_flipped_bit_is_detected(saved: tuple[Path, dict[int, list[torch.Tensor]]], name: str, flips: int) -> None:
    bits = 8 * (saved[0] / "step_000002" / name).stat().st_size
    for bit in random.Random(name).sample(range(bits), min(bits, flips)):
        assert_skipped(saved, name, flipped(bit), f"bit {bit}")


@pytest.mark.parametrize("name", FILES)
def test_a_truncated_or_longer_file_is_detected(saved: tuple[Path, dict[int, list[torch.Tensor]]], name: str) -> None:
    size = (saved[0] / "step_000002" / name).stat().st_size
    # Cut at least 3 bytes: JSON without its final newline is still valid.
    for length in {*range(0, size - 3, size // 40), size - 3}:
        assert_skipped(saved, name, lambda content, length=length: content[:length], f"cut to {length}")
    if name != "state.json":
        assert_skipped(saved, name, lambda content: content + b"\0", "a byte more")


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_detected(saved: tuple[Path, dict[int, list[torch.Tensor]]], name: str) -> None:
    folder, snapshots = saved
    away = folder / "away"
    (folder / "step_000002" / name).rename(away)
    try:
        step, warnings = loaded(folder, snapshots)
    finally:
        away.rename(folder / "step_000002" / name)
    assert step == 1
    assert "step_000002" in warnings[0] and name in warnings[0]


def edited(**changes: Any) -> Change:
    """Return a function that changes JSON values. The value None deletes a key."""
    return lambda content: json.dumps(
        {k: v for k, v in {**json.loads(content), **changes}.items() if v is not None}
    ).encode()


STATES: dict[str, Change] = {
    "empty": lambda content: b"",
    "no JSON": lambda content: b"\x80\x04\x95not json",
    "a list": lambda content: b"[]",
    "a list of one": lambda content: b"[" + content + b"]",
    "a number": lambda content: b"3",
    "a string": lambda content: b'"step"',
    "null": lambda content: b"null",
    "nested": lambda content: b"[" * 100_000,
    "a long number": lambda content: b"9" * 10_000,
    "no keys": lambda content: b"{}",
    "no step": edited(step=None),
    "no seconds": edited(seconds=None),
    "no hashes": edited(xxh3=None),
    "no checksum": edited(checksum=None),
    "another step": edited(step=1),
    "a word for a step": edited(step="2"),
    "half a step": edited(step=2.5),
    "not a number of seconds": edited(seconds=float("nan")),
    "hashes that are a list": edited(xxh3=[1, 2]),
    "hashes of nothing": edited(xxh3={}),
    "a hash that never ends": edited(xxh3={"/dev/zero": ""}),
}


@pytest.mark.parametrize("what", STATES)
def test_an_invalid_state_is_detected(saved: tuple[Path, dict[int, list[torch.Tensor]]], what: str) -> None:
    assert_skipped(saved, "state.json", STATES[what], what)


def test_files_of_another_step_are_detected(
    saved: tuple[Path, dict[int, list[torch.Tensor]]],
) -> None:
    """Each file is intact, but the files do not belong together."""
    earlier = saved[0] / "step_000001"
    for name in FILES:
        assert_skipped(saved, name, lambda content, name=name: (earlier / name).read_bytes(), "of another step")


def test_empty_folders_and_files_named_like_checkpoints_are_skipped(
    saved: tuple[Path, dict[int, list[torch.Tensor]]], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(saved[0], tmp_path / "copy"))
    (folder / "step_000008").mkdir()
    (folder / "step_000009").write_bytes(b"a file")
    step, warnings = loaded(folder, saved[1])
    assert step == 2
    assert ["step_000009" in warnings[0], "step_000008" in warnings[1], len(warnings)] == [True, True, 2]


def test_it_is_an_error_if_no_checkpoint_can_be_read(
    saved: tuple[Path, dict[int, list[torch.Tensor]]], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(saved[0], tmp_path / "copy"))
    for i, file in enumerate(folder.glob("*/model.safetensors")):
        file.write_bytes(file.read_bytes()[: 100 * i])
    other = Trained(seed=9)
    before = other.snapshot()
    with pytest.raises(ValueError, match="copy: none of its 2 checkpoints can be read") as caught:
        other.load(folder)
    assert "\n" not in str(caught.value)
    assert all(map(torch.equal, before, other.snapshot())), "nothing was loaded"


def test_without_checkpoints_there_is_no_state(tmp_path: Path) -> None:
    assert Trained().load(tmp_path / "none") == (None, [])
