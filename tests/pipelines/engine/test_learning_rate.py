"""Learning rate of every step: warm-up, cosine or linear decay, and its floor."""

import math

import pytest

from pipelines.engine.learning_rate import lr_at
from pipelines.settings.training import Training


def test_the_default_decays_to_a_hundredth_by_a_cosine() -> None:
    config = Training(steps=110, warmup=10, lr=2.0)
    assert [lr_at(step, config) for step in (0, 4, 9)] == pytest.approx([0.2, 1.0, 2.0])
    for step in (10, 35, 60, 109):
        done = (step - 10) / 100
        assert lr_at(step, config) == 2.0 * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * done)))


def test_videomaes_floor_is_a_fifteenth() -> None:
    """1e-5 of 1.5e-4, as in its code."""
    config = Training(steps=188000, warmup=9400, lr=6e-4, lr_floor=1 / 15)
    assert lr_at(187999, config) == pytest.approx(4e-5, rel=1e-4)


def test_linear_decay_ends_at_the_floor() -> None:
    config = Training(steps=100, warmup=0, lr=1.0, decay="linear", lr_floor=0.0)
    assert [lr_at(step, config) for step in range(100)] == pytest.approx([1 - step / 100 for step in range(100)])
    config = Training(steps=100, warmup=20, lr=1.0, decay="linear", lr_floor=0.5)
    assert lr_at(60, config) == pytest.approx(0.75)


@pytest.mark.parametrize(
    ("setting", "value"),
    [("lr_floor", -0.1), ("lr_floor", 1.1), ("lr_floor", float("nan"))]
    + [("betas", value) for value in ((0.9, 1.0), (-0.1, 0.9), (float("nan"), 0.9))],
)
def test_values_out_of_range_are_refused(setting: str, value: object) -> None:
    with pytest.raises(ValueError, match=rf"{setting} must be .* got"):
        Training(**{setting: value})  # type: ignore[arg-type]  # the types are right
