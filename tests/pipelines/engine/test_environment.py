"""`checks` reports every fact, and a broken or missing part with the change that would solve it."""

import builtins
import shutil
from collections import namedtuple
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import pytest

from ar_model.backends import BACKENDS
from pipelines.engine import environment
from pipelines.engine.environment import Check, checks


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out the compiler, which takes seconds; the dry run of the GPU check includes it."""
    monkeypatch.delitem(environment._CHECKS, "torch.compile")


def report() -> dict[str, Check]:
    return {check.name: check for check in checks()}


def test_a_report_covers_versions_devices_kernels_decoders_and_memory() -> None:
    found = report()
    assert found["torch"].state == version("torch")
    assert {
        "Python",
        "system",
        "CUDA",
        "precision auto",
        "video decoders",
        "memory",
        "disk of this folder",
    } <= found.keys()
    assert {f"attention {name}" for name in BACKENDS} <= found.keys()
    assert "runs on" in found["attention plain"].state and not found["attention plain"].fix
    assert "h264" in found["video decoders"].state


def test_a_missing_package_has_a_fix_and_an_optional_one_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    def without(name: str) -> str:
        if name in ("webdataset", "transformers"):
            raise PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr(environment, "version", without)
    found = report()
    assert "not installed" in found["webdataset"].state and "make setup" in found["webdataset"].fix
    assert "not installed" in found["transformers"].state and not found["transformers"].fix


@pytest.mark.parametrize("error", [AttributeError("half installed"), OSError("libcudart.so.12: no such file")])
def test_a_check_that_fails_is_a_line_of_the_report(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def broken() -> Iterator[Check]:
        yield Check("before", "fine")
        raise error

    monkeypatch.setitem(environment._CHECKS, "video decoders", broken)
    found = report()
    assert str(error) in found["video decoders"].state and found["video decoders"].fix
    assert "before" in found and "memory" in found


def test_a_package_that_cannot_be_imported_costs_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    real: Callable[..., Any] = builtins.__import__

    def refuse(name: str, *arguments: Any, **settings: Any) -> Any:
        if name == "av":
            raise ImportError("libavcodec.so.61: cannot open shared object file")
        return real(name, *arguments, **settings)

    monkeypatch.setattr(builtins, "__import__", refuse)
    found = report()
    assert "libavcodec" in found["video decoders"].state and found["video decoders"].fix
    assert "GiB" in found["memory"].state


def test_little_space_has_a_fix(monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(2**26, 0, 2**26))
    found = report()
    assert "64" in found["disk of this folder"].state and found["disk of this folder"].fix
    if "/dev/shm" in found:
        assert "--shm-size" in found["/dev/shm"].fix


def test_a_kernel_without_a_gpu_has_a_reason_and_no_fix() -> None:
    check = report()["attention xformers"]
    assert ("CUDA" in check.state and not check.fix) or "runs on cuda" in check.state
