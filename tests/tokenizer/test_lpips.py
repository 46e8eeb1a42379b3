"""LPIPS equals the implementation of taming, is not saved in checkpoints, and accepts only the published weights."""

import importlib
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tokenizer.lpips import LPIPS, load_lpips

VGG_LAYOUT = (64, 64, "M", 128, 128, "M", 256, 256, 256, "M", 512, 512, 512, "M", 512, 512, 512, "M")


def vgg16_features() -> nn.Sequential:
    """torchvision's `vgg16().features`, written from its published layout."""
    layers: list[nn.Module] = []
    channels = 3
    for entry in VGG_LAYOUT:
        if isinstance(entry, int):
            layers += [nn.Conv2d(channels, entry, 3, padding=1), nn.ReLU(inplace=True)]
            # Keeps the scale of features through all layers.
            nn.init.kaiming_normal_(layers[-2].weight, nonlinearity="relu")
            channels = entry
        else:
            layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers)


Weights = tuple[dict[str, Tensor], dict[str, Tensor]]


def random_weights() -> Weights:
    """Return random weights under the names of the two published files: VGG16, and the linear layers."""
    torch.manual_seed(0)
    vgg = {f"features.{name}": tensor for name, tensor in vgg16_features().state_dict().items()}
    vgg |= {f"classifier.{layer}.{kind}": torch.zeros(1) for layer in (0, 3, 6) for kind in ("weight", "bias")}
    linear = {f"lin{i}.model.1.weight": torch.rand(1, c, 1, 1) for i, c in enumerate((64, 128, 256, 512, 512))}
    return vgg, linear


def write_weights(folder: Path, weights: Weights) -> Path:
    torch.save(weights[0], folder / "vgg16-397923af.pth")
    torch.save(weights[1], folder / "vgg.pth")
    return folder


@pytest.fixture(scope="module")
def published() -> Weights:
    return random_weights()


@pytest.fixture(scope="module")
def folder(published: Weights, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_weights(tmp_path_factory.mktemp("lpips"), published)


@pytest.fixture(scope="module")
def lpips(folder: Path) -> LPIPS:
    return load_lpips(folder)


@pytest.fixture
def taming_lpips(folder: Path, monkeypatch: pytest.MonkeyPatch) -> nn.Module:
    """LPIPS of taming with the same weights, and with stand-ins for the modules that would download weights."""
    pytest.importorskip("taming")

    def vgg16(pretrained: bool) -> types.SimpleNamespace:
        features = vgg16_features()
        saved = torch.load(folder / "vgg16-397923af.pth", weights_only=True)
        features.load_state_dict({k.removeprefix("features."): v for k, v in saved.items() if k.startswith("features")})
        return types.SimpleNamespace(features=features)

    stand_ins: dict[str, dict[str, Any]] = {
        "torchvision": {"models": types.SimpleNamespace(vgg16=vgg16)},
        "torchvision.models": {"vgg16": vgg16},
        "taming.util": {"get_ckpt_path": lambda name, root: str(folder / "vgg.pth")},
    }
    for name, attributes in stand_ins.items():
        module = types.ModuleType(name)
        vars(module).update(attributes)
        monkeypatch.setitem(sys.modules, name, module)
    for name in ("taming.modules.losses", "taming.modules.losses.vqperceptual", "taming.modules.losses.lpips"):
        # Set first, so that monkeypatch removes the imported module afterwards.
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
        monkeypatch.delitem(sys.modules, name)
    return importlib.import_module("taming.modules.losses.lpips").LPIPS().eval()


def random_images(seed: int) -> Tensor:
    return torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def smooth_images(seed: int) -> Tensor:
    coarse = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(seed))
    return nn.functional.interpolate(coarse, (64, 64), mode="bicubic").tanh()


def measured(distance: Callable[[Tensor, Tensor], Tensor], a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return distances, and the gradients of their sum with respect to both images."""
    a, b = a.clone().requires_grad_(), b.clone().requires_grad_()
    distances = distance(a, b).flatten()
    return distances.detach(), *torch.autograd.grad(distances.sum(), (a, b))


@pytest.mark.filterwarnings("ignore::SyntaxWarning")
@pytest.mark.parametrize("images", [random_images, smooth_images])
def test_distances_and_gradients_are_those_of_taming(
    folder: Path, taming_lpips: nn.Module, images: Callable[[int], Tensor]
) -> None:
    """Gradients are compared in double precision: in single precision, rounding switches a few ReLUs."""
    ours = load_lpips(folder)
    a, b = images(1), images(2)
    single, expected_single = ours(a, b), taming_lpips(a, b).flatten()
    assert (single - expected_single).abs().max() <= 1e-6 * expected_single.min()
    results = measured(ours.double(), a.double(), b.double())
    expected = measured(taming_lpips.double(), a.double(), b.double())
    assert results[0].shape == (2,)
    for actual, reference in zip(results, expected, strict=True):
        assert (actual - reference).abs().max() <= 1e-10 * reference.abs().max()
        assert reference.abs().max() > 0


def test_the_distance_of_an_image_to_itself_is_zero_and_distances_are_symmetric(lpips: LPIPS) -> None:
    a, b = random_images(1), smooth_images(2)
    assert torch.equal(lpips(a, a), torch.zeros(2))
    assert torch.equal(lpips(a, b), lpips(b, a))
    assert (lpips(a, b) > 0).all()


@pytest.mark.usefixtures("two_threads")
def test_distances_do_not_depend_on_other_images_of_the_batch(lpips: LPIPS) -> None:
    a, b = random_images(1), smooth_images(2)
    assert torch.allclose(lpips(a[1:], b[1:])[0], lpips(a, b)[1], rtol=1e-5)


def test_images_without_active_features_have_finite_gradients(published: Weights) -> None:
    """Other implementations take the square root of a sum of squares, whose gradient is NaN at zero."""
    silent = {k: torch.full_like(v, -1e3) if k.endswith("bias") else v for k, v in published[0].items()}
    results = measured(LPIPS(silent | published[1]), random_images(1), random_images(2))
    assert all(torch.equal(value, torch.zeros_like(value)) for value in results)


def test_it_is_frozen_and_always_in_evaluation_mode(lpips: LPIPS) -> None:
    parent = nn.ModuleDict({"lpips": lpips}).train()
    assert parent.training and not lpips.training
    before = lpips(random_images(1), random_images(2))
    assert torch.equal(lpips.train()(random_images(1), random_images(2)), before)
    assert not any(p.requires_grad for p in lpips.parameters())
    assert not any(isinstance(module, nn.Dropout) for module in lpips.modules())


def test_it_moves_with_its_parent_but_is_not_in_its_checkpoints(folder: Path) -> None:
    parent = nn.ModuleDict({"lpips": load_lpips(folder), "model": nn.Linear(2, 2)})
    saved = parent.state_dict()
    assert list(saved) == ["model.weight", "model.bias"]
    before = parent["lpips"](random_images(1), random_images(2))
    parent.load_state_dict({name: value + 1 for name, value in saved.items()}, strict=True)
    assert torch.equal(parent["lpips"](random_images(1), random_images(2)), before)
    with pytest.raises(RuntimeError, match="Missing key"):
        parent.load_state_dict({"model.weight": saved["model.weight"]}, strict=True)
    parent.to("meta")
    assert all(tensor.is_meta for tensor in (*parent.parameters(), *parent.buffers()))


def test_under_autocast_distances_are_fp32_and_close(lpips: LPIPS) -> None:
    a, b = random_images(1), smooth_images(2)
    with torch.autocast("cpu", torch.bfloat16):
        results = lpips(a, b)
    assert results.dtype == torch.float32
    assert torch.allclose(results, lpips(a, b), rtol=0.02)


@pytest.mark.parametrize(
    "a, b",
    [
        (torch.zeros(1, 3, 32, 32, dtype=torch.uint8), torch.zeros(1, 3, 32, 32, dtype=torch.uint8)),
        (torch.zeros(1, 3, 32, 32), torch.zeros(2, 3, 32, 32)),
        (torch.zeros(1, 1, 32, 32), torch.zeros(1, 1, 32, 32)),
        (torch.zeros(3, 32, 32), torch.zeros(3, 32, 32)),
        (torch.zeros(1, 3, 15, 32), torch.zeros(1, 3, 15, 32)),
    ],
)
def test_invalid_images_are_refused(lpips: LPIPS, a: Tensor, b: Tensor) -> None:
    with pytest.raises(ValueError, match="images"):
        lpips(a, b)


def hollow(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors of the same names and shapes that take no space in a file."""
    return {name: torch.zeros(1).expand(value.shape) for name, value in weights.items()}


CHANGES: dict[str, tuple[str, Callable[[dict[str, Any]], Any], str]] = {
    "missing": ("vgg16-397923af.pth", lambda w: {k: w[k] for k in w if k != "features.14.bias"}, "features.14.bias"),
    "extra": ("vgg16-397923af.pth", lambda w: w | {"features.1.weight": torch.zeros(1)}, "features.1.weight is not"),
    "shape": ("vgg16-397923af.pth", lambda w: w | {"features.0.weight": torch.zeros(64, 1, 3, 3)}, r"\(64, 3, 3, 3\)"),
    "integers": ("vgg16-397923af.pth", lambda w: w | {"features.0.bias": torch.zeros(64).int()}, "int32"),
    "other names": ("vgg.pth", lambda w: {k.replace("lin", "l"): w[k] for k in w}, "lin0.* is missing and 9 more"),
    "scaling": ("vgg.pth", lambda w: w | {"scaling_layer.shift": torch.zeros(3)}, "scaling_layer.shift is not"),
    "own net": ("vgg.pth", lambda w: w | {"net.slice1.0.weight": torch.zeros(1)}, "net.slice1.0.weight is not"),
    "nested": ("vgg.pth", lambda w: {"state_dict": w}, "other than tensors"),
    "numbered": ("vgg.pth", lambda w: dict(enumerate(w.values())), "other than tensors"),
    "a program": ("vgg.pth", lambda w: nn.Linear(1, 1), "does not load as tensors"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_other_weights_are_refused_in_one_line(published: Weights, tmp_path: Path, change: str) -> None:
    file, make, reason = CHANGES[change]
    for name, weights in zip(("vgg16-397923af.pth", "vgg.pth"), map(hollow, published), strict=True):
        torch.save(make(weights) if name == file else weights, tmp_path / name)
    with pytest.raises(ValueError, match=reason) as refusal:
        load_lpips(tmp_path)
    assert file in str(refusal.value) and "\n" not in str(refusal.value)


def test_the_error_for_a_missing_file_names_its_source(published: Weights, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nowhere: no such folder.*vgg16-397923af\.pth.*PerceptualSimilarity"):
        load_lpips(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"vgg16-397923af\.pth: no such file.*torchvision"):
        load_lpips(tmp_path)
    torch.save(hollow(published[0]), tmp_path / "vgg16-other.pth")
    with pytest.raises(ValueError, match=r"vgg\.pth: no such file.*PerceptualSimilarity"):
        load_lpips(tmp_path)
    torch.save(hollow(published[1]), tmp_path / "vgg.pth")
    load_lpips(tmp_path)
    (tmp_path / "vgg16_bn-6c64b313.pth").write_bytes(b"")
    with pytest.raises(ValueError, match=r"vgg16-other\.pth, vgg16_bn-6c64b313\.pth: keep one"):
        load_lpips(tmp_path)
    (tmp_path / "vgg.pth").write_bytes(b"<html>")
    (tmp_path / "vgg16_bn-6c64b313.pth").unlink()
    with pytest.raises(ValueError, match=r"vgg\.pth: does not load"):
        load_lpips(tmp_path)
