"""Fixtures for tests of loaders: small clips, and folders with VQGANs of taming-transformers."""

import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.datasets import load_sample_images
from torch import Tensor, nn

from tests.helpers.vqgan_folders import LOSS, SMALL, Loss, build, lightning_checkpoint, write


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Use one thread: on busy cores, several threads wait for each other far longer than they work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def package() -> Iterator[ModuleType]:
    """`taming.models.vqgan`, with stand-ins for pytorch-lightning and for the function that builds the loss."""
    lightning, main = ModuleType("pytorch_lightning"), ModuleType("taming.main")
    lightning.LightningModule = nn.Module  # type: ignore[attr-defined]
    main.instantiate_from_config = lambda config: Loss() if config is LOSS else lambda step: 1.0  # type: ignore[attr-defined]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "pytorch_lightning", lightning)
        patch.setitem(sys.modules, "taming.main", main)
        from taming.models import vqgan

        yield vqgan
    del sys.modules["taming.models.vqgan"], sys.modules["taming.models"]


@pytest.fixture(scope="session")
def long_photographs() -> Tensor:
    """Windows that move over two photographs, uint8 (2, 9, 64, 96, 3)."""
    clips = [[image[150 + t : 214 + t, 200 + t : 296 + t] for t in range(9)] for image in load_sample_images().images]
    return torch.from_numpy(np.array(clips))


@pytest.fixture(scope="session")
def photographs(long_photographs: Tensor) -> Tensor:
    """Two frames of each clip, five apart: (2, 2, 64, 96, 3)."""
    return long_photographs[:, :6:5]


@pytest.fixture(scope="session")
def details(photographs: Tensor) -> Tensor:
    """Small parts of the frames, for small networks: (2, 2, 16, 24, 3)."""
    return photographs[:, :, :16, :24]


@pytest.fixture(params=SMALL)
def small(request: pytest.FixtureRequest, package: ModuleType, details: Tensor, tmp_path: Path) -> tuple[Path, Any]:
    """A folder, and the model of the package that is in it, for each kind of quantizer."""
    network = build(package, SMALL[request.param], details)
    return write(tmp_path / "small", SMALL[request.param], lightning_checkpoint(network)), network


@pytest.fixture
def vqgan(package: ModuleType, details: Tensor, tmp_path: Path) -> tuple[Path, Any]:
    """A folder, and the VQModel of the package that is in it."""
    network = build(package, SMALL["taming-f2-32"], details)
    return write(tmp_path / "vqgan", SMALL["taming-f2-32"], lightning_checkpoint(network)), network
