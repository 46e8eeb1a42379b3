"""MAM2 has two decoders with different targets. Predictions do not depend on hidden tokens, and settings have an effect."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ar_model.inputs import CodeSpec
from ar_model.objectives import MAM2
from ar_model.targets import rgb_difference
from ar_model.token_masking import draw_mask
from tests.helpers.small_arvideo import random_batch, spec, spread

GRID = (4, 4, 4)


def build(**changes: Any) -> MAM2:
    torch.manual_seed(0)
    small: dict[str, Any] = {"width": 12, "depth": 2, "heads": 2, "regressor_depth": 1}
    return MAM2(spec(GRID), **{**small, **changes})


def batch(samples: int = 3) -> dict[str, Tensor]:
    return random_batch(samples, GRID)


@pytest.mark.parametrize("difference", ["within", "next"])
def test_rgb_differences_are_between_the_right_frames(difference: Any) -> None:
    """The red channel is the squared time, so the difference of two frames identifies them."""
    model, frame = build(), torch.arange(8)
    video = torch.zeros(1, 8, 8, 8, 3)
    video[..., 0] = frame.square()[None, :, None, None]
    assert model.tubelets is not None
    differences = rgb_difference(model.tubelets.tokens({"pixels_BTHWC": video}), 4, 2, difference)
    red = differences[0, ..., 0].view(4, 16, -1, 4)  # slices, locations, frames, pixels
    assert differences[..., 1:].eq(0).all()
    for t in range(4):
        if difference == "within":
            assert (red[t] == (2 * t + 1) ** 2 - (2 * t) ** 2).all()
        else:
            first = min(t, 2)
            for f in range(2):
                assert (red[t, :, f] == (2 * first + 2 + f) ** 2 - (2 * first + f) ** 2).all()


def test_the_loss_is_the_weighted_sum_of_its_parts() -> None:
    data = batch()
    parts = build(align=2.0)(data)
    assert parts["loss"].item() == pytest.approx((parts["appearance"] + parts["motion"] + 2 * parts["align"]).item())
    assert "bits_per_code" in parts
    appearance_only = build(motion=0.0)
    assert set(appearance_only(data)) == {"loss", "appearance", "bits_per_code"}
    assert "motion" not in appearance_only.decoders
    assert set(build(appearance=0.0)(data)) == {"loss", "motion"}
    assert not build(motion=0.0, input="codes").needs_pixels and build(motion=0.0).needs_pixels


@pytest.mark.parametrize("difference", ["within", "next"])
def test_the_baseline_is_that_of_the_hidden_differences(difference: str) -> None:
    """Only the right half of the video changes. A decoder of zeros predicts the mean of each tubelet."""
    model, video = build(appearance=0, motion=2, align=1, difference=difference).eval(), batch()
    video["pixels_BTHWC"][:, 1:, :, :4] = video["pixels_BTHWC"][:, :1, :, :4]
    numbers = model(video)
    assert numbers["pixel_baseline"] < 0.8 < numbers["motion"] < numbers["loss"] / 2
    torch.nn.init.zeros_(model.targets["motion"].head.weight)
    assert torch.isclose(model(video)["motion"], numbers["pixel_baseline"])


@pytest.mark.parametrize("changes", [{}, {"input": "codes"}, {"rope": False, "difference": "next"}])
def test_predictions_do_not_depend_on_hidden_tokens(changes: dict[str, Any]) -> None:
    model, data = build(**changes), batch()
    hidden_BQ = draw_mask("tube", GRID, 0.75, data["seed_B"])[1]
    outputs: list[Tensor] = []
    for target in model.targets.values():
        target.register_forward_pre_hook(lambda module, inputs: outputs.append(inputs[0].detach()))
    model(data)
    hidden = torch.zeros(3, 64).scatter(1, hidden_BQ, 1).bool().view(3, *GRID)
    changed = {
        "codes_BTHW": torch.where(hidden, 7, data["codes_BTHW"]),
        "pixels_BTHWC": torch.where(spread(hidden)[..., None], 9, data["pixels_BTHWC"]).to(torch.uint8),
        "seed_B": data["seed_B"],
    }
    model(changed)
    assert len(outputs) == 4 and torch.equal(outputs[0], outputs[2]) and torch.equal(outputs[1], outputs[3])
    visible = {**changed, "pixels_BTHWC": 255 - data["pixels_BTHWC"], "codes_BTHW": 63 - data["codes_BTHW"]}
    model(visible)
    assert not torch.allclose(outputs[0], outputs[4])


def test_the_align_loss_compares_the_regressor_with_the_encoders_latents() -> None:
    model = build(align=1.0)
    regressed: list[Tensor] = []
    model.regressor.register_forward_hook(lambda module, inputs, out: regressed.append(out))
    align = model(batch())["align"]
    latents = model.encode(batch(), draw_mask("tube", GRID, 0.75, batch()["seed_B"])[1])
    assert align.item() == pytest.approx(F.mse_loss(regressed[0], latents).item(), rel=1e-5)


def test_the_align_loss_has_no_gradient_through_the_encoders_latents() -> None:
    """The encoder must not learn outputs that are easy to regress, so it encodes the hidden tokens without gradients."""
    model = build(align=1.0)
    grad_modes: list[bool] = []
    model.encoder.register_forward_pre_hook(lambda module, inputs: grad_modes.append(torch.is_grad_enabled()))
    model(batch())
    assert grad_modes == [True, False]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"appearance": 0.0, "motion": 0.0}, "appearance or motion above 0"),
        ({"align": -1.0}, "at least 0.*'align': -1.0"),
        ({"ratio": 1.0}, "objective.ratio 1.0"),
        ({"difference": "before"}, "objective.difference .*'before'"),
        ({"regressor_depth": 0}, "objective.regressor_depth .*got 0"),
    ],
)
def test_invalid_settings_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(**changes)


def test_frame_differences_that_the_clip_is_too_short_for_are_refused() -> None:
    with pytest.raises(ValueError, match="objective.difference within"):
        MAM2(CodeSpec(shape=(8, 4, 4), vocab_size=64, clip=(8, 16, 16)), width=12, heads=2)
    with pytest.raises(ValueError, match="objective.difference next"):
        MAM2(CodeSpec(shape=(1, 4, 4), vocab_size=64, clip=(2, 16, 16)), width=12, heads=2, difference="next")


def test_it_overfits_one_batch() -> None:
    model, data = build(ratio=0.5), batch(2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(60):
        values = model(data)
        values["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append((values["appearance"].item(), values["motion"].item()))
    assert losses[-1][0] < 0.8 * losses[0][0] and losses[-1][1] < 0.95 * losses[0][1]
