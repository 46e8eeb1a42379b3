"""Whatever happens to a checkpoint, while it is written or later: the one before it is used, and nothing half (R24)."""

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
    """A small model, an average beside it and their optimizer, which every step leaves otherwise."""

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
        """The state, and what is said of those that are passed over."""
        said: list[str] = []
        extra_modules = {"average": self.average}
        state = checkpoints.load(folder, self.module, self.optimizer, extra_modules=extra_modules, warn=said.append)
        return state, said

    def picture(self) -> list[torch.Tensor]:
        """Weights and moments."""
        moments = [v for p in self.module.parameters() for _, v in sorted(self.optimizer.state[p].items())]
        return [x.detach().clone() for x in (*self.module.parameters(), *self.average.parameters(), *moments)]


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return len(a) == len(b) > 12 and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def two_steps(folder: Path, keep: int) -> tuple[Trained, dict[int, list[torch.Tensor]]]:
    """What was trained, and its picture at both steps, each of which is saved."""
    trained, pictures = Trained(), {}
    for step in (1, 2):
        trained.train()
        trained.save(folder, keep)
        pictures[step] = trained.picture()
    return trained, pictures


def loaded(folder: Path, pictures: dict[int, list[torch.Tensor]]) -> tuple[int, list[str]]:
    """The step that another process continues from, all of which it must get, and what it says."""
    other = Trained(seed=9)
    state, said = other.load(folder)
    assert state is not None and state == {"step": state["step"], "seconds": 1.5 * state["step"]}
    assert same(other.picture(), pictures[state["step"]])
    return state["step"], said


# --- something ends the writing


class Crash(BaseException):
    """As if the process were killed."""


class Fault:
    """Ends the writing before or after the n-th thing that it does to the disk, or within it. -1: only counts them."""

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
            raise self.error  # the dead do not clean up
        self.names.append(name)
        if len(self.names) == self.at + 1:
            self.dead = True
            raise self.error


def save_with_fault(trained: Trained, folder: Path, at: int, error: BaseException) -> list[str]:
    """Save with keep=1; the points passed."""
    with pytest.MonkeyPatch.context() as patch:
        fault = Fault(patch, at, error)
        try:
            trained.save(folder)
        except (Crash, OSError) as stopped:
            assert stopped is error
    return fault.names


@pytest.mark.parametrize("error", [Crash(), OSError(errno.ENOSPC, "No space left on device")], ids=["killed", "full"])
def test_wherever_saving_ends_a_whole_checkpoint_is_left(tmp_path: Path, error: BaseException) -> None:
    """With one that is kept, of which the next takes the place."""
    folder = tmp_path / "checkpoints"
    trained = Trained()
    trained.train()
    trained.save(folder)
    pictures = {1: trained.picture()}
    shutil.copytree(folder, tmp_path / "first")
    trained.train()
    pictures[2] = trained.picture()
    points = save_with_fault(trained, folder, -1, error)
    assert len(points) >= 50
    assert {f"{when} {name}" for when in ("before", "after") for _, name in Fault.WATCHED} <= set(points)
    found = []
    for at in range(len(points)):
        shutil.rmtree(folder)
        shutil.copytree(tmp_path / "first", folder)
        save_with_fault(trained, folder, at, error)
        step, said = loaded(folder, pictures)
        assert said == [], f"{points[at]}: what is half has no final name"
        found.append(step)
        for path in folder.glob("step_*"):
            assert len(list(path.iterdir())) == 4, f"{points[at]}: {path.name} is half"
        trained.save(folder)
        assert sorted(os.listdir(folder)) == ["step_000002"], f"{points[at]}: something is left over"
        assert loaded(folder, pictures) == (2, [])
    renamed = points.index("after rename")
    assert found[renamed:] == [2] * (len(points) - renamed)
    if isinstance(error, Crash):  # a folder that cannot be synchronised is no error
        assert found[:renamed] == [1] * renamed


def test_what_a_killed_process_left_of_another_step_is_removed(tmp_path: Path) -> None:
    trained, _ = two_steps(tmp_path, keep=2)
    (tmp_path / "step_000002").rename(tmp_path / ".step_000007.tmp")
    trained.save(tmp_path, keep=2)
    assert sorted(os.listdir(tmp_path)) == ["step_000001", "step_000002"]


@pytest.mark.parametrize("limit", [0, 50, 300, 600, 900])
def test_a_disk_without_room_leaves_the_earlier_one(tmp_path: Path, limit: int) -> None:
    resource = pytest.importorskip("resource")
    trained = Trained()
    trained.train()
    trained.save(tmp_path)
    pictures = {1: trained.picture()}
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
    assert loaded(tmp_path, pictures) == (1, [])
    pictures[2] = trained.picture()
    trained.save(tmp_path)
    assert loaded(tmp_path, pictures) == (2, [])


def test_a_damaged_later_one_does_not_cost_the_one_that_is_saved(tmp_path: Path) -> None:
    """Where a run went on from the one before and was interrupted at a step between the two."""
    trained, pictures = two_steps(tmp_path, keep=2)
    (tmp_path / "step_000002").rename(tmp_path / "step_000009")
    trained.save(tmp_path, keep=1)
    assert sorted(os.listdir(tmp_path)) == ["step_000002", "step_000009"]
    step, (line,) = loaded(tmp_path, pictures)
    assert step == 2 and "step_000009: skipped" in line


# --- something happens to what is written


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[int, list[torch.Tensor]]]:
    """Two checkpoints, and the pictures of what they hold. What a test changes it puts back."""
    folder = tmp_path_factory.mktemp("checkpoints")
    return folder, two_steps(folder, keep=2)[1]


FILES = ["state.json", "model.safetensors", "average.safetensors", "optimizer.safetensors"]


def assert_noticed(saved: tuple[Path, dict[int, list[torch.Tensor]]], name: str, change: Change, what: str) -> None:
    """With this file of the newest checkpoint changed, the one before is used, and a line says so."""
    folder, pictures = saved
    file = folder / "step_000002" / name
    content = file.read_bytes()
    file.write_bytes(change(content))
    try:
        step, said = loaded(folder, pictures)
    finally:
        file.write_bytes(content)
    assert step == 1, f"{name}, {what}: unnoticed"
    (line,) = said
    assert line.startswith(f"{folder / 'step_000002'}: skipped, it cannot be read (")
    assert "\n" not in line and len(line) < len(str(folder)) + 300


def flipped(bit: int) -> Change:
    return lambda content: b"".join(
        (content[: bit // 8], bytes([content[bit // 8] ^ 1 << bit % 8]), content[bit // 8 + 1 :])
    )


@pytest.mark.parametrize("flips", [40, pytest.param(4000, marks=pytest.mark.soak)], ids=["some", "many"])
@pytest.mark.parametrize("name", FILES)
def test_a_flipped_bit_is_noticed(saved: tuple[Path, dict[int, list[torch.Tensor]]], name: str, flips: int) -> None:
    bits = 8 * (saved[0] / "step_000002" / name).stat().st_size
    for bit in random.Random(name).sample(range(bits), min(bits, flips)):
        assert_noticed(saved, name, flipped(bit), f"bit {bit}")


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_was_cut_or_has_grown_is_noticed(
    saved: tuple[Path, dict[int, list[torch.Tensor]]], name: str
) -> None:
    size = (saved[0] / "step_000002" / name).stat().st_size
    for length in {*range(0, size - 3, size // 40), size - 3}:  # without the newline the JSON is as good
        assert_noticed(saved, name, lambda content, length=length: content[:length], f"cut to {length}")
    if name != "state.json":
        assert_noticed(saved, name, lambda content: content + b"\0", "a byte more")


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_noticed(saved: tuple[Path, dict[int, list[torch.Tensor]]], name: str) -> None:
    folder, pictures = saved
    away = folder / "away"
    (folder / "step_000002" / name).rename(away)
    try:
        step, said = loaded(folder, pictures)
    finally:
        away.rename(folder / "step_000002" / name)
    assert step == 1
    assert "step_000002" in said[0] and name in said[0]


def edited(**changes: Any) -> Change:
    """The JSON with other values; None takes one away."""
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
    "hashes that are none": edited(xxh3=[1, 2]),
    "hashes of nothing": edited(xxh3={}),
    "a hash that never ends": edited(xxh3={"/dev/zero": ""}),
}


@pytest.mark.parametrize("what", STATES)
def test_a_state_that_makes_no_sense_is_noticed(saved: tuple[Path, dict[int, list[torch.Tensor]]], what: str) -> None:
    assert_noticed(saved, "state.json", STATES[what], what)


def test_a_checkpoint_whose_files_are_of_another_step_is_noticed(
    saved: tuple[Path, dict[int, list[torch.Tensor]]],
) -> None:
    """Each file is whole, but they do not belong together."""
    earlier = saved[0] / "step_000001"
    for name in FILES:
        assert_noticed(saved, name, lambda content, name=name: (earlier / name).read_bytes(), "of another step")


def test_a_folder_of_the_name_that_holds_nothing_is_passed_over(
    saved: tuple[Path, dict[int, list[torch.Tensor]]], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(saved[0], tmp_path / "copy"))
    (folder / "step_000008").mkdir()
    (folder / "step_000009").write_bytes(b"a file")
    step, said = loaded(folder, saved[1])
    assert step == 2
    assert ["step_000009" in said[0], "step_000008" in said[1], len(said)] == [True, True, 2]


def test_where_none_can_be_read_it_is_one_error(
    saved: tuple[Path, dict[int, list[torch.Tensor]]], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(saved[0], tmp_path / "copy"))
    for i, file in enumerate(folder.glob("*/model.safetensors")):
        file.write_bytes(file.read_bytes()[: 100 * i])
    other = Trained(seed=9)
    before = other.picture()
    with pytest.raises(ValueError, match="copy: none of its 2 checkpoints can be read") as caught:
        other.load(folder)
    assert "\n" not in str(caught.value)
    assert all(map(torch.equal, before, other.picture())), "nothing of them was taken"


def test_without_any_there_is_no_state(tmp_path: Path) -> None:
    assert Trained().load(tmp_path / "none") == (None, [])
