"""The classifier reads the tokens of a clip; drops, mixtures and crops are functions of the seeds; it is saved whole."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ar_model.augmentation import crop_and_flip
from ar_model.classifier import Classifier, load_classifier
from ar_model.objectives import VIMPAC, load_objective
from tests.helpers.small_arvideo import build, random_batch, spec

CLASSES = ("cat", "dog", "eel")


def batch_of(samples: int = 4, seed: int = 0) -> dict[str, Tensor]:
    return {**random_batch(samples, seed=seed), "label_B": torch.arange(samples) % 3}


def classifier(**settings: Any) -> Classifier:
    made = Classifier(build(), CLASSES, **settings)
    torch.nn.init.normal_(made.head.weight)
    return made


def test_the_head_reads_the_mean_of_the_last_block() -> None:
    made, batch = classifier().eval(), batch_of()
    last_BLD = made.trunk.features(batch)[-1]
    expected = made.head(made.norm(last_BLD.mean(1)))
    assert torch.allclose(made.logits(batch), expected, atol=1e-6)
    made.train()  # without its training settings, training is the same
    assert torch.allclose(made.logits(batch), expected, atol=1e-6)


def test_the_clip_token_of_vimpac_is_not_in_the_mean() -> None:
    trunk = VIMPAC(spec(), width=12, depth=2, heads=2)
    made, batch = Classifier(trunk, CLASSES).eval(), batch_of()
    torch.nn.init.normal_(made.head.weight)
    assert torch.allclose(made.logits(batch), made.head(made.norm(trunk.features(batch)[-1][:, 1:].mean(1))), atol=1e-6)
    assert {name.split(".")[1] for name in made.state_dict() if name.startswith("trunk")} == {
        *("embedding", "encoder", "clip_D", "pad_D")
    }


def test_all_parameters_have_a_gradient_and_a_layer() -> None:
    made = classifier(drop_path=0.2, keep_tokens=0.5, mixup=0.4, smoothing=0.1)
    made(batch_of())["loss"].backward()
    assert all(parameter.grad is not None for parameter in made.parameters())
    layers = made.layers()
    assert sorted(map(id, made.parameters())) == sorted(id(p) for layer in layers for p in layer)
    assert len(layers) == 2 + len(made.trunk.encoder.blocks) and layers[-1][-1] is made.head.bias


def test_the_first_predictions_are_nearly_uniform() -> None:
    made = Classifier(build(), CLASSES)
    assert made(batch_of())["loss"].item() == pytest.approx(torch.tensor(3.0).log().item(), abs=1e-3)


def test_loss_and_accuracy_are_those_of_pytorch() -> None:
    made, batch = classifier(smoothing=0.3), batch_of()
    logits = made.logits(batch)
    expected = torch.nn.functional.cross_entropy(logits, batch["label_B"], label_smoothing=0.3)
    numbers = made(batch)
    assert numbers["loss"].item() == pytest.approx(expected.item(), rel=1e-5)
    assert numbers["accuracy"].item() == (logits.argmax(1) == batch["label_B"]).float().mean().item()
    smooth = torch.nn.functional.cross_entropy(logits, batch["label_B"])
    assert made.eval()(batch)["loss"].item() == pytest.approx(smooth.item(), rel=1e-5)


@pytest.mark.parametrize("settings", [{"keep_tokens": 0.5}, {"drop_path": 0.6}])
def test_random_settings_depend_on_the_seed_of_a_sample_only(settings: dict[str, float]) -> None:
    made, batch = classifier(**settings), batch_of()
    logits = made.logits(batch)
    alone = torch.cat([made.logits({key: value[i : i + 1] for key, value in batch.items()}) for i in range(4)])
    assert torch.allclose(logits, alone, atol=1e-5)
    other = made.logits({**batch, "seed_B": batch["seed_B"] + 1})
    assert not torch.allclose(logits, other, atol=1e-3)
    made.eval()
    assert torch.equal(made.logits(batch), made.logits({**batch, "seed_B": batch["seed_B"] + 1}))


def test_stochastic_depth_keeps_the_mean_and_spares_the_first_block() -> None:
    made = classifier(drop_path=0.5)
    path_S2B = made._paths(torch.arange(4000))
    assert (path_S2B[0] == 1).all()
    assert set(path_S2B[-1].unique().tolist()) == {0.0, 2.0}
    assert path_S2B[-1].mean().item() == pytest.approx(1, abs=0.05)


def test_dropped_tokens_are_a_random_share_of_the_clip() -> None:
    made = classifier(keep_tokens=0.25)
    kept_BM = made._kept(torch.arange(500), 33, leading=1)
    assert kept_BM.shape == (500, 9) and (kept_BM[:, 0] == 0).all()
    assert (kept_BM.diff(dim=1) > 0).all()
    counts = kept_BM[:, 1:].flatten().bincount(minlength=33)[1:]
    assert counts.min() > 80 and counts.max() < 170


def test_mixup_mixes_embeddings_and_losses_with_the_same_share() -> None:
    made, batch = classifier(mixup=1.0), batch_of()
    torch.manual_seed(3)
    share = float(torch.distributions.Beta(1.0, 1.0).sample())
    logits = made.logits(batch, share)
    losses = [
        torch.nn.functional.cross_entropy(logits, label) for label in (batch["label_B"], batch["label_B"].flip(0))
    ]
    torch.manual_seed(3)
    assert made(batch)["loss"].item() == pytest.approx((share * losses[0] + (1 - share) * losses[1]).item(), rel=1e-5)
    tokens = made.trunk.embed(batch).x_BLD
    mixed = made.trunk.encoder(
        share * tokens + (1 - share) * tokens.flip(0), rotation=made.trunk.embed(batch).rotation()
    )
    assert torch.allclose(logits, made.head(made.norm(mixed[-1].mean(1))), atol=1e-5)


def test_crops_cover_the_scale_and_frames_of_a_clip_move_together() -> None:
    ramp_HW = torch.arange(16).repeat(16, 1) * 10
    pixels_BTHWC = ramp_HW.expand(200, 2, 16, 16)[..., None].expand(-1, -1, -1, -1, 3).to(torch.uint8)
    seed_B = torch.arange(200)
    cropped = crop_and_flip(pixels_BTHWC, seed_B, 0.25, False)
    assert torch.equal(cropped[:, 0], cropped[:, 1])
    # The width of a crop is the range of its ramp: from half of the frame to the whole.
    width_B = (cropped[:, 0, 8, 14, 0] - cropped[:, 0, 8, 1, 0]) / (10 * 13)
    assert 0.45 < width_B.min() < 0.6 and 0.9 < width_B.max() <= 1.001
    assert torch.allclose(crop_and_flip(pixels_BTHWC, seed_B, 1.0, False), pixels_BTHWC.float(), atol=1e-3)
    mirrored_B = (crop_and_flip(pixels_BTHWC, seed_B, 1.0, True)[:, 0, 0] - ramp_HW[0].flip(0)[:, None]).abs().amax(
        (1, 2)
    ) < 0.1
    assert 70 < mirrored_B.sum() < 130


def test_a_saved_classifier_is_loaded_whole(tmp_path: Path) -> None:
    made, batch = classifier().eval(), batch_of()
    made.save(tmp_path / "model", {"training steps": "60 of 4 clips"})
    card = (tmp_path / "model/README.md").read_text()
    count = sum(parameter.numel() for parameter in made.parameters())
    for fact in (
        f"| parameters | {count:,} |",
        "| classes | cat, dog, eel |",
        "| training steps | 60 of 4 clips |",
        "predict",
    ):
        assert fact in card
    loaded = load_classifier(tmp_path)
    assert loaded.classes == CLASSES and not loaded.training
    assert torch.equal(loaded.logits(batch), made.logits(batch))
    with pytest.raises(ValueError, match="it is a classifier"):
        load_objective(tmp_path)


def test_many_long_names_of_classes_are_loaded(tmp_path: Path) -> None:
    names = [f"动作 {i} {'x' * 30}" for i in range(2500)]
    made = Classifier(build(), names)
    made.save(tmp_path)
    assert load_classifier(tmp_path).classes == tuple(names)
    with pytest.raises(ValueError, match="names of the classes must have at most"):
        Classifier(build(), [f"{i}{'x' * 5000}" for i in range(2000)])


def test_other_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no classifier"):
        load_classifier(tmp_path)
    build().save(tmp_path / "objective")
    with pytest.raises(ValueError, match="holds no classifier"):
        load_classifier(tmp_path / "objective")
    classifier().save(tmp_path / "model")
    config = json.loads((tmp_path / "model/config.json").read_text())
    for changes in ({"classes": ["cat", "cat", "dog"]}, {"classes": ["cat", "dog"]}, {"classes": 3}, {"width": 10**9}):
        (tmp_path / "model/config.json").write_text(json.dumps(config | changes))
        with pytest.raises(ValueError, match="holds no classifier"):
            load_classifier(tmp_path)


MISTAKES = [
    ({"classes": ("cat",)}, "classes must be 2 to"),
    ({"classes": ("cat", "cat")}, "distinct"),
    ({"drop_path": 1.0}, r"drop_path .* got 1\.0"),
    ({"smoothing": -0.1}, r"smoothing .* got -0\.1"),
    ({"keep_tokens": 0.0}, r"keep_tokens .* got 0\.0"),
    ({"mixup": float("nan")}, "mixup .* got nan"),
    ({"flip": True}, "flip false for a model that reads codes"),
    ({"crop_scale": 0.5}, "crop_scale must be 1"),
]


@pytest.mark.parametrize("settings, message", MISTAKES)
def test_invalid_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Classifier(build(), **{"classes": CLASSES, **settings})
